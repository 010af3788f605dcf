"""The rows without our language model: training-free scores, queries matched with texts, ID vectors, SASRec."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from karma_fast.commands.common import draw
from karma_fast.data import Dataset, cache_dir
from karma_fast.data.batches import query_of
from karma_fast.evaluation import Ranks
from karma_fast.recipes.ra_rec.config import RaRecConfig
from karma_fast.recipes.ra_rec.id_models import known_vectors, make_id_model

from .protocol import Requests, gains
from .rows import Row
from .train import Ready, Score

QUERY_WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
TUNED_ON = 2000  # validation requests

Scorer = Callable[[np.ndarray], np.ndarray]  # flat positions (R,) -> (R, N) float32


def make_baseline(row: Row, data: Dataset) -> Ready:
    """A training-free row. The mix is tuned for each rule of masking, on validation requests."""
    facts: dict = {}

    @functools.cache
    def scorer(masked: bool) -> Scorer:
        from karma_fast.baselines import mix_scorer, tune_mix
        from karma_fast.baselines.rows import request_scorer

        if row.name != "mix":
            return request_scorer(data, row.label, mask_seen=masked)
        found = tune_mix(data, mask_seen=masked)
        facts[f"weights, {'masked' if masked else 'unmasked'}"] = dataclasses.asdict(found.weights)
        return mix_scorer(data, found.weights)

    return Ready(score_by(lambda masked, queries: scorer(masked)), facts)


def score_by(scorer_of: Callable[[bool, bool], Scorer]) -> Score:
    """scorer_of: (seen items left out, queries read) -> what ranks."""
    from karma_fast.baselines.rows import rank_requests

    return lambda requests, masked, queries: rank_requests(requests.data, requests.positions,
                                                           scorer_of(masked, queries), mask_seen=masked)


def query_scorer(data: Dataset) -> Scorer:
    """Cosine of the TF-IDF vectors of a request's query and of the items' texts; 0 where there is no query."""
    from scipy import sparse

    from karma_fast.baselines.scorers import tf_idf

    sequences, size = data.sequences, len(data.items)
    places = {"": -1} | {text: n for n, text in enumerate(sequences.query_texts)}
    score = tf_idf(data.items.texts, sequences.query_texts)

    def scorer(positions: np.ndarray) -> np.ndarray:
        asked = np.array([places[query_of(sequences, p)] for p in positions])
        rows = np.flatnonzero(asked >= 0)
        one_hot = sparse.csr_matrix((np.ones(len(rows)), (rows, size + asked[rows])),
                                    shape=(len(positions), size + len(sequences.query_texts)))
        return np.ascontiguousarray(score(one_hot)[:, :size])

    return scorer


def make_query_row(row: Row, data: Dataset) -> Ready:
    """Query TF-IDF alone, or added to the tuned mix with the weight of the best NDCG@10 on validation requests."""
    asked, facts = query_scorer(data), {}

    def nothing(positions: np.ndarray) -> np.ndarray:
        return np.zeros((len(positions), len(data.items)), np.float32)

    if row.name == "query":
        return Ready(score_by(lambda masked, queries: asked if queries else nothing))
    from karma_fast.baselines import mix_scorer, tune_mix
    from karma_fast.baselines.rows import rank_requests

    @functools.cache
    def mix(masked: bool) -> Scorer:
        return mix_scorer(data, tune_mix(data, mask_seen=masked).weights)

    @functools.cache
    def tuned(masked: bool, queries: bool) -> Scorer:
        history = mix(masked)
        if not queries:
            return history
        valid = draw(data.split.valid, TUNED_ON, 0)

        def with_weight(weight: float) -> Scorer:
            return lambda positions: history(positions) + np.float32(weight) * asked(positions)

        found = {}
        for weight in QUERY_WEIGHTS:
            ranks = rank_requests(data, valid, with_weight(weight), mask_seen=masked)
            found[weight] = float(gains(ranks.expected, "NDCG@10").mean())
        best = max(found, key=lambda weight: found[weight])
        facts[f"weight of the query, {'masked' if masked else 'unmasked'}"] = best
        return with_weight(best)

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


def train_sasrec_row(data: Dataset, settings: dict[str, Any], seed: int, folder: Path, end: float) -> Ready | None:
    """SASRec with the data set's ``settings``; it keeps a checkpoint in ``folder`` and goes on from it.

    end: of `time.monotonic`; the first epoch after it ends the sitting, and None is given.
    """
    from karma_fast.baselines import SASRecConfig, train_sasrec

    config = SASRecConfig(**settings)
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
