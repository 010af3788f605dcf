"""What the functions of this package refuse; each check raises what they document."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from ..info_nce.routing import triton_problem
from .routing import WIDEST, fits

BACKENDS = ("auto", "reference", "chunked", "fused")


def check_floats(**tensors: Tensor | None) -> None:
    given = {name: x for name, x in tensors.items() if x is not None}
    check_devices(**given)
    for name, x in given.items():
        if not x.is_floating_point():
            raise TypeError(f"{name}: got dtype {x.dtype}; a floating dtype is needed")


def check_devices(**tensors: Tensor) -> None:
    if len({x.device for x in tensors.values()}) > 1:
        raise ValueError("got " + ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
                         + "; all must be on one device")


def check_projection(vectors: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, num_tokens: int,
                     token_norm: float | Tensor) -> None:
    check_floats(vectors=vectors, norm_weight=norm_weight, w1=w1, b1=b1, w2=w2)
    weights = {"norm_weight": norm_weight, "w1": w1, "b1": b1, "w2": w2}
    if len({x.dtype for x in weights.values()}) > 1:
        found = ", ".join(f"{name} {x.dtype}" for name, x in weights.items())
        raise TypeError(f"got {found}; all weights need the same dtype")
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ValueError(f"vectors: got shape {tuple(vectors.shape)}; (rows, width) is needed")
    width, mid = vectors.shape[1], b1.shape[0] if b1.ndim == 1 else -1
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(f"num_tokens: got {num_tokens!r}; a whole number >= 1 is needed")
    if mid == 0 or norm_weight.shape != (width,) or w1.shape != (mid, width) or w2.ndim != 2 or w2.shape[1] != mid:
        raise ValueError(f"vectors {tuple(vectors.shape)}, norm_weight {tuple(norm_weight.shape)}, w1 "
                         f"{tuple(w1.shape)}, b1 {tuple(b1.shape)}, w2 {tuple(w2.shape)} do not fit; (rows, in), "
                         "(in,), (mid, in), (mid,), (num_tokens * hidden, mid) is needed")
    if w2.shape[0] == 0 or w2.shape[0] % num_tokens:
        raise ValueError(f"w2: got {w2.shape[0]} rows; a multiple of num_tokens = {num_tokens} is needed")
    if isinstance(token_norm, Tensor):
        if token_norm.numel() != 1 or not token_norm.is_floating_point():
            raise ValueError(f"token_norm: got shape {tuple(token_norm.shape)}, dtype {token_norm.dtype}; one "
                             "floating element is needed")
        if token_norm.device != vectors.device:
            raise ValueError(f"token_norm is on {token_norm.device} and vectors on {vectors.device}; move one of them")
    elif isinstance(token_norm, bool) or not isinstance(token_norm, numbers.Real):
        raise TypeError(f"token_norm: got {type(token_norm).__name__}; a number or a tensor with one element is "
                        "needed")


def check_places(token_ids: Tensor, slots: Tensor, hidden: int, embedding_weight: Tensor,
                 learned: Tensor | None) -> None:
    for name, x in (("token_ids", token_ids), ("slots", slots)):
        if x.is_floating_point() or x.dtype == torch.bool:
            raise TypeError(f"{name}: got dtype {x.dtype}; integers are needed")
    check_floats(embedding_weight=embedding_weight, learned=learned)
    check_devices(token_ids=token_ids, slots=slots, embedding_weight=embedding_weight)
    if token_ids.ndim != 2 or token_ids.shape != slots.shape:
        raise ValueError(f"token_ids {tuple(token_ids.shape)}, slots {tuple(slots.shape)}; both must be (batch, "
                         "length)")
    if embedding_weight.ndim != 2 or embedding_weight.shape[1] != hidden or embedding_weight.shape[0] == 0:
        raise ValueError(f"embedding_weight: got shape {tuple(embedding_weight.shape)}; with soft tokens of width "
                         f"{hidden} (vocabulary, {hidden}) is needed")
    if learned is not None and (learned.ndim != 2 or learned.shape[1] != hidden):
        raise ValueError(f"learned: got shape {tuple(learned.shape)}; (rows, {hidden}) is needed")


def check_values(token_ids: Tensor, slots: Tensor, num_soft: int, num_learned: int, vocabulary: int) -> None:
    """IndexError for what does not exist; looks at values, so for tensors on a CPU only."""
    if slots.device.type != "cpu" or not slots.numel() or torch.compiler.is_compiling():
        return
    low, high = int(slots.min()), int(slots.max())
    if low < -1 - num_learned or high >= num_soft:
        learned = f" and {num_learned} learned tokens" if num_learned else ""
        raise IndexError(f"slots: got {low} to {high}; with {num_soft} soft tokens{learned} {-1 - num_learned} to "
                         f"{num_soft - 1} is needed")
    text = token_ids[slots == -1]
    if text.numel() and not 0 <= int(text.min()) <= int(text.max()) < vocabulary:
        raise IndexError(f"token_ids: got {int(text.min())} to {int(text.max())}; with {vocabulary} token embeddings "
                         f"0 to {vocabulary - 1} is needed")


def check_backend(backend: str, table: Tensor, token_norm: float | Tensor) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; auto, reference, chunked or fused is needed")
    if backend in ("chunked", "fused") and isinstance(token_norm, Tensor) and token_norm.requires_grad:
        raise ValueError(f"token_norm requires a gradient, which backend {backend!r} does not form; take "
                         "backend='reference' or 'auto', or token_norm.detach()")
    if backend == "fused" and not torch.compiler.is_compiling():  # a compiled function fails when it runs
        check_fused(table)


def check_fused(table: Tensor) -> None:
    if problem := triton_problem():
        raise RuntimeError(f"backend 'fused' needs Triton, {problem}, or take backend='chunked' or 'auto'")
    from ..info_nce.launch import INTERPRETED  # imports triton

    if INTERPRETED:
        return
    if table.device.type != "cuda":
        raise RuntimeError("backend 'fused' needs tensors on a CUDA device (or Triton's interpreter, for checks); "
                           f"these are on {table.device}, take backend='chunked' or 'auto'")
    if not fits(table.dtype, table.shape[1]):
        raise ValueError(f"backend 'fused' takes no float64 and no rows wider than {WIDEST}; got {table.dtype}, width "
                         f"{table.shape[1]}; take backend='chunked' or 'auto'")
