"""Ranking metrics from exact counts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from .ranks import Ranks

TIE_SHARE_LIMIT = 0.1


def ranking_metrics(ranks: Ranks, ks: Sequence[int] = (1, 5, 10, 50, 200), *, num_items: int | None = None) \
        -> dict[str, float]:
    """Means over the queries, on the full catalogue.

    With r the expected rank of the target from 0 (``greater + ties / 2``):

    =============  ====================================================================================================
    HR@K           share of queries with r < K
    NDCG@K         ``1 / log2(r + 2)`` where r < K, else 0; for several targets their sum by that of an ideal ranking
    MRR            ``1 / (r + 1)`` of the best target
    AUC            share of (target, other candidate) pairs in the right order, a tie being half right
    recall@K       only with several targets: share of the query's targets with r < K
    tie_share      share of queries whose target ties with another candidate
    =============  ====================================================================================================

    Ranks that were counted with ``largest_k`` have no MRR, AUC and tie_share.

    Targets of one query that tie with each other take places one after another, so no two share a place.

    Args:
        ranks: from :func:`target_ranks` or :func:`rank_scores`.
        ks: cut-offs.
        num_items: size of the catalogue, only to check that the ranks can belong to it.

    Warns:
        UserWarning: if ``tie_share`` is above 0.1, as for embeddings that have collapsed to one point.

    Raises:
        ValueError: no queries, cut-offs below 1, more candidates than items.

    Example:
        >>> ranks = Ranks(np.array([0, 3]), np.array([0, 0]), np.array([11, 11]))
        >>> {name: round(value, 4) for name, value in ranking_metrics(ranks, (1, 5)).items()}
        {'HR@1': 0.5, 'HR@5': 1.0, 'NDCG@1': 0.5, 'NDCG@5': 0.7153, 'MRR': 0.625, 'AUC': 0.85, 'tie_share': 0.0}
    """
    if len(ranks) == 0:
        raise ValueError("ranks: no queries, so there is no mean; evaluate at least one")
    ks = [int(k) for k in ks]
    if any(k < 1 for k in ks):
        raise ValueError(f"ks: got {ks}; whole numbers >= 1 are needed")
    if ranks.largest_k is not None and max(ks, default=0) > ranks.largest_k:
        raise ValueError(f"ks: got {ks}, but ranks were counted with largest_k={ranks.largest_k}, which is exact for "
                         f"cut-offs up to {ranks.largest_k}; rank again with a larger one")
    if num_items is not None and ranks.candidates.max() > num_items:
        raise ValueError(f"num_items: got {num_items}, but {ranks.candidates.max()} items were ranked")

    indptr = np.arange(len(ranks) + 1) if ranks.indptr is None else ranks.indptr
    starts, count = indptr[:-1], np.diff(indptr)  # targets of query i: starts[i] up to starts[i] + count[i]
    query = np.repeat(np.arange(len(ranks)), count)
    place, nth = _places(ranks, query, starts)
    if ranks.largest_k is not None:
        place[ranks.greater >= ranks.largest_k] = np.inf
    gain = 1 / np.log2(place + 2)
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(count.max()) + 2))])

    def per_query(values: np.ndarray) -> np.ndarray:
        return np.bincount(query, weights=values, minlength=len(ranks))

    out = {f"HR@{k}": float((np.minimum.reduceat(place, starts) < k).mean()) for k in ks}
    out |= {f"NDCG@{k}": float((per_query(gain * (place < k)) / ideal[np.minimum(count, k)]).mean()) for k in ks}
    if ranks.indptr is not None and count.max() > 1:
        out |= {f"recall@{k}": float((per_query(place < k) / count).mean()) for k in ks}
    if ranks.largest_k is not None:
        return out
    out["MRR"] = float((1 / (np.minimum.reduceat(place, starts) + 1)).mean())
    negatives = ranks.candidates[starts] - count
    wrong = per_query(place - nth)  # the nth target from the top has nth targets above it, the rest is wrong
    useful = negatives > 0
    out["AUC"] = float((1 - wrong[useful] / (negatives * count)[useful]).mean()) if useful.any() else float("nan")
    out["tie_share"] = float((np.maximum.reduceat(ranks.ties, starts) > 0).mean())
    if out["tie_share"] > TIE_SHARE_LIMIT:
        warnings.warn(f"{out['tie_share']:.0%} of the queries have a target with exactly the score of another "
                      "candidate (each counts as half a rank): the embeddings may have collapsed, or the catalogue "
                      "holds copies of items", stacklevel=2)
    return out


def _places(ranks: Ranks, query: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T,) expected place of each target, own targets that tie being one after another; (T,) its number among them."""
    if ranks.indptr is None:
        return ranks.expected, np.zeros(len(query), np.int64)
    order = np.lexsort((ranks.greater, query))
    nth = np.empty(len(query), np.int64)
    nth[order] = np.arange(len(query)) - starts[query[order]]
    # within a query, the same `greater` means the same score
    group = np.unique(np.stack([query, ranks.greater], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    size = np.bincount(group)[group]
    first = np.full(group.max() + 1, len(query))
    np.minimum.at(first, group, nth)
    return ranks.greater + (ranks.ties - (size - 1)) / 2 + (nth - first[group]), nth
