"""The rows without our language model: training-free scores, queries matched with texts, SASRec."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from karma_fast.data import Dataset
from karma_fast.data.batches import query_of
from karma_fast.evaluation import Ranks, rank_scores, seen_before
from karma_fast.evaluation.csr import csr_rows

from .protocol import Requests, gains
from .rows import Row
from .train import Ready

BLOCK_BYTES = 64 << 20  # of float32 scores at a time
QUERY_WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
TUNED_ON = 2000  # validation requests

Scorer = Callable[[np.ndarray], np.ndarray]  # flat positions (R,) -> (R, N) float32


def ranks_of(requests: Requests, scorer: Scorer, masked: bool) -> Ranks:
    """Some requests at a time."""
    data, parts = requests.data, []
    seen, targets = seen_before(data.sequences, requests.positions), requests.targets
    size = max(1, BLOCK_BYTES // (4 * len(data.items)))
    for start in range(0, len(targets), size):
        part, left_out = slice(start, start + size), csr_rows(seen, start, start + size) if masked else None
        parts.append(rank_scores(scorer(requests.positions[part]), targets[part], left_out))
    return Ranks.concat(parts)


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

    return Ready(lambda requests, masked, queries: ranks_of(requests, scorer(masked), masked), facts)


def query_scorer(data: Dataset) -> Scorer:
    """Cosine of the TF-IDF vectors of a request's query and of the items' texts; 0 where there is no query."""
    from scipy import sparse

    from karma_fast.baselines.scorers import tf_idf

    sequences, size = data.sequences, len(data.items)
    places = {"": -1} | {text: n for n, text in enumerate(sequences.query_texts)}
    # queries stand behind the items as texts of their own
    score = tf_idf([*data.items.texts, *sequences.query_texts])

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
        return Ready(lambda requests, masked, queries: ranks_of(requests, asked if queries else nothing, masked))
    from karma_fast.baselines import mix_scorer, tune_mix

    @functools.cache
    def tuned(masked: bool, queries: bool) -> Scorer:
        history = mix_scorer(data, tune_mix(data, mask_seen=masked).weights)
        if not queries:
            return history
        valid = np.sort(np.random.default_rng(0).permutation(data.split.valid)[:TUNED_ON])
        requests = Requests(data, valid, {})

        def with_weight(weight: float) -> Scorer:
            return lambda positions: history(positions) + np.float32(weight) * asked(positions)

        found = {weight: float(gains(ranks_of(requests, with_weight(weight), masked).expected, "NDCG@10").mean())
                 for weight in QUERY_WEIGHTS}
        best = max(found, key=lambda weight: found[weight])
        facts[f"weight of the query, {'masked' if masked else 'unmasked'}"] = best
        return with_weight(best)

    return Ready(lambda requests, masked, queries: ranks_of(requests, tuned(masked, queries), masked), facts)


def train_sasrec_row(data: Dataset, seed: int, folder: Path) -> Ready:
    """SASRec with its own settings; it keeps a checkpoint in ``folder`` and goes on from it."""
    from karma_fast.baselines import SASRecConfig, train_sasrec

    config = SASRecConfig()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    model = train_sasrec(data, config, seed=seed, folder=folder)
    items, known = model.item_vectors(), {}

    def score(requests: Requests, masked: bool, queries: bool) -> Ranks:
        if not known:
            with torch.no_grad():
                known["u"] = model.user_vectors(requests.read(config.max_history)[0])
        return requests.rank(known["u"], items, masked)

    facts = {"train_seconds": model.facts.get("seconds", time.perf_counter() - start), "settings": config.to_dict()}
    return Ready(score, facts | {name: model.facts[name] for name in ("epochs", "best_epoch") if name in model.facts})
