"""Lists of different lengths in one flat array: places, without a loop over the lists."""

from __future__ import annotations

import numpy as np


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
