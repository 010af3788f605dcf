"""InfoNCE, the softmax cross-entropy over a batch of keys: checks and choice of the implementation."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..numerics import compute_dtype
from . import op
from .reference import info_nce_rows
from .routing import forms_gradients, module_of, route, triton_problem

__all__ = ["info_nce"]

BACKENDS = ("auto", "reference", "chunked", "fused")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def info_nce(query: Tensor, key: Tensor, labels: Tensor | None = None, *, scale: float | Tensor = 20.0,
             query_ids: Tensor | None = None, key_ids: Tensor | None = None, log_q: Tensor | None = None,
             symmetric: bool = False, reduction: str = "mean", normalize: bool = False, backend: str = "auto",
             workspace_bytes: int = 64 << 20) -> Tensor:
    r"""InfoNCE of every query against every key.

    .. math:: \ell_i = -\log \frac{\exp(z_{i,y_i})}{\sum_{j \notin M_i} \exp(z_{ij})}, \qquad
              z_{ij} = s \, q_i \cdot k_j - \log Q_j

    Source: van den Oord et al. 2018 (https://arxiv.org/abs/1807.03748); the logQ correction is that of Yi et al. 2019
    (https://doi.org/10.1145/3298689.3346996).

    Args:
        query: (B, D) float64, float32, float16 or bfloat16. B = 0 gives 0 and zero gradients.
        key: (N, D), same dtype and device. Keys that are nobody's positive are negatives for every row.
        labels: (B,) integers, row of ``key`` that is the positive. Default: ``arange(B)``.
        scale: s, a number or a tensor with one element, which gets its gradient.
        query_ids: (B,) integers, the id of each row's positive. Default: ``key_ids[labels]``.
        key_ids: (N,) integers. Key j is dropped from row i (the set M) if ``key_ids[j] == query_ids[i]`` and it is not
            the positive itself: another copy of the item asked for is no negative. (N, 2), with (B, 2) ``query_ids``:
            ids of two kinds, such as item and user; dropped if those of either kind are equal.
        log_q: (N,) floating, log of the probability with which the key got into the batch.
        symmetric: the mean of this loss and of the one that looks for query i among all queries from its positive:
            the softmax of column ``labels[i]`` over the queries, without query k != i where
            ``query_ids[k] == key_ids[labels[i]]`` (of either kind). ``log_q`` is not used in that direction. Labels
            must be distinct.
        reduction: "mean", "sum" or "none" ((B,) losses).
        normalize: L2-normalise query and key first. A zero row stays zero and gets a zero gradient.
        backend: "reference" is the definition, holds the (B, N) scores in memory and alone has second derivatives and
            forward-mode ones, and runs under ``torch.func``'s transforms.
            "chunked" works on tiles of scores within ``workspace_bytes``, with the library's matrix products. "fused"
            are Triton kernels for CUDA devices; float64 is not for them. "auto" takes the fastest.
        workspace_bytes: limit for temporary memory of "chunked" and "fused", besides gradient accumulators in float32,
            a few numbers for each row and key and, on CUDA devices, copies of inputs whose rows are not contiguous,
            not aligned to 16 bytes or not a multiple of 16 wide.

    Returns:
        float64 for float64 inputs, else float32: half precision is computed in float32, under autocast too. A
        non-finite input gives a NaN loss and NaN gradients. So does, with ``normalize``, a row whose length has no
        inverse to compute with (on CUDA devices beyond 2^50 or under 2^-50). Same inputs, same bits.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, devices or options; on a CPU also labels out of range, and
            repeated ones with ``symmetric``. On other devices, and in a compiled function, these give NaN, so that
            nothing has to wait for a check. RuntimeError: "fused" without a CUDA device, or where Triton cannot launch
            kernels; derivatives that only "reference" has.

    Example:
        >>> query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> info_nce(query, key, scale=5.0)
        tensor(0.3549)
        >>> info_nce(query, key, scale=5.0, key_ids=torch.tensor([7, 8, 7]), reduction="none")
        tensor([0.0067, 0.0134])
    """
    check_inputs(query, key, labels, query_ids, key_ids, log_q, symmetric)
    check_options(query, scale, reduction, backend, workspace_bytes)
    if transformed(query, key, log_q, scale):
        if backend not in ("auto", "reference"):
            raise RuntimeError(f"backend {backend!r} has no forward-mode derivatives and does not run under "
                               "torch.func's transforms; take backend='reference' or 'auto'")
        backend = "reference"
    rows, device = query.shape[0], query.device
    if labels is None:
        labels = torch.arange(rows, device=device)
    if not isinstance(scale, Tensor):  # filled on the device: no copy that a CUDA graph could not capture
        scale = torch.full((), float(scale), dtype=compute_dtype(query.dtype), device=device)
    if backend == "auto":
        backend = route(rows, key.shape[0], query.dtype, device)
    labels, scale, per_row = labels.long(), scale.reshape(()), reduction == "none"
    with torch.autocast(device.type, enabled=False):
        if backend == "reference":
            losses = info_nce_rows(query, key, labels, scale, query_ids, key_ids, log_q, symmetric, normalize)
            if per_row:
                return losses
            loss = losses.sum()
        else:
            gradients = 0
            module = module_of(backend, device, query.dtype)
            if not per_row and torch.is_grad_enabled() and forms_gradients(
                    rows, *key.shape, query.dtype, device, symmetric, normalize, module, workspace_bytes):
                gradients = sum(bit for bit, x in ((op.QUERY, query), (op.KEY, key), (op.SCALE, scale),
                                                   (op.LOG_Q, log_q)) if x is not None and x.requires_grad)
            loss = op.info_nce_op(query, key, labels, scale, query_ids, key_ids, log_q, symmetric, normalize, per_row,
                                  gradients, backend, workspace_bytes)[0]
        return loss / max(rows, 1) if reduction == "mean" else loss


def check_inputs(query: Tensor, key: Tensor, labels: Tensor | None = None, query_ids: Tensor | None = None,
                 key_ids: Tensor | None = None, log_q: Tensor | None = None, symmetric: bool = False) -> None:
    """Raises what :func:`info_nce` raises for its tensors; values of labels are looked at on a CPU only."""
    for name, x in (("query", query), ("key", key)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}; a tensor is needed")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: got dtype {x.dtype}; float64, float32, float16 or bfloat16 is needed")
        if x.ndim != 2:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; two dimensions (rows, width) are needed")
    if query.dtype != key.dtype:
        raise TypeError(f"query is {query.dtype} and key is {key.dtype}; cast one of them, both must be the same")
    if query.device != key.device:
        raise ValueError(f"query is on {query.device} and key on {key.device}; move one of them")
    if query.shape[1] != key.shape[1] or query.shape[1] == 0:
        raise ValueError(f"query has width {query.shape[1]} and key {key.shape[1]}; the same width >= 1 is needed")
    rows, keys = query.shape[0], key.shape[0]
    for name, x, size in (("labels", labels, rows), ("query_ids", query_ids, rows), ("key_ids", key_ids, keys),
                          ("log_q", log_q, keys)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}; a tensor is needed")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device} and query on {query.device}; move one of them")
        if x.shape != (size,) and not (name.endswith("_ids") and x.shape == (size, 2)):
            also = f" or ({size}, 2)" if name.endswith("_ids") else ""
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; ({size},){also} is needed")
        allowed = FLOATS if name == "log_q" else INTEGERS
        if x.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise TypeError(f"{name}: got dtype {x.dtype}; one of {names} is needed")
    if query_ids is not None and key_ids is None:
        raise ValueError("query_ids given without key_ids; give key_ids too, ids are compared with those of the keys")
    if query_ids is not None and query_ids.ndim != key_ids.ndim:
        raise ValueError(f"query_ids: got shape {tuple(query_ids.shape)} with key_ids {tuple(key_ids.shape)}; both "
                         "need one kind of id, or both two")
    if labels is None:
        if keys < rows:
            raise ValueError(f"{rows} queries but {keys} keys; without labels each query needs its own key first")
    elif rows and keys == 0:
        raise ValueError(f"{rows} queries but no keys; at least one key is needed")
    elif rows and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= keys:
            raise ValueError(f"labels: got {low} to {high}; with {keys} keys 0 to {keys - 1} is needed")
        if symmetric and labels.unique().numel() != rows:
            raise ValueError("labels: a key is the positive of several queries; symmetric=True needs distinct labels, "
                             "use symmetric=False or keep repeated keys apart")


def check_options(query: Tensor, scale: float | Tensor, reduction: str, backend: str, workspace_bytes: int) -> None:
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or scale.dtype not in FLOATS:
            raise ValueError(f"scale: got shape {tuple(scale.shape)}, dtype {scale.dtype}; one floating element is "
                             "needed")
        if scale.device != query.device:
            raise ValueError(f"scale is on {scale.device} and query on {query.device}; move one of them")
    elif isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale: got {type(scale).__name__}; a number or a tensor with one element is needed")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}; mean, sum or none is needed")
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; auto, reference, chunked or fused is needed")
    if backend == "fused" and not torch.compiler.is_compiling():  # a compiled function fails when it runs
        check_fused(query)
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int) or workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes: got {workspace_bytes!r}; a positive whole number of bytes is needed")


def transformed(*tensors: Tensor | float | None) -> bool:
    """Under ``torch.func.grad`` and the like, or with tangents: an operator would give zero derivatives, silently."""
    if torch.compiler.is_compiling():
        return False
    given = [x for x in tensors if isinstance(x, Tensor)]
    if any(torch._C._functorch.is_gradtrackingtensor(x) for x in given):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given)


def check_fused(query: Tensor) -> None:
    if problem := triton_problem():
        raise RuntimeError(f"backend 'fused' needs Triton, {problem}, or take backend='chunked' or 'auto'")
    from .launch import INTERPRETED  # imports triton

    if INTERPRETED:
        return
    if query.device.type != "cuda":
        raise RuntimeError("backend 'fused' needs tensors on a CUDA device (or Triton's interpreter, for checks); "
                           f"query is on {query.device}, take backend='chunked' or 'auto'")
    if query.dtype == torch.float64:
        raise ValueError("backend 'fused' does not take float64; take backend='chunked' or 'auto'")
