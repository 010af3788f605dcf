"""Small numerics that several operations share."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, everything narrower is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def adds_wider(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies such narrow numbers with sums in float32; if not, convert them first."""
    if device.type != "cuda":
        return device.type != "cpu"
    # it refuses to while it tunes products, or may add those of float16 in float16, and for bfloat16 on older cards
    if torch.cuda.tunable.is_enabled():
        return False
    if dtype == torch.float16:
        return not torch.backends.cuda.matmul.allow_fp16_accumulation
    return torch.cuda.get_device_capability(device) >= (8, 0)


def product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """(R, K) and (K, C) -> (R, C) ``a @ b`` with the sums in ``dtype``, which ``out`` has too if given."""
    if a.dtype == dtype or not adds_wider(a.dtype, a.device):
        return torch.mm(a.to(dtype), b.to(dtype), out=out)
    return torch.mm(a, b, out_dtype=dtype, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, added in the dtype of ``total``."""
    if a.dtype == total.dtype or not adds_wider(a.dtype, a.device):
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def unit_rows(x: Tensor) -> Tensor:
    """``x / |x|`` over the last dimension; a zero row stays zero and gets a zero gradient.

    Neither very large nor very small rows overflow or vanish on the way. A non-finite row becomes NaN.

    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e30, 4e30]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000],
            [0.6000, 0.8000]])
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    zero = largest == 0
    # the result does not depend on the length of x, so dividing by a constant first changes no gradient
    x = x / largest.masked_fill(zero, 1)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x / norm.masked_fill(zero, 1)).masked_fill(zero, 0)
