"""Recommenders to stand beside a model: training-free scorers, a tuned mix of them, and SASRec.

Whatever is fitted, counts or weights, is fitted to the training part of each user's events, as a model's weights are.
"""

from .mix import MixWeights, TunedMix, mix_scorer, tune_mix
from .query import TunedQuery, query_knn_scorer, query_scorer, tune_query
from .rows import BASELINES, baseline_rows, score_row
from .sasrec import SASRec, SASRecConfig
from .sasrec_training import train_sasrec

__all__ = ["BASELINES", "MixWeights", "SASRec", "SASRecConfig", "TunedMix", "TunedQuery", "baseline_rows",
           "mix_scorer", "query_knn_scorer", "query_scorer", "score_row", "train_sasrec", "tune_mix", "tune_query"]
