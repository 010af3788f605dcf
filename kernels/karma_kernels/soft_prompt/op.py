"""The implementations with bounded memory as one operator that autograd, torch.compile and CUDA graphs can see."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from ..info_nce.op import undisturbed
from ..numerics import compute_dtype
from . import chunked
from .problem import NAMES, Gradients, Problem
from .routing import products_of

# bits of `gradients`, in the order of NAMES; places of these inputs among those of the operator
BITS = {name: 1 << i for i, name in enumerate(NAMES)}
PLACES = (2, 3, 4, 5, 6, 7, 8)
INPUTS = 13


def implementation(backend: str) -> ModuleType:
    return chunked if backend == "chunked" else importlib.import_module(f"{__package__}.{backend}")  # imports triton


def problem(backend: str, token_ids: Tensor, slots: Tensor, vectors: Tensor, norm_weight: Tensor, w1: Tensor,
            b1: Tensor, w2: Tensor, table: Tensor, learned: Tensor | None, token_norm: Tensor, num_tokens: int,
            eps: float) -> Problem:
    return Problem(token_ids.reshape(-1).long(), slots.reshape(-1).long(), vectors, norm_weight, w1, b1, w2, table,
                   learned, token_norm.to(compute_dtype(table.dtype)), num_tokens, eps,
                   products_of(backend, table.dtype))


@torch.library.custom_op("karma_kernels::embed_prompt", mutates_args=())
def embed_prompt_op(token_ids: Tensor, slots: Tensor, vectors: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor,
                    w2: Tensor, table: Tensor, learned: Tensor | None, token_norm: Tensor, num_tokens: int,
                    eps: float, backend: str) -> tuple[Tensor, Tensor]:
    with undisturbed(table):
        x = problem(backend, token_ids, slots, vectors, norm_weight, w1, b1, w2, table, learned, token_norm,
                    num_tokens, eps)
        out, before = implementation(backend).forward(x)
    return out.view(*token_ids.shape, x.hidden), before


@embed_prompt_op.register_fake
def _(token_ids, slots, vectors, norm_weight, w1, b1, w2, table, learned, token_norm, num_tokens, eps, backend):
    return (table.new_empty((*token_ids.shape, table.shape[1])),
            vectors.new_empty((vectors.shape[0], w2.shape[1]), dtype=compute_dtype(table.dtype)))


def shapes(tensors: list[Tensor | None], bits: int) -> list[tuple[int, ...]]:
    """Of the gradients; what is not asked for is empty, as an operator cannot return None."""
    return [tuple(x.shape) if x is not None and bits & bit else (0,)
            for x, bit in zip(tensors, BITS.values(), strict=True)]


@torch.library.custom_op("karma_kernels::embed_prompt_backward", mutates_args=())
def backward_op(token_ids: Tensor, slots: Tensor, vectors: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor,
                w2: Tensor, table: Tensor, learned: Tensor | None, token_norm: Tensor, num_tokens: int, eps: float,
                backend: str, gradients: int, before: Tensor,
                grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = frozenset(name for name, bit in BITS.items() if gradients & bit)
    with undisturbed(table):
        x = problem(backend, token_ids, slots, vectors, norm_weight, w1, b1, w2, table, learned, token_norm,
                    num_tokens, eps)
        found: Gradients = implementation(backend).backward(x, before, grad.reshape(-1, x.hidden).contiguous(), wanted)
    inputs = [getattr(x, name) for name in NAMES]
    return tuple(table.new_empty(0) if gradient is None else gradient.to(like.dtype)
                 for gradient, like in zip(found.all(), inputs, strict=True))


@backward_op.register_fake
def _(token_ids, slots, vectors, norm_weight, w1, b1, w2, table, learned, token_norm, num_tokens, eps, backend,
      gradients, before, grad):
    inputs = [vectors, norm_weight, w1, b1, w2, table, learned]
    return tuple(table.new_empty(shape, dtype=x.dtype if x is not None and gradients & bit else table.dtype)
                 for x, shape, bit in zip(inputs, shapes(inputs, gradients), BITS.values(), strict=True))


def setup_context(ctx, inputs, output):
    *tensors, ctx.num_tokens, ctx.eps, ctx.backend = inputs
    _, before = output
    ctx.mark_non_differentiable(before)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, before)


def backward(ctx, grad, *_):
    found: list[Tensor | None] = [None] * INPUTS
    if grad is None:
        return tuple(found)
    if torch.is_grad_enabled():
        raise RuntimeError("embed_prompt: a gradient of the gradient (create_graph=True) is asked for; only "
                           "backend='reference' has one")
    needed = {place: bit for place, bit in zip(PLACES, BITS.values(), strict=True) if ctx.needs_input_grad[place]}
    *tensors, before = ctx.saved_tensors
    grads = backward_op(*tensors, ctx.num_tokens, ctx.eps, ctx.backend, sum(needed.values()), before, grad)
    for place, gradient in zip(PLACES, grads, strict=True):
        if place in needed:
            found[place] = gradient
    return tuple(found)


embed_prompt_op.register_autograd(backward, setup_context=setup_context)
