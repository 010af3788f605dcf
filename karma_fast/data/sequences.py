"""From rows of interactions to users' sequences, and the splits of those."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .schema import DataError, Sequences, Split


@dataclass
class Counts:
    """What `build_sequences` left out, in rows unless said otherwise.

    tied_neighbours: share of a user's neighbouring clicks that have the same time.
    """

    duplicates: int = 0
    trailing_exposures: int = 0
    own_exposures: int = 0
    dropped_users: int = 0
    dropped_clicks: int = 0
    tied_neighbours: float = 0.0
    notes: list[str] = field(default_factory=list)


def build_sequences(user_ids: np.ndarray, users: np.ndarray, items: np.ndarray, times: np.ndarray | None = None,
                    clicked: np.ndarray | None = None, queries: np.ndarray | None = None,
                    query_texts: list[str] | None = None, *, min_user_events: int = 3,
                    seed: int = 0) -> tuple[Sequences, Counts]:
    """R rows in any order -> `Sequences`, without a Python loop over rows.

    user_ids: (U,) external ids. users: (R,) integers into user_ids. items: (R,) places in the catalogue.
    times: (R,) int64 or float64; None takes the order of the rows. clicked: (R,) bool, None for all True.
    queries: (R,) int32 into query_texts, -1 for none.

    Rows are sorted by user and time. Rows with equal times are put in an order drawn with ``seed``, as the
    order of a file often follows the item id, which would leak; among them, rows shown but not clicked come
    first. These become the negatives of the user's next click, and are dropped where no click follows or
    where that click is on the same item. Of rows with the same user, item and time one is kept, a clicked one
    where there is one. Users with fewer than ``min_user_events`` clicks are dropped.

    Memory: the result takes 12 bytes a click (4 without times), 4 more with queries, 8 more with exposures, and
    4 an exposure, plus 8 a user and the ids. Measured with 20 M timed clicks of 1 M users: `load_dataset` from CSV
    peaks at 67 bytes a row, so 100 M rows take about 7 GB while loading and 1.3 GB from then on.

    >>> import numpy as np
    >>> sequences, counts = build_sequences(np.array(["u", "v"], dtype=object), np.array([0, 0, 1, 0]),
    ...                                     np.array([7, 8, 9, 7]), np.array([20, 10, 5, 20]), min_user_events=2)
    >>> list(sequences.user_ids), sequences.items, counts.duplicates, counts.dropped_users
    (['u'], array([8, 7], dtype=int32), 1, 1)
    """
    rows, counts = len(users), Counts()
    users = np.asarray(users, dtype=np.int32)
    items = np.asarray(items, dtype=np.int32)
    if clicked is not None and clicked.all():
        clicked = None
    order = _sorted_order(users, times, clicked, seed)
    users, items = users[order], items[order]
    times = None if times is None else times[order]
    clicked = None if clicked is None else clicked[order]
    queries = None if queries is None else np.asarray(queries, dtype=np.int32)[order]
    del order

    keep = np.ones(rows, dtype=bool)
    if times is not None:
        keep = _first_of_duplicates(users, times, items, clicked)
        counts.duplicates = int(rows - keep.sum())
    is_click = keep if clicked is None else keep & clicked
    per_user = np.bincount(users[is_click], minlength=len(user_ids))
    present = np.bincount(users, minlength=len(user_ids)) > 0
    stays = per_user >= min_user_events
    counts.dropped_users = int((present & ~stays).sum())
    counts.dropped_clicks = int(per_user[~stays].sum())
    keep &= stays[users]
    is_click = keep if clicked is None else keep & clicked
    new_user = (np.cumsum(stays) - 1).astype(np.int32)  # user -> place among those that stay
    indptr = np.concatenate([[0], np.cumsum(per_user[stays], dtype=np.int64)])

    result = Sequences(user_ids=np.asarray(user_ids, dtype=object)[stays], indptr=indptr, items=items[is_click],
                       times=None if times is None else times[is_click],
                       queries=None if queries is None else queries[is_click], query_texts=query_texts or [])
    if clicked is not None:
        shown = np.flatnonzero(keep & ~clicked)
        target = np.cumsum(is_click)[shown]  # clicks before the row = flat place of the next click
        followed = target < indptr[new_user[users[shown]] + 1]
        counts.trailing_exposures = int((~followed).sum())
        shown, target = shown[followed], target[followed]
        other = items[shown] != result.items[target]
        counts.own_exposures = int((~other).sum())
        result.negatives = items[shown[other]]
        sizes = np.bincount(target[other], minlength=len(result.items))
        result.negatives_indptr = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if times is not None and len(result.items) > 1:
        same_user = np.ones(len(result.items) - 1, dtype=bool)
        same_user[indptr[1:-1] - 1] = False
        tied = (result.times[1:] == result.times[:-1]) & same_user
        counts.tied_neighbours = float(tied.sum() / max(1, same_user.sum()))
    counts.notes = _notes(counts, times is not None, min_user_events, seed)
    return result, counts


def _sorted_order(users: np.ndarray, times: np.ndarray | None, clicked: np.ndarray | None, seed: int) -> np.ndarray:
    """(R,) row numbers by user, time, not clicked before clicked, then at random; without times by user alone."""
    if times is None:
        return np.argsort(users, kind="stable")
    # A stable sort of shuffled rows leaves equal ones in shuffled order.
    shuffled = np.random.default_rng(seed).permutation(np.arange(len(users), dtype=np.uint32))
    whole = len(times) > 0 and times.dtype.kind == "i"
    span = int(times.max()) - int(times.min()) + 1 if whole else 0
    if span and span * 2 * (int(users.max()) + 1) < 2**62:  # one key sorts 3 times as fast as two
        key = users.astype(np.int64)
        key *= span
        key += times
        key -= times.min()
        if clicked is not None:
            key *= 2
            key += clicked
        key = key[shuffled]
        return shuffled[np.argsort(key, kind="stable")]
    keys = (times[shuffled], users[shuffled])
    return shuffled[np.lexsort(keys if clicked is None else (clicked[shuffled], *keys))]


def _first_of_duplicates(users: np.ndarray, times: np.ndarray, items: np.ndarray,
                         clicked: np.ndarray | None) -> np.ndarray:
    """(R,) bool for sorted rows: False for all but one of those with the same user, time and item."""
    keep = np.ones(len(users), dtype=bool)
    tied = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    rows = np.flatnonzero(np.append(tied, False) | np.append(False, tied))  # only these can hold duplicates
    if len(rows):
        group = np.cumsum(~np.append(False, tied))[rows]
        keys = (items[rows], group) if clicked is None else (~clicked[rows], items[rows], group)
        order = np.lexsort(keys)
        item, group = items[rows][order], group[order]
        keep[rows[order[1:]]] = (item[1:] != item[:-1]) | (group[1:] != group[:-1])
    return keep


def _notes(counts: Counts, timed: bool, min_user_events: int, seed: int) -> list[str]:
    notes = []
    if counts.duplicates:
        notes.append(f"{counts.duplicates} rows repeat the user, item and time of another row; one of each was kept")
    if counts.trailing_exposures:
        notes.append(f"{counts.trailing_exposures} rows shown but not clicked have no later click of the user; "
                     "dropped")
    if counts.own_exposures:
        notes.append(f"{counts.own_exposures} rows shown but not clicked are of the item clicked next; dropped")
    if counts.dropped_users:
        notes.append(f"{counts.dropped_users} users with fewer than {min_user_events} clicks were dropped, with their "
                     f"{counts.dropped_clicks} clicks (data.min_user_events)")
    if counts.tied_neighbours:
        notes.append(f"{counts.tied_neighbours:.1%} of neighbouring events of a user have equal times; their order is "
                     f"a shuffle with seed {seed} (data.seed)")
    if not timed:
        notes.append("no time column: the order of the rows in the file is taken as the order in time")
    return notes


def split_leave_one_out(sequences: Sequences, seed: int = 0) -> Split:
    """The last event of a user is the test target, the last but one the validation target, the rest trains.

    Users with fewer than 3 events are wholly in the training part. ``seed`` is only named in the description.

    >>> sequences = Sequences(np.array(["u"], dtype=object), np.array([0, 4]), np.arange(4, dtype=np.int32))
    >>> split = split_leave_one_out(sequences)
    >>> split.train_end, split.valid, split.test
    (array([2]), array([2]), array([3]))
    """
    last = np.asarray(sequences.indptr[1:], dtype=np.int64)
    long = np.diff(sequences.indptr) >= 3
    order = "order of the file" if sequences.times is None else f"equal timestamps shuffled with seed {seed}"
    return Split(train_end=np.where(long, last - 2, last), valid=last[long] - 2, test=last[long] - 1,
                 description=f"leave one out: last event test, last but one validation; {order}")


def split_by_time(sequences: Sequences, valid_time: float, test_time: float, min_user_events: int = 1) -> Split:
    """Events before ``valid_time`` train, those before ``test_time`` validate, the rest test.

    Each validation or test event with at least one earlier event of its user is a target. Users with fewer than
    ``min_user_events`` events before ``valid_time`` do not train, so that no later event decides who does; their
    events are history all the same. DataError when the data has no times, or when nothing is left to train on.

    >>> sequences = Sequences(np.array(["u"], dtype=object), np.array([0, 4]), np.arange(4, dtype=np.int32),
    ...                       times=np.array([1, 2, 3, 4]))
    >>> split = split_by_time(sequences, valid_time=2, test_time=3)
    >>> split.train_end, split.valid, split.test
    (array([1]), array([1]), array([2, 3]))
    """
    if sequences.times is None:
        raise DataError("data.split: by_time needs a time column; set data.time_column, or data.split to "
                        "leave_one_out")
    times, first = sequences.times, np.asarray(sequences.indptr[:-1], dtype=np.int64)
    before = np.concatenate([[0], np.cumsum(times < valid_time, dtype=np.int64)])
    early = before[sequences.indptr[1:]] - before[first]
    if not before[-1]:
        span = f"they span {times.min()} to {times.max()}" if len(times) else "there are none"
        raise DataError(f"data.valid_time: no event lies before {valid_time:g}, so nothing is left to train on; "
                        f"{span}, choose a time in between, in the unit of the time column")
    if early.max() < min_user_events:
        raise DataError(f"data.valid_time: no user has {min_user_events} events before {valid_time:g}, so nothing is "
                        "left to train on; choose a later time, or lower data.min_user_events")
    late = np.flatnonzero(times >= valid_time)
    late = late[~np.isin(late, first, assume_unique=True)]
    in_test = times[late] >= test_time
    return Split(train_end=first + early * (early >= min_user_events), valid=late[~in_test], test=late[in_test],
                 description=f"by time: training before {valid_time:g}, validation before {test_time:g}, "
                             "test from there")
