"""Counts in float64 for a sample of queries, and what an implementation found compared with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from karma_fast.evaluation import Ranks
from karma_fast.evaluation.scores import error_bound, pair_scores

from ..exact import spread
from .cases import KS, Inputs

SAMPLE = 64
PANEL = 16384  # items at a time


@dataclass
class Found:
    """What every implementation gives, and those that count besides."""

    hits: np.ndarray  # (Q, len(KS)) bool: target among the first K
    ranks: Ranks | None = None
    largest_k: int | None = None  # counts of this and more may be any number from it on


@dataclass
class Exact:
    """Of S sampled queries, without the items left out."""

    rows: np.ndarray  # (S,)
    greater: np.ndarray  # (S,) items with a higher score, as the score is defined
    ties: np.ndarray  # (S,)
    above: np.ndarray  # (S,) items above the target in whatever order float32 products are summed
    near: np.ndarray  # (S,) items that may be on either side then


def exact(inputs: Inputs, sample: int = SAMPLE) -> Exact:
    """Products in float64; where rounding to float32 could change the order, the defined score decides for ``greater``
    and ``ties``, and the item counts as ``near``."""
    device = inputs.items.device
    rows = spread(len(inputs.queries), sample, torch.device("cpu"))
    queries, targets = inputs.queries[rows.to(device)], inputs.targets[rows.to(device)]
    array, wide = as_array(queries), queries.double()
    # the bound hangs on the longest item alone
    bound = torch.from_numpy(error_bound(array, as_array(inputs.items[longest_row(inputs.items)][None]))).to(device)
    bound = bound[:, None]
    middle = (wide * inputs.items[targets].double()).sum(1, keepdim=True)
    each = np.arange(len(rows))
    own = pair_scores(array, as_array(inputs.items[targets]), each, each)
    goal = torch.from_numpy(own.astype(np.float64)).to(device)[:, None]
    indptr, seen = inputs.seen
    left_out = [torch.from_numpy(np.append(seen[indptr[r]:indptr[r + 1]], t)).to(device)
                for r, t in zip(rows.tolist(), targets.tolist(), strict=True)]
    greater, ties, above, near = np.zeros((4, len(rows)), np.int64)
    for begin in range(0, len(inputs.items), PANEL):
        scores = wide @ inputs.items[begin:begin + PANEL].double().T
        for row, items in enumerate(left_out):
            here = items[(items >= begin) & (items < begin + PANEL)] - begin
            scores[row, here] = torch.nan  # neither above nor near
        above += (scores > middle + 2 * bound).sum(1).cpu().numpy()
        near += ((scores - middle).abs() <= 2 * bound).sum(1).cpu().numpy()
        greater += (scores > goal + bound).sum(1).cpu().numpy()
        row, item = ((scores - goal).abs() <= bound).nonzero(as_tuple=True)
        close, row = as_array(inputs.items[item + begin]), row.cpu().numpy()
        score = pair_scores(array, close, row, np.arange(len(row)))
        greater += np.bincount(row[score > own[row]], minlength=len(rows))
        ties += np.bincount(row[score == own[row]], minlength=len(rows))
    return Exact(rows.numpy(), greater, ties, above, near)


def as_array(x: Tensor) -> np.ndarray:
    return x.float().cpu().numpy()


def longest_row(x: Tensor) -> int:
    return int(torch.cat([part.double().norm(dim=1) for part in x.split(PANEL)]).argmax())


def compare(found: Found, truth: Exact) -> dict:
    """``hits_differ``: for each K, among the ``hits_sure`` queries where rounding cannot decide, how many have the
    wrong answer. ``ranks_differ``: how many counts are not exactly those of the definition; None without counts."""
    ks = np.array(KS)
    hit, miss = (truth.above + truth.near)[:, None] < ks, truth.above[:, None] >= ks
    sure = hit | miss
    differ = sure & (found.hits[truth.rows] != hit)
    ranks_differ = None
    if found.ranks is not None:
        greater, ties = found.ranks.greater[truth.rows], found.ranks.ties[truth.rows]
        same = (greater == truth.greater) & (ties == truth.ties)
        if found.largest_k is not None:
            same |= (greater >= found.largest_k) & (truth.greater >= found.largest_k)
        ranks_differ = int((~same).sum())
    return {"hits_differ": by_k(differ.sum(0)), "hits_sure": by_k(sure.sum(0)), "ranks_differ": ranks_differ}


def is_wrong(errors: dict) -> bool:
    return bool(errors["ranks_differ"]) or any(errors["hits_differ"].values())


def by_k(values: np.ndarray) -> dict[str, float]:
    """One value for each cut-off, as JSON has them."""
    return {str(k): value for k, value in zip(KS, np.asarray(values).tolist(), strict=True)}
