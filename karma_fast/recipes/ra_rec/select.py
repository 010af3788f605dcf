"""Training requests worth their time: a filter by shared words, then an even draw over kinds of users and items.

Source: Yu et al. 2024, RA-Rec, arXiv 2402.04527, which trains on 6% of the requests chosen in this way. The words,
the number of buckets and the order of the draw are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...data.schema import Items, Split
from ...data.schema import Sequences as UserSequences
from ...data.words import UNSPACED, words_of

BUCKETS = 5  # of history length, and as many of popularity
SHORT = 3  # letters; words below are articles and the like, but not two characters of Chinese


@dataclass
class Selection:
    """chosen: (n,) places of the kept requests, ascending. without_overlap: requests that the filter dropped.

    buckets: (length buckets, popularity buckets) requests left by the filter, and ``drawn`` of them.
    """

    chosen: np.ndarray
    without_overlap: int
    buckets: np.ndarray
    drawn: np.ndarray


def select_requests(sequences: UserSequences, split: Split, items: Items, starts: np.ndarray, ends: np.ndarray, *,
                    share: float = 1.0, overlap: bool = False, seed: int = 0) -> Selection:
    """Chooses among requests whose histories are events ``start:end - 1`` and whose targets are events ``end - 1``.

    Args:
        starts, ends: (W,), from `karma_fast.data.training_windows` with positions="last".
        share: of the W requests that are to be kept, above 0, at most 1; fewer if the filter leaves fewer.
        overlap: drop requests whose target's title has no word (of 3 letters or more) of the history's titles.
        seed: of the draw.

    The rest is put into 5 x 5 buckets with about as many requests each by history length and by the target's number of
    training events, and drawn one bucket after the other, so that every kind is there equally often while it lasts.

    Example:
        >>> items = Items(np.array(list("abc"), dtype=object), [""] * 3, ["red shoe", "red hat", "tea"])
        >>> sequences = UserSequences(np.array(["u"], dtype=object), np.array([0, 3]), np.array([0, 1, 2], np.int32))
        >>> split = Split(np.array([3]), np.array([], int), np.array([], int), "")
        >>> select_requests(sequences, split, items, np.array([0, 0]), np.array([2, 3]), overlap=True).chosen
        array([0])
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}; above 0 and at most 1 is needed")
    targets = sequences.items[ends - 1]
    kept = np.ones(len(ends), bool)
    if overlap:
        words = [frozenset(word for word in words_of(title) if len(word) >= SHORT or UNSPACED.match(word))
                 for title in items.titles]
        kept = np.array([not words[target].isdisjoint(frozenset().union(*(words[i] for i in
                         sequences.items[start:end - 1])))
                         for start, end, target in zip(starts, ends, targets, strict=True)], dtype=bool)
    left = np.flatnonzero(kept)
    popularity = split.training_counts(sequences, len(items))
    at = ends[left] - 1
    length = at - sequences.indptr[sequences.user_of(at)]  # of all that came before: windows are cut to max_history
    bucket = quantile(length) * BUCKETS + quantile(popularity[targets[left]])
    counts = np.bincount(bucket, minlength=BUCKETS**2)
    wanted = min(len(left), max(1, round(share * len(ends))))
    # number of each request within its bucket, in a random order: the first ones of all buckets come first
    order = np.random.default_rng(seed).permutation(len(left))
    by_bucket = order[np.argsort(bucket[order], kind="stable")]
    number = np.empty(len(left), np.int64)
    number[by_bucket] = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.lexsort((np.argsort(order), number))  # ties between buckets by the same random order
    drawn = np.sort(rank[:wanted])
    shape = (BUCKETS, BUCKETS)
    return Selection(left[drawn], len(ends) - len(left), counts.reshape(shape),
                     np.bincount(bucket[drawn], minlength=BUCKETS**2).reshape(shape))


def quantile(values: np.ndarray) -> np.ndarray:
    """(n,) numbers -> (n,) buckets 0 to 4 of about equal size; equal numbers share one.

    >>> quantile(np.array([1, 1, 9, 5, 3, 7]))
    array([0, 0, 4, 2, 1, 3])
    """
    if not len(values):
        return np.zeros(0, np.int64)
    ranks = np.searchsorted(np.sort(values), values)
    return ranks * BUCKETS // len(values)
