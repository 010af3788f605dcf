"""Operators that are one call to torch: what they are made of, or the memory they take inside."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from karma_kernels.info_nce.routing import library_tile


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
        return info_nce_workspace(*inputs[:2], symmetric=inputs[7], workspace_bytes=next(
            x for x in reversed(inputs) if type(x) is int))
    return 0


def info_nce_workspace(query: Tensor, key: Tensor, symmetric: bool, workspace_bytes: int) -> int:
    """A tile of scores; for 16-bit inputs their gradient, and float32 sums of the gradients of the inputs."""
    item = query.element_size()
    rows, keys, _ = library_tile(len(query), len(key), item, symmetric, workspace_bytes)
    return rows * keys * 4 + (0 if item > 2 else rows * keys * item + 4 * (query.numel() + key.numel()))
