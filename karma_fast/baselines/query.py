"""Scores that read the query of a request: query TF-IDF and query kNN, alone or added to a score of histories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.words import tf_idf_vectors
from .mix import SEARCH_METRIC, search_metrics, validation_requests
from .scorers import RequestScorer, dense

SHARPNESS = 8  # of 1, 2, 4 and 8 the best on validation requests of Amazon Beauty with simulated queries
NEIGHBOURS = 1 << 24  # pairs of queries at a time
QUERY_WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)  # of equally good ones the first is taken


def query_scorer(dataset: Any) -> RequestScorer:
    """Score: cosine of the TF-IDF vectors of the request's query and of the item's text; 0 where there is no query.

    Flat positions (R,) of targets -> (R, N) float32. Needs scipy.

    Example:
        >>> from types import SimpleNamespace
        >>> from karma_fast.data.schema import Items, Sequences
        >>> items = Items(ids=np.array(["a", "b"]), texts=["red shoe", "tea"], titles=["", ""])
        >>> sequences = Sequences(np.array(["u"]), np.array([0, 2]), np.array([0, 1], np.int32),
        ...                       queries=np.array([-1, 0], np.int32), query_texts=["a red one"])
        >>> query_scorer(SimpleNamespace(items=items, sequences=sequences))(np.array([0, 1])).round(4)
        array([[0.    , 0.    ],
               [0.3026, 0.    ]], dtype=float32)
    """
    from scipy import sparse

    sequences, size = dataset.sequences, len(dataset.items)
    vectors = tf_idf_vectors(dataset.items.texts, sequences.query_texts)
    of_items, of_queries = vectors[:size].T.tocsr(), vectors[size:]

    def score(positions: np.ndarray) -> np.ndarray:
        asked = queries_at(sequences, positions)
        rows = np.flatnonzero(asked >= 0)
        one_hot = sparse.csr_matrix((np.ones(len(rows)), (rows, asked[rows])),
                                    shape=(len(positions), len(sequences.query_texts)))
        return dense((one_hot @ of_queries) @ of_items)

    return score


def query_knn_scorer(dataset: Any, sharpness: float = SHARPNESS) -> RequestScorer:
    """Score: how often the item was chosen in training after such a query, over that of the item with most.

    Every training request with a query counts cos^sharpness, with the cosine of its query's and the request's TF-IDF
    vectors, words weighted by the different queries of the training part; 0 where there is no query, or none like it.
    Flat positions (R,) of targets -> (R, N) float32. Needs scipy.

    Example:
        >>> from types import SimpleNamespace
        >>> from karma_fast.data.schema import Sequences, Split
        >>> sequences = Sequences(np.array(["u", "v"]), np.array([0, 3, 6]), np.array([0, 1, 2, 0, 1, 1], np.int32),
        ...                       queries=np.array([0, 1, 0, 0, 1, 1], np.int32), query_texts=["red shoe", "tea"])
        >>> split = Split(np.array([2, 5]), np.array([]), np.array([2, 5]), "last event is the test")
        >>> data = SimpleNamespace(items=["a", "b", "c"], sequences=sequences, split=split)
        >>> query_knn_scorer(data)(split.test)
        array([[1., 0., 0.],
               [0., 1., 0.]], dtype=float32)
    """
    from scipy import sparse

    sequences, size = dataset.sequences, len(dataset.items)
    trained = np.flatnonzero(np.arange(len(sequences.items)) < np.repeat(dataset.split.train_end,
                                                                         np.diff(sequences.indptr)))
    asked = queries_at(sequences, trained)
    trained, asked = trained[asked >= 0], asked[asked >= 0]
    kept, rows = np.unique(asked, return_inverse=True)
    if not len(kept):
        return lambda positions: np.zeros((len(positions), size), np.float32)
    chosen = sparse.csr_matrix((np.ones(len(rows)), (rows, sequences.items[trained])), shape=(len(kept), size))
    vectors = tf_idf_vectors([sequences.query_texts[i] for i in kept], sequences.query_texts)
    known, vectors = vectors[:len(kept)].T.tocsr(), vectors[len(kept):]

    def score(positions: np.ndarray) -> np.ndarray:
        asked = queries_at(sequences, positions)
        different, of = np.unique(asked, return_inverse=True)
        found = np.zeros((len(different), size), np.float32)
        step = max(1, NEIGHBOURS // len(kept))
        for start in range(0, len(different), step):
            block = different[start:start + step]
            near = vectors[np.maximum(block, 0)] @ known
            near.data **= sharpness
            found[start:start + step] = dense(near @ chosen)
        found[different < 0] = 0
        return (found / np.maximum(found.max(axis=1, keepdims=True), np.float32(1e-9)))[of]

    return score


def queries_at(sequences: Any, positions: np.ndarray) -> np.ndarray:
    """Numbers of the queries at flat positions, -1 for none."""
    return np.full(len(positions), -1) if sequences.queries is None else sequences.queries[positions]


@dataclass
class QueryParts:
    """A score of histories and one of queries, and their sums."""

    dataset: Any
    history: RequestScorer
    query: RequestScorer

    def scores(self, positions: np.ndarray, weights: Sequence[float]) -> Iterator[np.ndarray]:
        """One (R, N) float32 after the other, for each weight of the query's score."""
        history, query = self.history(positions), self.query(positions)
        for weight in weights:
            yield history + np.float32(weight) * query

    def scorer(self, weight: float) -> RequestScorer:
        return lambda positions: next(self.scores(positions, [weight]))


@dataclass(frozen=True)
class TunedQuery:
    """What :func:`tune_query` found. metrics: on the validation requests it looked at. tried: weights compared."""

    scorer: RequestScorer
    weight: float
    metrics: dict[str, float]
    requests: int
    tried: int


def tune_query(dataset: Any, history: RequestScorer, query: RequestScorer, *, mask_seen: bool = True,
               users: int = 2000, seed: int = 0) -> TunedQuery:
    """history + weight * query, with the one of ``QUERY_WEIGHTS`` that has the best NDCG@10 on validation requests.

    Args:
        history, query: flat positions (R,) of targets -> (R, N) float32, such as :func:`mix_scorer` and
            :func:`query_scorer`.
        mask_seen, users, seed: as of :func:`tune_mix`, which looks at the same requests.

    Raises:
        ValueError: the split has no validation request.

    Example:
        >>> from types import SimpleNamespace
        >>> from karma_fast.data.schema import Items, Sequences, Split
        >>> items = Items(ids=np.array(["a", "b", "c"]), texts=["red shoe", "blue shoe", "tea"], titles=[""] * 3)
        >>> sequences = Sequences(np.array(["u"]), np.array([0, 3]), np.array([0, 1, 2], np.int32),
        ...                       queries=np.array([-1, 0, 1], np.int32), query_texts=["blue", "tea"])
        >>> split = Split(np.array([1]), np.array([1]), np.array([2]), "last event is the test")
        >>> data = SimpleNamespace(items=items, sequences=sequences, split=split)
        >>> found = tune_query(data, lambda p: np.tile(np.float32([0, 0, 0.1]), (len(p), 1)), query_scorer(data))
        >>> found.weight, found.metrics["HR@10"], found.scorer(np.array([2])).round(1)
        (0.3, 1.0, array([[0. , 0. , 0.4]], dtype=float32))
    """
    parts, positions = QueryParts(dataset, history, query), validation_requests(dataset, users, seed)
    found = dict(zip(QUERY_WEIGHTS, search_metrics(parts, positions, QUERY_WEIGHTS, mask_seen), strict=True))
    best = max(found, key=lambda weight: found[weight][SEARCH_METRIC])
    return TunedQuery(parts.scorer(best), best, found[best], len(positions), len(found))
