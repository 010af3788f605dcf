"""Gradients for tiles of scores in the workspace, multiplied by the library's matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

from ..numerics import add_product
from . import configs
from . import triton_kernels as kernels
from .launch import Factors, Launch
from .problem import Wanted


@dataclass
class Accumulators:
    """In compute dtype, None where not needed."""

    query: Tensor | None  # (1, B, D)
    key: Tensor | None  # (1, N, D)
    log_q: Tensor | None  # (N,)

    @staticmethod
    def of(p: Launch, wanted: Wanted) -> Accumulators:
        def zeros(*shape: int, want: bool) -> Tensor | None:
            return p.empty(*shape).zero_() if want else None

        return Accumulators(zeros(1, *p.query.shape, want=wanted.over_query),
                            zeros(1, *p.key.shape, want=wanted.over_key), zeros(p.key.shape[0], want=wanted.log_q))


def add_tile(p: Launch, f: Factors, sums: Accumulators, config: configs.Config, r: slice, k: slice,
             scores: Tensor | None, buffer: Tensor) -> None:
    """Adds the gradient from rows r and keys k; ``buffer`` takes G, and may be that of the scores."""
    rows, keys, width = r.stop - r.start, k.stop - k.start, p.query.shape[1]
    blocks = triton.cdiv(rows, config.rows)
    g = buffer[:rows * keys].view(rows, keys)
    by_block = g if sums.log_q is None else p.empty(blocks, keys)
    kernels.gradient_tile_kernel[(triton.cdiv(keys, config.keys) * blocks,)](
        p.query, p.key, p.scale if scores is None else scores, g, by_block, p.query_norm, p.key_norm, p.scale,
        p.x.labels, p.query_ids, p.key_ids, p.log_q, f.row_top, f.row_factor, f.row_value, f.key_top,
        f.key_factor, f.value, r.start, r.stop, k.start, k.stop, width, p.query.stride(0), p.key.stride(0),
        0 if scores is None else scores.stride(0), g.stride(0), FROM_SCORES=scores is not None,
        LOGQ_GRAD=sums.log_q is not None, **p.flags, **config.tile(width))
    if sums.log_q is not None:
        sums.log_q[k] += by_block.sum(0)
    if sums.query is not None:
        add_product(sums.query[0, r], g, p.key[k])
    if sums.key is not None:
        add_product(sums.key[0, k], g.T, p.query[r])
