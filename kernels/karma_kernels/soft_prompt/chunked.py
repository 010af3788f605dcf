"""The projection and its insertion some rows at a time in plain torch, on any device, in a bounded workspace."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ..info_nce.problem import pieces
from ..numerics import compute_dtype
from . import problem
from .problem import Gradients, Problem, by_row


def forward(x: Problem) -> tuple[Tensor, Tensor]:
    """(N, hidden), and the (R, mid) numbers before GELU, which :func:`backward` needs."""
    is_text = x.slots == -1
    out = F.embedding(torch.where(is_text, x.token_ids, 0).clamp(0, x.table.shape[0] - 1), x.table)
    before = x.vectors.new_empty((x.vectors.shape[0], x.w2.shape[1]), dtype=x.dtype)
    for r in x.rows():
        before[r] = x.before_gelu(r)
        z = x.project(x.after_gelu(before[r]))
        inverse, norm = split_norm(z)
        place(out, x.slots - r.start * x.num_tokens, z.mul_(inverse).mul_(x.token_norm / norm).to(out.dtype))
    if x.learned is not None:
        place(out, -2 - x.slots, x.learned.to(out.dtype))
    real = (x.slots < x.num_soft) & (x.slots >= -1 - x.num_learned)
    real &= ~is_text | ((x.token_ids >= 0) & (x.token_ids < x.table.shape[0]))
    return out.masked_fill_(~real.unsqueeze(1), torch.nan), before


def split_norm(z: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 1) numbers i and m with ``z i / m`` of length 1, neither too large nor too small; for z = 0, 0 and 1."""
    largest = torch.maximum(z.amax(dim=1, keepdim=True), -z.amin(dim=1, keepdim=True))
    # the inverse of a number in this range is a normal one, and squares of what it leaves are in range
    limit = 2.0**100 if z.dtype == torch.float32 else 2.0**1000
    inverse = largest.clamp(1 / limit, limit).reciprocal_()
    norm = torch.linalg.vector_norm(z * inverse, dim=1, keepdim=True)
    norm.masked_fill_(norm == torch.inf, torch.nan)  # one infinite number makes the whole row NaN
    return inverse.masked_fill_(largest == 0, 0), norm.masked_fill_(largest == 0, 1)


def place(out: Tensor, rows: Tensor, values: Tensor) -> None:
    """``out[p] = values[rows[p]]`` where there is such a row."""
    count, size = len(values), max(1, problem.WORKSPACE_BYTES // 4 // (out.shape[1] * out.itemsize))
    for p in pieces(0, len(out) if count else 0, size):
        inside = (rows[p] >= 0) & (rows[p] < count)
        if out.device.type == "cpu":  # here it costs nothing to know how many these are
            at = inside.nonzero().squeeze(1)
            out[p].index_copy_(0, at, values.index_select(0, rows[p][at]))
        else:
            torch.where(inside.unsqueeze(1), values[rows[p].clamp(0, count - 1)], out[p], out=out[p])


def backward(x: Problem, before: Tensor, grad: Tensor, wanted: frozenset[str]) -> Gradients:
    out = problem.backward(x, before, wanted, functools.partial(through_norm, x, grad))
    if "table" in wanted:
        out.table = row_sums(grad, x.text_rows, x.table.shape[0], grad.dtype)
    if "learned" in wanted:
        out.learned = sums_of(-2 - x.slots, grad, x.num_learned, x.dtype)
    return out


def sums_of(rows: Tensor, grad: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(count, hidden) sums over the places of each row; what is no row counts nothing."""
    return row_sums(grad, torch.where((rows >= 0) & (rows < count), rows, count), count, dtype)


def row_sums(values: Tensor, rows: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(N, hidden) values, (N,) row of each -> (count, hidden) sums in a fixed order; row ``count`` is left out.

    Waits for no host.
    """
    if values.device.type != "cpu":  # there torch adds by atomics, in any order, or in half precision
        return scanned_sums(values, rows, count, dtype)
    add = torch.ops.aten.embedding_dense_backward
    if values.dtype == dtype:
        return add(values, rows, count + 1, count, False)[:count]
    sums = torch.zeros(count + 1, values.shape[1], dtype=dtype)
    for p in pieces(0, len(values), max(1, problem.WORKSPACE_BYTES // 4 // (values.shape[1] * dtype.itemsize))):
        sums += add(values[p].to(dtype), rows[p], count + 1, count, False)
    return sums[:count]


def scanned_sums(values: Tensor, rows: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The same by torch's elementwise operations, which have one order only, in compute dtype, some columns at a time.

    In the order of the rows each place adds what the place 1, 2, 4, ... before it holds, if that is of its row: after
    log2(N) such steps the last place of a row has its sum.
    """
    out = torch.zeros(count, values.shape[1], dtype=dtype, device=values.device)
    if len(values) == 0:
        return out
    order, starts = by_row(rows, count)
    ordered, wide = rows[order].unsqueeze(1), compute_dtype(dtype)
    last, any_place = (starts[1:] - 1).clamp_min(0), (starts[1:] > starts[:-1]).unsqueeze(1)
    steps = [1 << i for i in range((len(values) - 1).bit_length())]
    same = [ordered[step:] == ordered[:-step] for step in steps]
    size = problem.WORKSPACE_BYTES // 4 // ((len(values) + count) * wide.itemsize)
    for c in pieces(0, values.shape[1], max(1, size)):
        sums = values[:, c].index_select(0, order).to(wide)
        for step, near in zip(steps, same, strict=True):
            sums[step:] += torch.where(near, sums[:-step], 0)
        out[:, c] = torch.where(any_place, sums.index_select(0, last), 0)
    return out


def through_norm(x: Problem, grad: Tensor, r: slice, z: Tensor) -> Tensor:
    """Gradient for z, (n * num_tokens, hidden), from the (N, hidden) one of the output."""
    sums = sums_of(x.slots - r.start * x.num_tokens, grad, len(z), z.dtype)
    inverse, norm = split_norm(z)
    unit = z.mul_(inverse).div_(norm)
    sums.addcmul_(unit, (unit * sums).sum(dim=1, keepdim=True), value=-1)
    return sums.mul_(x.token_norm * inverse / norm).view(r.stop - r.start, -1)
