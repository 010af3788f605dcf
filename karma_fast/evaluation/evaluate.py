"""A model's metrics over the full catalogue, with the protocol they were made under."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..data.batches import request
from ..data.schema import Dataset
from .held_out import held_out_ranks, ranking_rule
from .metrics import ranking_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.karma import KarmaModel

KS = (1, 5, 10, 50, 200)


def encode_requests(model: KarmaModel, data: Dataset, positions: np.ndarray, progress: bool = False) -> Tensor:
    """(T, d_e) float32: interest embeddings of the requests whose targets stand at flat ``positions``."""
    requests = [request(data.sequences, p, model.config.max_history) for p in positions]
    return model.encode_users([h for h, _ in requests], [q for _, q in requests], progress=progress)


def evaluate_model(model: KarmaModel, data: Dataset, positions: np.ndarray, ks: Sequence[int] = KS, *,
                   mask_seen: bool = True, users: Tensor | None = None, progress: bool = False) -> dict[str, float]:
    """`ranking_metrics` of the requests whose targets stand at flat ``positions``.

    Args:
        mask_seen: leave out what the user chose before the target; see `held_out_ranks`. users: their embeddings, if
            already made.
    """
    positions = np.asarray(positions, dtype=np.int64)
    users = encode_requests(model, data, positions, progress) if users is None else users
    ranks = held_out_ranks(data.sequences, positions, users, model.encode_items(), mask_seen=mask_seen,
                           progress=progress)
    return ranking_metrics(ranks, ks, num_items=len(data.items))


def protocol(data: Dataset, positions: np.ndarray, max_history: int, mask_seen: bool = True,
             drawn_from: int = 0, baselines: bool = True) -> str:
    """One line to print beside every number.

    drawn_from: see `ranking_rule`. baselines: whether the table has rows of them.
    """
    queries = ""
    if data.sequences.has_queries(positions):
        others = " and, of the baselines, by query TF-IDF and query kNN alone" if baselines else ""
        queries = f"; queries are read by the model{others}"
    rule = ranking_rule(data, positions, mask_seen, drawn_from)
    return (f"{rule}, the model reads the last {max_history} items{queries}; "
            f"{data.split.description}")
