"""Cuts the training part of the sequences into windows, one training example each."""

from __future__ import annotations

from typing import Literal

import numpy as np

from .flat import numbered
from .schema import Sequences, Split

ONE_USER = ("all training windows are of one user, whose targets are never each other's negatives: L_act would be 0; "
            "give data of more users or with items shown but not clicked (data.clicked_column), or set "
            "model.act_weight 0")


def training_windows(sequences: Sequences, split: Split, max_history: int, positions: Literal["last", "all"],
                     min_history: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends), both (W,) int64: window w is the flat events ``starts[w]:ends[w]`` of one user.

    Its last event is the target of its last request, those before are the history. A window never holds an
    event at or after ``split.train_end`` nor one of another user. Windows come user by user, oldest first.

    positions="last": one window for each training event with at least ``min_history`` earlier events; the
    history is cut to the last ``max_history``. Work grows with ``max_history`` for every event.
    positions="all": windows of at most ``max_history + 1`` events in which every event but the first is a
    target. Neighbours overlap by one event, so each event with a predecessor is a target exactly once. They
    are laid from the end: the last window is the full one, so recent events have the long histories.
    Windows with fewer than ``min_history`` events before their last are left out.
    ValueError for other ``positions``, or unless ``1 <= min_history <= max_history``.

    >>> sequences = Sequences(np.array(["u"], dtype=object), np.array([0, 6]), np.arange(6, dtype=np.int32))
    >>> split = Split(np.array([5]), np.array([], dtype=np.int64), np.array([5]), "last event")
    >>> training_windows(sequences, split, 3, "last")
    (array([0, 0, 0, 1]), array([2, 3, 4, 5]))
    >>> training_windows(sequences, split, 3, "all")
    (array([0, 1]), array([2, 5]))
    """
    if not 1 <= min_history <= max_history:
        raise ValueError(f"max_history {max_history}, min_history {min_history}: needs 1 <= min_history <= "
                         "max_history")
    if positions not in ("last", "all"):
        raise ValueError(f"positions: got {positions!r}; allowed: 'last', 'all'")
    first = np.asarray(sequences.indptr[:-1], dtype=np.int64)
    last = np.asarray(split.train_end, dtype=np.int64)
    targets = np.maximum(last - first - 1, 0)  # events with a predecessor
    if positions == "last":
        counts = np.maximum(targets - (min_history - 1), 0)
        user, nth = numbered(counts)
        ends = first[user] + min_history + nth + 1
        return np.maximum(first[user], ends - 1 - max_history), ends
    counts = -(-targets // max_history)
    user, nth = numbered(counts)
    ends = last[user] - (counts[user] - 1 - nth) * max_history
    starts = np.maximum(first[user], ends - max_history - 1)
    keep = ends - starts > min_history
    return starts[keep], ends[keep]


def windows_of_pairs(pairs: float, positions: str, starts: np.ndarray, ends: np.ndarray) -> int:
    """How many of the windows hold about so many query-target pairs.

    positions: whether "all" items of a window, or its "last" alone, are targets.

    >>> windows_of_pairs(95, "all", np.arange(9) * 19, np.arange(9) * 19 + 20)
    5
    """
    in_one = float((ends - starts - 1).mean()) if positions == "all" else 1.0
    return max(1, min(len(ends), round(pairs / in_one)))


def negatives_of(windows: int, pairs: float, hard: float = 0) -> int:
    """What a query is compared with beside its target: the other windows' targets and everyone's hard negatives.

    pairs: of a window. hard: of a pair.

    >>> negatives_of(5, 19), negatives_of(5, 19, 2)
    (76, 266)
    """
    return round(pairs * (max(0, windows - 1) + hard * windows))
