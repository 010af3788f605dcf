"""Training-free scores: popularity, item-kNN, TF-IDF, transitions.

A scorer is a function of histories, an (R, N) scipy.sparse matrix with the weight of each history item (see
:func:`karma_fast.baselines.counts.recent_history`), that gives (R, N) float32 scores. Needs scipy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..data.words import tf_idf_vectors

Scorer = Callable[[Any], np.ndarray]
RequestScorer = Callable[[np.ndarray], np.ndarray]  # flat positions of targets (R,) -> (R, N) float32 scores


def popularity(matrix: Any) -> Scorer:
    """Score: number of times the item was chosen in the training part, whatever the history.

    >>> from scipy import sparse
    >>> popularity(sparse.csr_matrix([[1.0, 0.0], [2.0, 1.0]]))(sparse.csr_matrix((1, 2)))
    array([[3., 1.]], dtype=float32)
    """
    counts = np.asarray(matrix.sum(axis=0), np.float32).reshape(1, -1)
    return lambda history: np.broadcast_to(counts, (history.shape[0], counts.shape[1]))  # one row for all


def item_knn(matrix: Any) -> Scorer:
    r"""Score: :math:`\sum_h \mathrm{cos}(h, j)` over the history, cos = users of both / sqrt(users of h * users of j).

    An item is not its own neighbour. Source: Sarwar et al. 2001, https://doi.org/10.1145/371920.372071

    >>> from scipy import sparse
    >>> item_knn(sparse.csr_matrix([[1.0, 1.0], [1.0, 0.0]]))(sparse.csr_matrix([[1.0, 0.0]]))[0, 1].round(4)
    np.float32(0.7071)
    """
    from scipy import sparse

    chosen = matrix.copy()
    chosen.data[:] = 1
    users = np.asarray(chosen.sum(axis=0)).reshape(-1)
    known = sparse.diags((users > 0).astype(np.float64))
    chosen = (chosen @ sparse.diags(1 / np.sqrt(np.maximum(users, 1)))).tocsr()  # columns of length 1
    back = chosen.T.tocsr()
    # users between the two products keep this sparse; the (N, N) table of cosines need not fit in memory
    return lambda history: dense((history @ back) @ chosen - history @ known)


def tf_idf(texts: Sequence[str]) -> Scorer:
    """Score: sum over the history of the cosine of the texts' vectors, :func:`karma_fast.data.words.tf_idf_vectors`.

    >>> from scipy import sparse
    >>> tf_idf(["red shoe", "tea", "Red"])(sparse.csr_matrix([[0.0, 0.0, 1.0]])).round(4)
    array([[0.6053, 0.    , 1.    ]], dtype=float32)
    """
    vectors = tf_idf_vectors(texts)
    back = vectors.T.tocsr()
    return lambda history: dense((history @ vectors) @ back)


def transitions(counts: Any) -> Scorer:
    """Score: sum over the history of how often the item came right after the history's item.

    Args:
        counts: (N, N) sparse, see :func:`karma_fast.baselines.counts.transition_counts`.

    A history of the last item alone (``last=1``) makes this the first-order Markov chain.

    >>> from scipy import sparse
    >>> transitions(sparse.csr_matrix([[0.0, 2.0], [1.0, 0.0]]))(sparse.csr_matrix([[1.0, 0.0]]))
    array([[0., 2.]], dtype=float32)
    """
    return lambda history: dense(history @ counts)


def dense(scores: Any) -> np.ndarray:
    """(R, N) float32 of a sparse matrix that has each place once; rounded before it is wide, its places not copied."""
    from scipy import sparse

    scores = scores.tocsr()
    return sparse.csr_matrix((scores.data.astype(np.float32), scores.indices, scores.indptr), scores.shape).toarray()
