"""The definition of the loss in plain torch: the whole score matrix, every step differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import compute_dtype, unit_rows


def nll_rows(logits: Tensor, positive: Tensor, dropped: Tensor | None) -> Tensor:
    """(R, C) logits, (R,) positive columns, (R, C) columns to leave out -> (R,) ``-log softmax`` at the positive.

    Taken relative to the positive, so that a loss of 1e-30 is not rounded to 0 and gradients keep their digits where
    the probability of the positive is near 1.
    """
    column = positive.unsqueeze(1)
    above = (logits - logits.gather(1, column)).scatter(1, column, -torch.inf)
    if dropped is not None:
        above = above.masked_fill(dropped, -torch.inf)
    top = above.detach().amax(dim=1).clamp_min(0)
    others = (above - top.unsqueeze(1)).exp().sum(dim=1)
    return top + torch.log1p(others + torch.expm1(-top))


def same_ids(a: Tensor, b: Tensor) -> Tensor:
    """(R,) and (C,) ids, or (R, 2) and (C, 2) of two kinds -> (R, C), whether those of any kind are equal."""
    if a.ndim == 1:
        return a.unsqueeze(1) == b
    return (a.unsqueeze(1) == b).any(dim=2)


def info_nce_rows(query: Tensor, key: Tensor, labels: Tensor, scale: Tensor, query_ids: Tensor | None,
                  key_ids: Tensor | None, log_q: Tensor | None, symmetric: bool, normalize: bool) -> Tensor:
    """Checked inputs -> (B,) losses, float64 for float64 inputs and float32 otherwise."""
    dtype = compute_dtype(query.dtype)
    inputs = [x for x in (query, key, scale, log_q) if x is not None]
    bad = (labels < 0) | (labels >= key.shape[0])
    if symmetric and labels.numel():
        bad = bad.any() | (labels.sort().values.diff() == 0).any()
    fine = torch.stack([torch.isfinite(x.detach()).all() for x in inputs]).all() & ~bad.any()
    labels = labels.clamp(0, max(key.shape[0] - 1, 0))

    query, key, scale = query.to(dtype), key.to(dtype), scale.to(dtype)
    if normalize:
        query, key = unit_rows(query), unit_rows(key)
    scores = scale * (query @ key.T)  # (B, N)
    logits = scores if log_q is None else scores - log_q.to(dtype)
    if query.shape[0] == 0:
        return logits.sum(dim=1)  # no rows, still connected to every input

    if key_ids is not None and query_ids is None:
        query_ids = key_ids[labels]
    dropped = None if key_ids is None else same_ids(query_ids, key_ids)  # (B, N); nll_rows keeps the positive
    rows = nll_rows(logits, labels, dropped)
    if symmetric:
        itself = torch.arange(query.shape[0], device=query.device)
        dropped = None if key_ids is None else same_ids(key_ids[labels], query_ids)  # (B, B)
        rows = (rows + nll_rows(scores[:, labels].T, itself, dropped)) / 2
    # a score of -inf would quietly drop a key: whatever is not finite must show, in the loss and in every gradient
    return rows * torch.where(fine, 1.0, torch.nan).to(dtype)
