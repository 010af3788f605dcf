"""The loss and its gradients in float64, piece by piece, and how far an implementation is from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Inputs

PIECE_BYTES = 256 << 20
ALL_BELOW = 1e13  # operations (10 B N D); above, gradients are compared on a sample of rows and keys
SAMPLE = 4096
# What a right implementation may be off by (relative, see errors()): float32 leaves room for TF32 products, which some
# libraries always use; half precision for scores that were rounded to it and for gradients that were summed in it.
LIMITS = {torch.float32: {"loss": 1e-3, "query": 2e-3, "key": 2e-3},
          torch.float16: {"loss": 1e-2, "query": 5e-2, "key": 5e-2},
          torch.bfloat16: {"loss": 2e-2, "query": 1e-1, "key": 1e-1}}


@dataclass
class Exact:
    loss: float
    rows: Tensor  # of the queries whose gradient is known
    query: Tensor  # (rows, D) float64
    keys: Tensor
    key: Tensor  # (keys, D) float64


def exact(inputs: Inputs, sample: int | None = None) -> Exact:
    """Mean loss over all rows, always; gradients of all rows and keys, or of ``sample`` evenly spaced of each.

    The gradient of a row needs the log-sum-exp of that row alone and the gradient of a key those of all rows, so the
    sampled gradients are exact too: the log-sum-exps are taken over everything.
    """
    query, key = inputs.query.detach().double(), inputs.key.detach().double()
    (count, width), keys = query.shape, key.shape[0]
    if sample is None and 10 * count * keys * width > ALL_BELOW:
        sample = SAMPLE
    everything = torch.arange(keys, device=query.device)
    bias = query.new_zeros(keys) if inputs.log_q is None else inputs.log_q.double()
    positive = inputs.scale * (query * key[:count]).sum(1)
    step = max(1, PIECE_BYTES // (8 * keys))

    def scores(rows: Tensor, columns: Tensor) -> Tensor:
        """(rows, columns) s q.k, -inf where the key is left out."""
        out = inputs.scale * (query[rows] @ key[columns].T)
        if inputs.key_ids is not None:
            same = inputs.key_ids[rows].unsqueeze(1) == inputs.key_ids[columns]
            out.masked_fill_(same & (rows.unsqueeze(1) != columns), -torch.inf)
        return out

    row_lse = query.new_empty(count)
    column_lse = query.new_full((count,), -torch.inf)
    for rows in everything[:count].split(step):
        s = scores(rows, everything)
        row_lse[rows] = (s - bias).logsumexp(1)
        if inputs.symmetric:
            column_lse = torch.logaddexp(column_lse, s[:, :count].logsumexp(0))
    losses = row_lse - (positive - bias[:count])
    if inputs.symmetric:
        losses = (losses + column_lse - positive) / 2

    def coefficients(rows: Tensor, columns: Tensor) -> Tensor:
        """d mean loss / d s q.k of a block."""
        s = scores(rows, columns)
        out = (s - bias[columns] - row_lse[rows].unsqueeze(1)).exp()
        if inputs.symmetric:
            pairs = columns < count
            out[:, pairs] += (s[:, pairs] - column_lse[columns[pairs]]).exp()
        out -= (2 if inputs.symmetric else 1) * (rows.unsqueeze(1) == columns).double()
        return out / (count * (2 if inputs.symmetric else 1))

    some_rows, some_keys = spread(count, sample, query.device), spread(keys, sample, query.device)
    query_grad = torch.cat([coefficients(rows, everything) @ key for rows in some_rows.split(step)])
    key_grad = torch.zeros_like(key[some_keys])
    for rows in everything[:count].split(max(1, PIECE_BYTES // (8 * len(some_keys)))):
        key_grad.addmm_(coefficients(rows, some_keys).T, query[rows])
    return Exact(losses.mean().item(), some_rows, query_grad.mul_(inputs.scale), some_keys,
                 key_grad.mul_(inputs.scale))


def spread(size: int, sample: int | None, device: torch.device) -> Tensor:
    """All of ``arange(size)``, or ``sample`` of it at even distances."""
    if sample is None or sample >= size:
        return torch.arange(size, device=device)
    return torch.linspace(0, size - 1, sample, dtype=torch.double, device=device).long()


def distance(got: Tensor, true: Tensor) -> float:
    """|got - true| / |true|, Frobenius norm."""
    return ((got.double() - true).norm() / true.norm()).item()


def errors(loss: Tensor, inputs: Inputs, truth: Exact) -> dict[str, float]:
    """Relative errors of the loss and of the gradients that a backward left in the inputs."""
    return {"loss": abs(loss.item() - truth.loss) / abs(truth.loss),
            "query": distance(inputs.query.grad[truth.rows], truth.query),
            "key": distance(inputs.key.grad[truth.keys], truth.key)}


def too_far(found: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether an error is above its limit, or not a number."""
    return not all(found[name] <= limit for name, limit in LIMITS[dtype].items())
