"""InfoNCE by the Triton kernels: the scores are formed tile by tile and formed again for the gradient.

Statistics cost 2 B N D operations. The gradient costs 4 B N D for each side while a block of rows fits in registers
(D <= 256, or 64 for float32; nothing but the gradient is written), else 6 B N D for both: tiles of G go through the
workspace to the library's matrix products.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from . import configs
from . import triton_kernels as kernels
from .launch import Factors, Launch, Running, finish_all, finish_keys, finish_queries, parts_of
from .problem import Gradients, Problem, Wanted, pieces
from .staged import Accumulators, add_tile


def forward(x: Problem, wanted: Wanted) -> tuple[Tensor, Tensor, Gradients]:
    """(B,) losses and what :func:`backward` needs; no gradients yet, forming them here would save nothing."""
    p = Launch.of(x)
    running, config = Running.of(p), configs.tiles(p.query.device, p.query.dtype, x.plain)[0]
    group = x.query.shape[0]
    if x.symmetric:  # statistics of all keys from each block of rows
        group = config.rows * max(1, x.workspace_bytes // (2 * x.dtype.itemsize * x.key.shape[0]))
    for r in pieces(0, x.query.shape[0], group):
        running.add(p, config, r, slice(0, x.key.shape[0]))
    return *running.result(p), Gradients()


def backward(x: Problem, saved: Tensor, weights: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of ``sum_i weights_i loss_i`` in the dtype of the inputs."""
    p = Launch.of(x)
    f = Factors.of(p, saved, weights, p.up())
    if configs.rows(p.query.device, p.query.dtype, p.query.shape[1]) is not None:
        out = Gradients()  # one side after the other: the parts of either may fill the workspace
        if wanted.over_query:
            finish_queries(p, f, wanted, row_gradient(p, f, True, False)[0], x.query.dtype, out)
        if wanted.over_key:
            finish_keys(p, f, wanted, *row_gradient(p, f, False, wanted.log_q), x.query.dtype, out)
        return out
    sums = Accumulators.of(p, wanted)
    config = configs.tiles(p.query.device, p.query.dtype, x.plain)[1]
    (rows, keys), space = (x.query.shape[0], x.key.shape[0]), x.workspace_bytes // x.query.itemsize
    tile_rows = min(rows, max(1, math.isqrt(space) // config.rows) * config.rows)
    tile_keys = min(keys, max(1, space // tile_rows // config.keys) * config.keys)
    g = torch.empty(tile_rows * tile_keys, dtype=x.query.dtype, device=x.query.device)
    for r in pieces(0, rows, tile_rows):
        for k in pieces(0, keys, tile_keys):
            add_tile(p, f, sums, config, r, k, None, g)
    return finish_all(p, f, wanted, sums.query, sums.key, sums.log_q, x.query.dtype)


def row_gradient(p: Launch, f: Factors, query_is_x: bool, log_q_grad: bool) -> tuple[Tensor, Tensor | None]:
    """(parts, X, D) sums of G y for the queries or the keys, and (N,) sums of G over the queries."""
    x, y = (p.query, p.key) if query_is_x else (p.key, p.query)
    x_norm, y_norm = (p.query_norm, p.key_norm) if query_is_x else (p.key_norm, p.query_norm)
    x_ids, y_ids = (p.query_ids, p.key_ids) if query_is_x else (p.key_ids, p.query_ids)
    width = x.shape[1]
    config = configs.rows(x.device, x.dtype, width)
    blocks = triton.cdiv(x.shape[0], config.rows)
    parts, per_part = parts_of(blocks, y.shape[0], config.keys, x.device, 2)
    most = max(1, p.x.workspace_bytes // (x.shape[0] * width * p.x.dtype.itemsize))
    if parts > most:
        per_part = triton.cdiv(triton.cdiv(y.shape[0], most), config.keys) * config.keys
        parts = triton.cdiv(y.shape[0], per_part)
    out = p.empty(parts, x.shape[0], width)
    log_q_out = p.empty(parts, x.shape[0]) if log_q_grad else out
    kernels.gradient_rows_kernel[(blocks, parts)](
        x, y, out, log_q_out, x_norm, y_norm, p.scale, p.x.labels, x_ids, y_ids, p.log_q, f.row_top, f.row_factor,
        f.row_value, f.key_top, f.key_factor, f.value, x.shape[0], y.shape[0], per_part, width, x.stride(0),
        y.stride(0), QUERY_IS_X=query_is_x, LOGQ_GRAD=log_q_grad, **p.flags, **config.block())
    return out, log_q_out.sum(0) if log_q_grad else None
