"""How many directions a set of embeddings uses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .entries import entry

ROWS = 20_000  # of a larger set so many rows, drawn by a seed, are looked at


def embedding_statistics(x: Tensor, seed: int = 0) -> dict[str, dict[str, Any]]:
    """effective_rank, effective_rank_centred, mean_cosine and first_component of (n, d) embeddings, as entries.

    Computed in float64. Rows of length 0 do not count for the cosine.

    >>> found = embedding_statistics(torch.eye(4))
    >>> round(found["effective_rank"]["value"], 6), found["mean_cosine"]["value"]
    (4.0, 0.0)
    """
    if len(x) > ROWS:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:ROWS]]
    x = x.double().cpu()
    n, limit = len(x), min(x.shape)
    centred = x - x.mean(dim=0) if n else x
    spread = squared_singular_values(centred)
    # the rows' own rounding is no spread
    if spread.sum() <= 1e-12 * x.square().sum():
        spread = torch.zeros_like(spread)
    same = "all rows are equal" if n > 1 else "needs two rows"
    return {"effective_rank": entry("effective_rank", effective_rank(squared_singular_values(x)), n,
                                    "all rows are zero" if n else "no rows", at_most=limit),
            "effective_rank_centred": entry("effective_rank_centred", effective_rank(spread), n, same,
                                            at_most=max(min(n - 1, x.shape[1]), 0)),
            "mean_cosine": entry("mean_cosine", mean_cosine(x), n, "needs two rows that are not zero"),
            "first_component": entry("first_component", largest_share(spread), n, same)}


def squared_singular_values(x: Tensor) -> Tensor:
    """(n, d) float64 -> (min(n, d),), from the smaller of the two Gram matrices; rounding is cut to 0."""
    if 0 in x.shape:
        return x.new_zeros(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    return torch.where(values > values.max() * len(values) * torch.finfo(torch.float64).eps, values, 0.0)


def effective_rank(squared: Tensor) -> float:
    """Squared singular values -> exp of the entropy of the singular values' shares; NaN if all are 0.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".

    >>> round(effective_rank(torch.tensor([9.0, 9.0, 9.0])), 6), effective_rank(torch.tensor([4.0, 0.0]))
    (3.0, 1.0)
    """
    values = squared.double().sqrt()
    if not len(values) or values.sum() == 0:
        return math.nan
    return float(torch.special.entr(values / values.sum()).sum().exp())


def largest_share(values: Tensor) -> float:
    """NaN if there is nothing to share."""
    return float(values.max() / values.sum()) if len(values) else math.nan


def mean_cosine(x: Tensor) -> float:
    """Mean cosine of the pairs of different rows, exactly, from the length of the sum of the unit rows.

    >>> mean_cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]]).double())
    -0.3333333333333333
    """
    norms = x.norm(dim=1)
    unit = x[norms > 0] / norms[norms > 0, None]
    n = len(unit)
    return float((unit.sum(dim=0).square().sum() - n) / (n * (n - 1))) if n > 1 else math.nan
