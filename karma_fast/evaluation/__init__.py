"""Exact ranking over the whole catalogue, its metrics, and reports."""

from .catalogue import Catalogue, paths
from .csr import csr_from_lists, seen_before
from .held_out import held_out_ranks
from .metrics import ranking_metrics
from .ranks import Ranks, rank_scores, target_ranks, top_k

__all__ = ["Catalogue", "Ranks", "csr_from_lists", "held_out_ranks", "paths", "rank_scores", "ranking_metrics",
           "seen_before", "target_ranks", "top_k"]
