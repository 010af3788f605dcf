"""The implementations with bounded memory as one operator that autograd, torch.compile and CUDA graphs can see."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from ..numerics import compute_dtype
from . import chunked
from .problem import Gradients, Problem, Wanted
from .routing import module_of

# bits of `gradients`: which of them the forward forms, for an upstream gradient of 1. An operator does not see what
# will be asked of it, so its caller says it; 0 leaves all to the backward.
BITS = QUERY, KEY, SCALE, LOG_Q = 1, 2, 4, 8


def implementation(backend: str, query: Tensor) -> ModuleType:
    module = module_of(backend, query.device, query.dtype)
    return chunked if module == "chunked" else importlib.import_module(f"{__package__}.{module}")  # imports triton


@contextlib.contextmanager
def undisturbed(query: Tensor) -> Iterator[None]:
    """No half precision where the backward is called under autocast; Triton launches on the tensors' own device."""
    device = query.device
    with torch.autocast(device.type, enabled=False), \
            torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


def problem(query: Tensor, key: Tensor, labels: Tensor, scale: Tensor, query_ids: Tensor | None,
            key_ids: Tensor | None, log_q: Tensor | None, symmetric: bool, normalize: bool,
            workspace_bytes: int) -> Problem:
    keys = key.shape[0]
    valid = torch.isfinite(scale) & ((labels >= 0) & (labels < keys)).all()
    if symmetric:
        valid = valid & (labels.sort().values.diff() != 0).all()
    if log_q is not None:
        valid = valid & torch.isfinite(log_q).all()
    labels = labels.clamp(0, max(keys - 1, 0))
    if key_ids is not None and query_ids is None:
        query_ids = key_ids[labels]
    return Problem(query, key, labels, scale.to(compute_dtype(query.dtype)), query_ids, key_ids, log_q, symmetric,
                   normalize, valid, workspace_bytes)


def wanted(bits: int) -> Wanted:
    return Wanted(bool(bits & QUERY), bool(bits & KEY), bool(bits & SCALE), bool(bits & LOG_Q))


def shapes(query: Tensor, key: Tensor, bits: int) -> list[tuple[int, ...]]:
    """Of the gradients; what is not asked for is empty, as an operator cannot return None."""
    return [tuple(query.shape) if bits & QUERY else (0,), tuple(key.shape) if bits & KEY else (0,),
            () if bits & SCALE else (0,), (key.shape[0],) if bits & LOG_Q else (0,)]


def filled(grads: Gradients, query: Tensor, key: Tensor, bits: int, dtypes: list[torch.dtype]) -> list[Tensor]:
    found = [grads.query, grads.key, grads.scale, grads.log_q]
    if query.shape[0] and any(x is None and bits & bit for x, bit in zip(found, BITS, strict=True)):
        raise RuntimeError(f"info_nce: gradients {bits:04b} were to be formed and were not; please report this")
    return [x.to(dtype) if x is not None and bits & bit else query.new_zeros(shape, dtype=dtype)
            for x, bit, shape, dtype in zip(found, BITS, shapes(query, key, bits), dtypes, strict=True)]


@torch.library.custom_op("karma_kernels::info_nce", mutates_args=())
def info_nce_op(query: Tensor, key: Tensor, labels: Tensor, scale: Tensor, query_ids: Tensor | None,
                key_ids: Tensor | None, log_q: Tensor | None, symmetric: bool, normalize: bool, per_row: bool,
                gradients: int, backend: str,
                workspace_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, rows = compute_dtype(query.dtype), query.shape[0]
    if rows == 0:
        losses, saved, grads = query.new_zeros(0, dtype=dtype), query.new_zeros((6 if symmetric else 3, 0),
                                                                               dtype=dtype), Gradients()
    else:
        with undisturbed(query):
            x = problem(query, key, labels, scale, query_ids, key_ids, log_q, symmetric, normalize, workspace_bytes)
            losses, saved, grads = implementation(backend, query).forward(x, wanted(gradients))
    return (losses if per_row else losses.sum(), saved, *filled(grads, query, key, gradients, [dtype] * 4))


@info_nce_op.register_fake
def _(query, key, labels, scale, query_ids, key_ids, log_q, symmetric, normalize, per_row, gradients, backend,
      workspace_bytes):
    dtype, rows = compute_dtype(query.dtype), query.shape[0]
    outputs = [(rows,) if per_row else (), (6 if symmetric else 3, rows), *shapes(query, key, gradients)]
    return tuple(query.new_empty(shape, dtype=dtype) for shape in outputs)


@torch.library.custom_op("karma_kernels::info_nce_backward", mutates_args=())
def backward_op(query: Tensor, key: Tensor, labels: Tensor, scale: Tensor, query_ids: Tensor | None,
                key_ids: Tensor | None, log_q: Tensor | None, symmetric: bool, normalize: bool, gradients: int,
                backend: str, workspace_bytes: int, saved: Tensor,
                weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = Gradients()
    if query.shape[0]:
        with undisturbed(query):
            x = problem(query, key, labels, scale, query_ids, key_ids, log_q, symmetric, normalize, workspace_bytes)
            grads = implementation(backend, query).backward(x, saved, weights, wanted(gradients))
    return tuple(filled(grads, query, key, gradients, [query.dtype] * 2 + [saved.dtype] * 2))


@backward_op.register_fake
def _(query, key, labels, scale, query_ids, key_ids, log_q, symmetric, normalize, gradients, backend, workspace_bytes,
      saved, weights):
    dtypes = [query.dtype] * 2 + [saved.dtype] * 2
    return tuple(query.new_empty(shape, dtype=dtype)
                 for shape, dtype in zip(shapes(query, key, gradients), dtypes, strict=True))


def setup_context(ctx, inputs, output):
    *tensors, symmetric, normalize, ctx.per_row, ctx.formed, backend, workspace_bytes = inputs
    _, saved, *grads = output
    ctx.options = (symmetric, normalize, backend, workspace_bytes)
    ctx.dtypes = [None if x is None else x.dtype for x in tensors]
    ctx.mark_non_differentiable(saved, *grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(grads if ctx.formed else (*tensors, saved)))


def backward(ctx, grad_loss, *_):
    places = (0, 1, 3, 6)
    found: list[Tensor | None] = [None] * 13
    if grad_loss is None:
        return tuple(found)
    if torch.is_grad_enabled():
        raise RuntimeError("info_nce: a gradient of the gradient (create_graph=True) is asked for; only "
                           "backend='reference' has one")
    needed = sum(bit for place, bit in zip(places, BITS, strict=True) if ctx.needs_input_grad[place])
    if ctx.formed:
        dtypes = [ctx.dtypes[place] for place in places]  # no product in float32 beside the one in half precision
        grads = [torch.mul(g, grad_loss, out=torch.empty_like(g, dtype=dtype)) if needed & bit else g
                 for g, bit, dtype in zip(ctx.saved_tensors, BITS, dtypes, strict=True)]
    else:
        symmetric, normalize, backend, workspace_bytes = ctx.options
        *tensors, saved = ctx.saved_tensors
        weights = grad_loss if ctx.per_row else grad_loss.expand(saved.shape[1])
        grads = backward_op(*tensors, symmetric, normalize, needed, backend, workspace_bytes, saved,
                            weights.to(saved.dtype).contiguous())
    for place, bit, grad in zip(places, BITS, grads, strict=True):
        if needed & bit:
            found[place] = grad.to(ctx.dtypes[place])
    return tuple(found)


info_nce_op.register_autograd(backward, setup_context=setup_context)
