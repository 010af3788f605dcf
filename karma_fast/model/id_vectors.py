"""ID vectors of items from the training part of the sequences: a spectral embedding of nearby co-occurrence.

A training pair counts among the co-occurrences, so ID vectors show a model the very pairs that it is to learn, and it
trusts them more than it should with other users. `held_out_id_vectors` are made without a group of users each, for the
training of that group.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..data.schema import Sequences, Split
from ..data.words import unit_rows


def co_occurrence(sequences: Sequences, split: Split, num_items: int, window: int = 20):
    """Symmetric (N, N) scipy CSR: two items of one user, k <= window events apart, count k ** -0.5.

    Only events before ``split.train_end`` are read, so no validation or test item leaves a trace.
    """
    from scipy import sparse

    items = sequences.items.astype(np.int64)
    end = np.repeat(split.train_end, np.diff(sequences.indptr))  # of each event's user
    position = np.arange(len(items))
    total = sparse.csr_matrix((num_items, num_items))
    for k in range(1, window + 1):
        left = np.flatnonzero(position + k < end)
        pairs = (np.full(len(left), k ** -0.5), (items[left], items[left + k]))
        total = total + sparse.csr_matrix(pairs, shape=(num_items, num_items))
    return total + total.T


def id_vectors(sequences: Sequences, split: Split, num_items: int, dim: int, window: int = 20, seed: int = 0
               ) -> np.ndarray:
    """(N, dim) float32 unit rows; NaN rows for items that the training part does not hold.

    The leading eigenvectors of the co-occurrence matrix after both sides are divided by the root of their sums, each
    scaled by the root of its eigenvalue: the inner product of two rows approximates their normalised co-occurrence.

    Example:
        >>> sequences = Sequences(np.array(["u", "v"], dtype=object), np.array([0, 3, 6]),
        ...                       np.array([0, 1, 2, 0, 1, 3], dtype=np.int32))
        >>> split = Split(np.array([3, 5]), np.array([]), np.array([]), "")
        >>> id_vectors(sequences, split, 4, 2).shape, np.isnan(id_vectors(sequences, split, 4, 2)).any(axis=1).tolist()
        ((4, 2), [False, False, False, True])
    """
    from scipy import sparse
    from scipy.sparse.linalg import eigsh

    counts = co_occurrence(sequences, split, num_items, window)
    sums = np.asarray(counts.sum(axis=1)).ravel()
    present = sums > 0
    if not present.any():
        return np.full((num_items, dim), np.nan, np.float32)
    scale = sparse.diags(np.where(present, 1 / np.sqrt(np.where(present, sums, 1)), 0))
    matrix = scale @ counts @ scale
    if dim < num_items - 1:
        start = np.random.default_rng(seed).standard_normal(num_items)  # eigsh draws its own otherwise
        values, vectors = eigsh(matrix, k=dim, which="LA", v0=start)
    else:
        values, vectors = np.linalg.eigh(matrix.toarray())
        values, vectors = values[-dim:], vectors[:, -dim:]
    return unit_rows(vectors[:, ::-1] * np.sqrt(np.maximum(values[::-1], 0)), dim, present)


def groups_of_users(num_users: int, folds: int, seed: int = 0) -> np.ndarray:
    """(U,) int64: the group of each user, drawn by seed.

    >>> groups_of_users(6, 2).tolist()
    [1, 1, 1, 0, 0, 0]
    """
    return np.random.default_rng(seed).integers(folds, size=num_users)


def held_out_id_vectors(sequences: Sequences, split: Split, num_items: int, dim: int, window: int = 20, folds: int = 4,
                        onto: np.ndarray | None = None, progress: bool = False) -> np.ndarray:
    """(folds, N, dim) float32: `id_vectors` without the users of group 0, of group 1, and so on.

    Two sets of spectral coordinates differ by a rotation at least, so each is rotated onto ``onto``, (N, dim), the
    vectors of all users: the orthogonal map with the least squares over the items that both have (Schönemann 1966).
    """
    from tqdm.auto import tqdm

    onto = id_vectors(sequences, split, num_items, dim, window) if onto is None else onto
    groups = groups_of_users(len(sequences), folds)
    out = []
    for fold in tqdm(range(folds), desc="making ID vectors without each group", unit="group", disable=not progress):
        others = dataclasses.replace(split, train_end=np.where(groups == fold, sequences.indptr[:-1], split.train_end))
        vectors = id_vectors(sequences, others, num_items, dim, window)
        both = ~(np.isnan(vectors).any(axis=1) | np.isnan(onto).any(axis=1))
        left, _, right = np.linalg.svd(vectors[both].T @ onto[both])
        out.append(vectors @ (left @ right))
    return np.stack(out)
