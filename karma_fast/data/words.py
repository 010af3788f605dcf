"""Texts as bags of words. Needs scipy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np


def tf_idf_vectors(texts: Sequence[str], further: Sequence[str] = ()) -> Any:
    """(N, words) scipy CSR float64 of TF-IDF vectors of length 1; a text without words has an empty row.

    Words are runs of letters and digits in lower case, weighted by count times ``log((1 + N) / (1 + texts)) + 1``.
    ``further`` texts, such as queries, get rows behind the N and do not count in the weights.

    >>> tf_idf_vectors(["red shoe", "Red", ""]).toarray().round(4)
    array([[0.6053, 0.796 ],
           [1.    , 0.    ],
           [0.    , 0.    ]])
    """
    from scipy import sparse

    words: dict[str, int] = {}
    lists = [[words.setdefault(word, len(words)) for word in re.findall(r"\w+", text.lower())]
             for text in [*texts, *further]]
    indptr = np.concatenate([[0], np.cumsum([len(part) for part in lists])])
    columns = np.concatenate([np.asarray(part, np.int64) for part in lists])
    vectors = sparse.csr_matrix((np.ones(len(columns)), columns, indptr), shape=(len(lists), len(words)))
    vectors.sum_duplicates()
    frequency = np.bincount(vectors[:len(texts)].indices, minlength=len(words))
    vectors = vectors @ sparse.diags(np.log((1 + len(texts)) / (1 + frequency)) + 1)
    length = np.sqrt(np.asarray(vectors.multiply(vectors).sum(axis=1)).reshape(-1))
    return (sparse.diags(1 / np.where(length > 0, length, 1)) @ vectors).tocsr()


def word_vectors(texts: Sequence[str], dim: int, seed: int = 0) -> np.ndarray:
    """(N, dim) float32 unit rows whose inner products approximate the TF-IDF cosines; NaN rows without any word.

    The leading singular directions of the TF-IDF vectors, zeros where there are fewer than ``dim``. No language model
    is asked. Source: latent semantic analysis, Deerwester et al. 1990.

    >>> word_vectors(["red shoe", "shoe, red", "tea", ""], 2).round(4).tolist()
    [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [nan, nan]]
    """
    from scipy.sparse.linalg import svds

    vectors = tf_idf_vectors(texts)
    present = np.diff(vectors.indptr) > 0
    if dim < min(vectors.shape):
        start = np.random.default_rng(seed).standard_normal(min(vectors.shape))  # svds draws its own otherwise
        left, values, _ = svds(vectors, k=dim, v0=start)
        left, values = left[:, ::-1], values[::-1]
    else:
        left, values, _ = np.linalg.svd(vectors.toarray(), full_matrices=False)
    return unit_rows(left[:, :dim] * values[:dim], dim, present)


def unit_rows(rows: np.ndarray, dim: int, present: np.ndarray) -> np.ndarray:
    """(N, k <= dim) spectral coordinates -> (N, dim) float32 rows of length 1; NaN where absent or without length.

    A direction's sign is arbitrary: here its largest entry is positive. Zeros fill up.

    >>> unit_rows(np.array([[-2.0], [0.0], [-1.0]]), 2, np.array([True, True, False])).tolist()
    [[1.0, 0.0], [nan, nan], [nan, nan]]
    """
    if rows.size:
        rows = rows * np.where(rows[np.abs(rows).argmax(axis=0), np.arange(rows.shape[1])] < 0, -1, 1)
    rows = np.pad(rows, ((0, 0), (0, dim - rows.shape[1])))
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(present[:, None] & (length > 1e-9), rows / np.maximum(length, 1e-9), np.nan).astype(np.float32)
