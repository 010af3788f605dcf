"""What the training-free scorers count: choices in the training part, and the weighted history of a request.

Needs scipy (``pip install "karma-fast[train]"``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..evaluation.csr import csr_ranges

LAST_ITEMS = 5  # history items that a scorer looks at unless told otherwise


def training_matrix(sequences: Any, split: Any, num_items: int) -> Any:
    """(U, N) sparse float64: how often a user chose an item within the training part.

    >>> from karma_fast.data.schema import Sequences, Split
    >>> sequences = Sequences(np.array(["u"]), np.array([0, 4]), np.array([1, 1, 0, 2], np.int32))
    >>> training_matrix(sequences, Split(np.array([3]), np.array([]), np.array([3]), ""), 3).toarray()
    array([[1., 2., 0.]])
    """
    from scipy import sparse

    indptr, items = csr_ranges(sequences.items, sequences.indptr[:-1], split.train_end)
    matrix = sparse.csr_matrix((np.ones(len(items)), items, indptr), shape=(len(indptr) - 1, num_items))
    matrix.sum_duplicates()
    return matrix


def transition_counts(sequences: Any, split: Any, num_items: int) -> Any:
    """(N, N) sparse float64: how often item j (column) came right after item h (row) within the training part.

    >>> from karma_fast.data.schema import Sequences, Split
    >>> sequences = Sequences(np.array(["u", "v"]), np.array([0, 3, 6]), np.array([0, 1, 2, 0, 1, 0], np.int32))
    >>> transition_counts(sequences, Split(np.array([2, 6]), np.array([]), np.array([2]), ""), 3).toarray()
    array([[0., 2., 0.],
           [1., 0., 0.],
           [0., 0., 0.]])
    """
    from scipy import sparse

    first, end = np.asarray(sequences.indptr[:-1], np.int64), np.asarray(split.train_end, np.int64)
    long = end - first >= 2
    _, source = csr_ranges(sequences.items, first[long], end[long] - 1)
    _, target = csr_ranges(sequences.items, first[long] + 1, end[long])
    matrix = sparse.csr_matrix((np.ones(len(source)), (source, target)), shape=(num_items, num_items))
    matrix.sum_duplicates()
    return matrix


def recent_history(sequences: Any, positions: np.ndarray, num_items: int, last: int = LAST_ITEMS,
                   decay: float = 1.0) -> Any:
    """(R, N) sparse float64: each item's weight in the user's ``last`` items before each flat position.

    An item counts ``decay ** age``, the latest having age 0; an item that is there several times has the sum.

    >>> from karma_fast.data.schema import Sequences
    >>> sequences = Sequences(np.array(["u"]), np.array([0, 4]), np.array([1, 0, 1, 2], np.int32))
    >>> recent_history(sequences, np.array([3, 0]), 3, decay=0.5).toarray()
    array([[0.5 , 1.25, 0.  ],
           [0.  , 0.  , 0.  ]])
    """
    from scipy import sparse

    positions = np.asarray(positions, np.int64)
    starts = np.maximum(sequences.indptr[sequences.user_of(positions)], positions - last)
    indptr, items = csr_ranges(sequences.items, starts, positions)
    age = np.repeat(indptr[1:], np.diff(indptr)) - 1 - np.arange(len(items))
    matrix = sparse.csr_matrix((np.power(float(decay), age), items, indptr), shape=(len(indptr) - 1, num_items))
    matrix.sum_duplicates()
    return matrix
