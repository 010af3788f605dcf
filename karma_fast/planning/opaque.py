"""Operators that are one call to torch: what they are made of, or the memory they take inside."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from karma_kernels.info_nce.routing import library_tile

EMBEDDING_BACKWARD = torch.ops.aten.embedding_dense_backward.default


def body_of(func, device: torch.device) -> Callable | None:
    """The Python function behind an operator of `karma_kernels` that is plain torch there; None for others."""
    name = func._schema.name
    if name in ("karma_kernels::info_nce", "karma_kernels::info_nce_backward") and device.type == "cpu":
        from karma_kernels.info_nce import op
    elif name in ("karma_kernels::embed_prompt", "karma_kernels::embed_prompt_backward"):
        from karma_kernels.soft_prompt import op

        if device.type == "cuda":  # the fused kernels need no more than the chunks of the plain path
            return in_chunks(op, name)
    else:
        return None
    return operators(op)[name]._init_fn


def operators(module) -> dict[str, torch.library.CustomOpDef]:
    return {x._qualname: x for x in vars(module).values() if isinstance(x, torch.library.CustomOpDef)}


def in_chunks(module, name: str) -> Callable:
    function = operators(module)[name]._init_fn
    return lambda *args, **options: function(*("chunked" if x == "fused" else x for x in args), **options)


def workspace_of(func, inputs: tuple, options: dict) -> int:
    """Bytes beyond inputs and outputs."""
    name = func._schema.name
    if name == "bitsandbytes::gemm_4bit":  # the weight in the precision of the inputs, and its scales in float32
        elements = math.prod(inputs[2])
        nested = options.get("absmax_8bit") is not None
        return elements * inputs[0].element_size() + (elements // inputs[4] * 4 if nested else 0)
    if name.startswith("karma_kernels::info_nce"):
        given = dict(zip((x.name for x in func._schema.arguments), inputs, strict=True))
        return info_nce_workspace(*(given[x] for x in ("query", "key", "symmetric", "gradients", "workspace_bytes")))
    if func is EMBEDDING_BACKWARD:
        return embedding_backward_workspace(*inputs[:3])
    return 0


def info_nce_workspace(query: Tensor, key: Tensor, symmetric: bool, gradients: int, workspace_bytes: int) -> int:
    """Of the path with the library's products: a tile of scores, for 16-bit inputs its gradient, and statistics.

    ``gradients``: bits of those that are formed, for which there are float32 sums besides. Rows that are not aligned
    are copied, and so is their gradient in the end.
    """
    item, width, both = query.element_size(), query.shape[1], len(query) + len(key)
    rows, keys, _ = library_tile(len(query), len(key), item, symmetric, workspace_bytes)
    padded = -(-width // 16) * 16
    size = rows * keys * (4 + (item if item == 2 else 0)) + 40 * both
    size += rows * keys // 16 + (rows * keys // 4 if symmetric else 0)  # of rows by parts of keys, and the reverse
    if gradients:
        size += 4 * both * padded
    if padded != width:
        size += item * padded * (both + (max(len(query), len(key)) if gradients else 0))
    return size


def embedding_backward_workspace(grad: Tensor, indices: Tensor, rows: int) -> int:
    """Of torch on a GPU: the places in order and, if they are many, sums of up to ten of a row in float32."""
    places = indices.numel()
    if places <= 3072:
        return 0
    segments = min(places, rows)
    sums = places // 10 + segments
    return 8 * (3 * places + 2 * segments + sums) + 4 * sums * grad.shape[-1]
