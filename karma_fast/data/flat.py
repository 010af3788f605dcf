"""Lists of different lengths in one flat array, without a loop over the lists: places, parts, draws."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

PAIRS = 16 << 20  # entries of lists that are written out at once; a handful of int64 arrays of as many


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whole numbers from each start on, as many as its length says, one span after the other.

    >>> spans(np.array([10, 3]), np.array([2, 3]))
    array([10, 11,  3,  4,  5])
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def numbered(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each entry of lists of these lengths, one after the other: its list and its number there, int64.

    >>> numbered(np.array([2, 0, 1]))
    (array([0, 0, 2]), array([0, 1, 0]))
    """
    return np.repeat(np.arange(len(lengths)), lengths), spans(np.zeros_like(lengths), lengths)


def draw(positions: np.ndarray, number: int, seed: int) -> np.ndarray:
    """``number`` of the positions drawn by the seed, in rising order; all, as they are, for 0 or a number beyond.

    >>> draw(np.array([4, 7, 9]), 0, 0), len(draw(np.array([4, 7, 9]), 2, 0))
    (array([4, 7, 9]), 2)
    """
    if not 0 < number < len(positions):
        return positions
    return np.sort(np.random.default_rng(seed).choice(positions, number, replace=False))


def slices(lengths: np.ndarray) -> Iterator[slice]:
    """Lists that follow each other, at most ``PAIRS`` entries at a time unless one alone has more; one slice or more.

    >>> list(slices(np.array([2, 0, 1]))), list(slices(np.array([], int)))
    ([slice(0, 3, None)], [slice(0, 0, None)])
    """
    ends, start = np.cumsum(lengths), 0
    while True:
        before = ends[start - 1] if start else 0
        stop = min(max(int(np.searchsorted(ends, before + PAIRS, side="right")), start + 1), len(ends))
        yield slice(start, stop)
        if stop == len(ends):
            return
        start = stop
