"""Training-free recommenders to stand beside a model: popularity, item-kNN, title TF-IDF.

A scorer is a function of histories, an (R, N) scipy.sparse matrix with the weight of each history item, that gives
(R, N) float32 scores. All statistics of interactions come from the training part alone. Needs scipy
(``pip install "karma-fast[train]"``).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .csr import csr_ranges, csr_rows, seen_before
from .metrics import ranking_metrics
from .ranks import Ranks, rank_scores

LAST_ITEMS = 5  # history items that item-kNN and TF-IDF look at
BLOCK_BYTES = 64 << 20  # of float32 scores at a time

Scorer = Callable[[Any], np.ndarray]


def baseline_rows(dataset: Any, positions: np.ndarray, ks: Sequence[int] = (1, 5, 10, 50, 200), *,
                  mask_seen: bool = True) -> dict[str, dict[str, float]]:
    """Metrics of every baseline for the requests whose targets stand at flat ``positions``.

    Args:
        dataset: :class:`karma_fast.data.Dataset` (items, sequences, split).
        positions: (T,) flat positions of targets, for example ``dataset.split.test``.
        ks: cut-offs, see :func:`karma_fast.evaluation.ranking_metrics`.
        mask_seen: leave out what the user chose before the target, the rule for the model's own row too.

    Example:
        >>> from types import SimpleNamespace
        >>> from karma_fast.data.schema import Items, Sequences, Split
        >>> items = Items(ids=np.array(["a", "b", "c"]), texts=["", "", ""], titles=["red shoe", "blue shoe", "tea"])
        >>> sequences = Sequences(np.array(["u", "v"]), np.array([0, 3, 5]), np.array([2, 0, 1, 0, 1], np.int32))
        >>> split = Split(np.array([2, 4]), np.array([], int), np.array([2, 4]), "last event is the test")
        >>> dataset = SimpleNamespace(items=items, sequences=sequences, split=split)
        >>> rows = baseline_rows(dataset, split.test, ks=(1,))
        >>> {name: row["HR@1"] for name, row in rows.items()}
        {'popularity': 0.5, 'item-kNN': 0.5, 'title TF-IDF': 1.0}
    """
    positions = np.asarray(positions, np.int64)
    targets = dataset.sequences.items[positions].astype(np.int64)
    seen = seen_before(dataset.sequences, positions)
    rows = {}
    for name, scorer in baseline_scorers(dataset).items():
        parts, size = [], max(1, BLOCK_BYTES // (4 * len(dataset.items)))
        for start in range(0, len(positions), size):
            part = slice(start, start + size)
            scores = scorer(recent_history(dataset.sequences, positions[part], len(dataset.items)))
            left_out = csr_rows(seen, start, start + size) if mask_seen else None
            parts.append(rank_scores(scores, targets[part], left_out))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # counts and titles tie by nature; tie_share stands in the row
            rows[name] = ranking_metrics(Ranks.concat(parts), ks, num_items=len(dataset.items))
    return rows


def baseline_scorers(dataset: Any) -> dict[str, Scorer]:
    """Every baseline of this file, fitted: name -> scorer."""
    matrix = training_matrix(dataset.sequences, dataset.split, len(dataset.items))
    return {"popularity": popularity(matrix), "item-kNN": item_knn(matrix),
            "title TF-IDF": tf_idf(dataset.items.titles)}


def training_matrix(sequences: Any, split: Any, num_items: int) -> Any:
    """(U, N) sparse float64: how often a user chose an item within the training part."""
    from scipy import sparse

    indptr, items = csr_ranges(sequences.items, sequences.indptr[:-1], split.train_end)
    matrix = sparse.csr_matrix((np.ones(len(items)), items, indptr), shape=(len(indptr) - 1, num_items))
    matrix.sum_duplicates()
    return matrix


def recent_history(sequences: Any, positions: np.ndarray, num_items: int, last: int = LAST_ITEMS) -> Any:
    """(R, N) sparse float64: how often each item is among the user's ``last`` items before each position."""
    from scipy import sparse

    starts = np.maximum(sequences.indptr[sequences.user_of(positions)], positions - last)
    indptr, items = csr_ranges(sequences.items, starts, positions)
    matrix = sparse.csr_matrix((np.ones(len(items)), items, indptr), shape=(len(indptr) - 1, num_items))
    matrix.sum_duplicates()
    return matrix


def popularity(matrix: Any) -> Scorer:
    """Score: number of times the item was chosen in the training part, whatever the history."""
    counts = np.asarray(matrix.sum(axis=0), np.float32).reshape(1, -1)
    return lambda history: np.repeat(counts, history.shape[0], axis=0)


def item_knn(matrix: Any) -> Scorer:
    r"""Score: :math:`\sum_h \mathrm{cos}(h, j)` over the history, cos = users of both / sqrt(users of h * users of j).

    An item is not its own neighbour. Source: Sarwar et al. 2001, https://doi.org/10.1145/371920.372071
    """
    from scipy import sparse

    chosen = matrix.copy()
    chosen.data[:] = 1
    users = np.asarray(chosen.sum(axis=0)).reshape(-1)
    known = sparse.diags((users > 0).astype(np.float64))
    chosen = (chosen @ sparse.diags(1 / np.sqrt(np.maximum(users, 1)))).tocsr()  # columns of length 1
    back = chosen.T.tocsr()
    # users between the two products keep this sparse; the (N, N) table of cosines need not fit in memory
    return lambda history: ((history @ back) @ chosen - history @ known).toarray().astype(np.float32)


def tf_idf(titles: Sequence[str]) -> Scorer:
    """Score: sum over the history of the cosine of the titles' TF-IDF vectors.

    Words are runs of letters and digits in lower case, weighted by count times ``log((1 + N) / (1 + titles)) + 1``.
    """
    from scipy import sparse

    words: dict[str, int] = {}
    lists = [[words.setdefault(word, len(words)) for word in re.findall(r"\w+", title.lower())] for title in titles]
    indptr = np.concatenate([[0], np.cumsum([len(part) for part in lists])])
    columns = np.concatenate([np.asarray(part, np.int64) for part in lists])
    vectors = sparse.csr_matrix((np.ones(len(columns)), columns, indptr), shape=(len(titles), len(words)))
    vectors.sum_duplicates()
    frequency = np.bincount(vectors.indices, minlength=len(words))
    vectors = vectors @ sparse.diags(np.log((1 + len(titles)) / (1 + frequency)) + 1)
    length = np.sqrt(np.asarray(vectors.multiply(vectors).sum(axis=1)).reshape(-1))
    vectors = (sparse.diags(1 / np.where(length > 0, length, 1)) @ vectors).tocsr()
    back = vectors.T.tocsr()
    return lambda history: ((history @ vectors) @ back).toarray().astype(np.float32)
