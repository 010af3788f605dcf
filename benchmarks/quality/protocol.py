"""The requests that every row is ranked on, the parts of them that are told apart, and the metrics of ranks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from karma_fast.data import Dataset
from karma_fast.data.batches import request
from karma_fast.evaluation import Ranks, held_out_ranks, ranking_metrics

from .settings import DataSet

KS = (10, 50, 200)
RARE = 5  # training events of a target up to which it counts as cold
LATEST = 10  # events that the shortcuts, and so row no-llm, read
HISTORY_ONLY = ", history only"


@dataclass
class Requests:
    """positions: (T,) flat positions of targets. parts: name -> (T,) bool, the first of all requests."""

    data: Dataset
    positions: np.ndarray
    parts: dict[str, np.ndarray]

    @property
    def targets(self) -> np.ndarray:
        return self.data.sequences.items[self.positions].astype(np.int64)

    def sizes(self) -> dict[str, int]:
        return {name: int(keep.sum()) for name, keep in self.parts.items()}

    def read(self, max_history: int, queries: bool = True) -> tuple[list[np.ndarray], list[str]]:
        """Histories and queries."""
        found = [request(self.data.sequences, p, max_history) for p in self.positions]
        return [h for h, _ in found], [q if queries else "" for _, q in found]

    def rank(self, users: Tensor, items: Tensor, masked: bool) -> Ranks:
        """(T, d) users against (N, d) items."""
        return held_out_ranks(self.data.sequences, self.positions, users, items, mask_seen=masked)

    def metrics(self, ranks: Ranks) -> dict[str, dict[str, float]]:
        """part -> metric -> value; parts without a request are left out."""
        out = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # counts and titles tie by nature; tie_share stands in the row
            for name, keep in self.parts.items():
                if keep.any():
                    part = Ranks(ranks.greater[keep], ranks.ties[keep], ranks.candidates[keep])
                    found = ranking_metrics(part, KS, num_items=len(self.data.items))
                    out[name] = {key: value for key, value in found.items() if np.isfinite(value)}
        return out


def make_requests(data: Dataset, spec: DataSet, on: str) -> Requests:
    """All of ``on``, "test" or "valid"."""
    positions = np.sort(getattr(data.split, on))
    if not len(positions):
        raise ValueError(f"the data has no request for {on}")
    sequences = data.sequences
    past = positions - sequences.indptr[sequences.user_of(positions)]
    counts = data.split.training_counts(sequences, len(data.items))[sequences.items[positions]]
    parts = {"all": np.ones(len(positions), dtype=bool),
             f"history of at most {spec.short_history}": past <= spec.short_history,
             f"history of more than {LATEST}": past > LATEST,
             f"target with at most {RARE} training events": counts <= RARE,
             "target without a training event": counts == 0}
    return Requests(data, positions, parts)


def variants(with_queries: bool) -> list[tuple[str, bool, bool]]:
    """(name, whether seen items are left out, whether queries are read)."""
    found = [("masked", True, True), ("unmasked", False, True)]
    return found + ([(name + HISTORY_ONLY, masked, False) for name, masked, _ in found] if with_queries else [])


def gains(expected: np.ndarray, metric: str) -> np.ndarray:
    """(T,) expected ranks from 0 -> (T,) what each request adds to a metric's mean.

    >>> gains(np.array([0.0, 9.5, 10.0]), "HR@10").tolist(), gains(np.array([1.0]), "MRR").tolist()
    ([1.0, 1.0, 0.0], [0.5])
    """
    if metric == "MRR":
        return 1 / (expected + 1)
    kind, _, k = metric.partition("@")
    hit = expected < int(k)
    return hit.astype(float) if kind == "HR" else np.where(hit, 1 / np.log2(expected + 2), 0.0)
