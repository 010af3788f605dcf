"""Exact ranking over the whole catalogue, its metrics, and baselines."""

from .csr import csr_from_lists, seen_before
from .metrics import ranking_metrics
from .ranks import Ranks, rank_scores, target_ranks, top_k

__all__ = ["Ranks", "csr_from_lists", "rank_scores", "ranking_metrics", "seen_before", "target_ranks", "top_k"]
