"""The rows without our language model: training-free scores, queries matched with texts, ID vectors, SASRec."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from karma_fast.baselines import (
    SASRecConfig,
    mix_scorer,
    query_knn_scorer,
    query_scorer,
    train_sasrec,
    tune_mix,
    tune_query,
)
from karma_fast.baselines.rows import rank_requests, request_scorer
from karma_fast.baselines.scorers import RequestScorer
from karma_fast.data import Dataset, cache_dir
from karma_fast.evaluation import Ranks
from karma_fast.recipes.ra_rec.config import RaRecConfig
from karma_fast.recipes.ra_rec.id_models import known_vectors, make_id_model

from .protocol import Requests
from .rows import Row
from .train import Ready, Score


def make_baseline(row: Row, data: Dataset) -> Ready:
    """A training-free row. The mix is tuned for each rule of masking, on validation requests."""
    facts: dict = {}

    @functools.cache
    def scorer(masked: bool) -> RequestScorer:
        if row.name != "mix":
            return request_scorer(data, row.label, mask_seen=masked)
        found = tune_mix(data, mask_seen=masked)
        facts[f"weights, {'masked' if masked else 'unmasked'}"] = dataclasses.asdict(found.weights)
        return mix_scorer(data, found.weights)

    return Ready(score_by(lambda masked, queries: scorer(masked)), facts)


def score_by(scorer_of: Callable[[bool, bool], RequestScorer]) -> Score:
    """scorer_of: (seen items left out, queries read) -> what ranks."""
    return lambda requests, masked, queries: rank_requests(requests.data, requests.positions,
                                                           scorer_of(masked, queries), mask_seen=masked)


def make_query_row(row: Row, data: Dataset) -> Ready:
    """What reads queries alone, or beside the tuned mix with weights of the best NDCG@10 on validation requests."""
    facts: dict[str, float] = {}

    def nothing(positions: np.ndarray) -> np.ndarray:
        return np.zeros((len(positions), len(data.items)), np.float32)

    if row.name in ("query", "query-knn"):
        asked = query_scorer(data) if row.name == "query" else query_knn_scorer(data)
        return Ready(score_by(lambda masked, queries: asked if queries else nothing))
    added = {"query": query_scorer(data)}
    if row.name == "query-knn-mix":
        added["query kNN"] = query_knn_scorer(data)

    @functools.cache
    def mix(masked: bool) -> RequestScorer:
        return mix_scorer(data, tune_mix(data, mask_seen=masked).weights)

    @functools.cache
    def tuned(masked: bool, queries: bool) -> RequestScorer:
        scorer = mix(masked)
        for name, asked in added.items() if queries else ():
            found = tune_query(data, scorer, asked, mask_seen=masked)
            facts[f"weight of the {name}, {'masked' if masked else 'unmasked'}"] = found.weight
            scorer = found.scorer
        return scorer

    return Ready(score_by(tuned), facts)


def make_id_row(config: RaRecConfig, data: Dataset) -> Ready:
    """Cosine of the ID vectors that RA-Rec injects for a request and for an item; 0 where one has none."""
    id_model = make_id_model(config, data.items, data.sequences, data.split, 0, cache_dir())

    def unit(vectors: Tensor) -> Tensor:
        return F.normalize(vectors.nan_to_num(), dim=-1)

    def score(requests: Requests, masked: bool, queries: bool) -> Ranks:
        users = id_model.user_vectors(requests.read(config.max_history)[0])
        return requests.rank(unit(users), unit(known_vectors(id_model, data.sequences, data.split)), masked)

    return Ready(score, {"id_model": config.id_model})


def train_sasrec_row(data: Dataset, config: SASRecConfig, seed: int, folder: Path, end: float) -> Ready | None:
    """SASRec; it keeps a checkpoint in ``folder`` and goes on from it.

    end: of `time.monotonic`; the first epoch after it ends the sitting, and None is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = train_sasrec(data, config, seed=seed, folder=folder, go_on=lambda epoch: time.monotonic() < end)
    if not model.facts["done"]:
        return None
    items, known = model.item_vectors(), {}

    def score(requests: Requests, masked: bool, queries: bool) -> Ranks:
        if not known:
            with torch.no_grad():
                known["u"] = model.user_vectors(requests.read(config.max_history)[0])
        return requests.rank(known["u"], items, masked)

    facts = {"train_seconds": model.facts["seconds"], "settings": config.to_dict()}
    return Ready(score, facts | {name: model.facts[name] for name in ("epochs", "best_epoch")})
