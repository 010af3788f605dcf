"""The projection and its insertion by Triton kernels, with the library's products for all that is (rows, mid) wide.

Up to ``TWICE_MID`` numbers before the second layer, z stays in registers: it is formed once for its length and once
more where it is written. Otherwise it goes through the workspace. The backward forms z once, some rows at a time.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from ..info_nce.configs import multiprocessors
from ..info_nce.launch import INTERPRETED, accumulator, parts_of, precision
from ..numerics import compute_dtype
from . import configs, problem, routing
from . import triton_kernels as kernels
from .problem import Gradients, Problem, by_row


def forward(x: Problem) -> tuple[Tensor, Tensor]:
    """(N, hidden), and the (R, mid) numbers before GELU, which :func:`backward` needs."""
    (rows, mid), device = (x.vectors.shape[0], x.w2.shape[1]), x.table.device
    out = torch.empty((len(x.slots), x.hidden), dtype=x.table.dtype, device=device)
    before = torch.empty((rows, mid), dtype=x.dtype, device=device)
    for r in x.rows():
        before[r] = x.before_gelu(r)
    if len(out):
        (write if mid <= routing.TWICE_MID else place)(x, before, out)
    return out, before


def text(x: Problem) -> tuple[Tensor, Tensor, int, int]:
    """Token embeddings and learned rows as the kernels read them, and how many."""
    table = x.table if x.table.stride(1) == 1 else x.table.contiguous()
    return table, table if x.learned is None else x.learned.contiguous(), len(table), x.num_learned


def write(x: Problem, before: Tensor, out: Tensor) -> None:
    rows, device = before.shape[0], out.device
    config = configs.tile(device, x.products)
    after, weight = whole_blocks(x.after_gelu(before), config.width), whole_blocks(x.second_weight, config.width)
    mid = after.shape[1]
    flags = {"ACC": accumulator(x.dtype), "PRECISION": precision(x.products), "UPCAST": INTERPRETED, **config.block()}
    blocks = triton.cdiv(rows, config.rows) * x.num_tokens
    parts, per_part = parts_of(max(1, blocks), x.hidden, config.keys, device, 2)
    top, squares = torch.empty((2, parts, x.num_soft), dtype=x.dtype, device=device)
    if rows:
        kernels.lengths_kernel[(blocks, parts)](after, weight, top, squares, rows, x.hidden, mid, x.num_tokens,
                                                per_part, **flags)
    table, learned, vocabulary, num_learned = text(x)
    kernels.write_kernel[(triton.cdiv(len(out), config.rows) * triton.cdiv(x.hidden, config.keys),)](
        after, weight, top, squares, x.token_norm, x.token_ids, x.slots, table, learned, out, len(out), x.num_soft,
        x.hidden, mid, vocabulary, num_learned, x.num_tokens, parts, table.stride(0), **flags)


def place(x: Problem, before: Tensor, out: Tensor) -> None:
    table, learned, vocabulary, num_learned = text(x)
    block = {name: value for name, value in configs.whole_row(x.hidden).items() if name != "BLOCK_P"}
    for r in list(x.rows()) or [slice(0, 0)]:
        z = x.project(x.after_gelu(before[r]))
        kernels.place_kernel[(len(out),)](
            z, x.token_norm, x.token_ids, x.slots, table, learned, out, r.start * x.num_tokens, r.stop * x.num_tokens,
            x.num_soft, x.hidden, vocabulary, num_learned, table.stride(0), ACC=accumulator(x.dtype), **block)


def backward(x: Problem, before: Tensor, grad: Tensor, wanted: frozenset[str]) -> Gradients:
    last = x.num_soft + x.num_learned  # text, and what does not exist; learned rows come after the soft tokens
    slots = x.slots.clamp(-2 - x.num_learned, x.num_soft)
    rows = torch.where(slots < -1, x.num_soft - 2 - slots, torch.where(slots == -1, last, slots))
    rows = rows.masked_fill(slots == x.num_soft, last)
    order, starts = by_row(rows, last)
    out = problem.backward(x, before, wanted, functools.partial(through_norm, x, grad, order, starts))
    if "table" in wanted:
        out.table = row_sums(grad, *by_row(x.text_rows, len(x.table)), 0, len(x.table), grad.dtype)
    if "learned" in wanted:
        out.learned = row_sums(grad, order, starts, x.num_soft, x.num_learned, x.dtype)
    return out


def through_norm(x: Problem, grad: Tensor, order: Tensor, starts: Tensor, r: slice, z: Tensor) -> Tensor:
    out = torch.empty(z.shape, dtype=x.products, device=z.device)
    kernels.through_norm_kernel[(len(z),)](z, grad, order, starts, x.token_norm, out, r.start * x.num_tokens, x.hidden,
                                           ACC=accumulator(x.dtype), **configs.whole_row(x.hidden))
    return out.view(r.stop - r.start, -1)


def row_sums(grad: Tensor, order: Tensor, starts: Tensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """(count, hidden) sums over the places of rows from the first on.

    One row, such as that of a token in every prompt, may have very many places: where rows are few, parts of them.
    """
    hidden, parts = grad.shape[1], max(1, min(64, 2 * multiprocessors(grad.device) // max(1, count)))
    wide = compute_dtype(dtype)
    out = torch.empty((parts, count, hidden), dtype=dtype if parts == 1 else wide, device=grad.device)
    if count:
        kernels.row_sums_kernel[(count, parts)](grad, order, starts, out, first, hidden, ACC=accumulator(wide),
                                                **configs.whole_row(hidden))
    return out[0] if parts == 1 else out.sum(0).to(dtype)


def whole_blocks(x: Tensor, size: int) -> Tensor:
    """Rows at aligned addresses, zeros up to a multiple of ``size`` numbers."""
    padding = -x.shape[1] % size
    return torch.nn.functional.pad(x, (0, padding)) if padding or x.data_ptr() % 16 else x

