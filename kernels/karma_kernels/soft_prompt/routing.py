"""Which implementation ``backend="auto"`` takes, as arithmetic and data; nothing here imports Triton."""

from __future__ import annotations

import torch

from ..info_nce.routing import by_triton

WIDEST = 16384  # numbers of a row that a Triton program holds at once
# Up to so many numbers before the second layer, a vector, the Triton kernels form the tokens twice, for their lengths
# and for the output; above, they are written out in between. By arithmetic (12 bytes of memory traffic against 2 mid
# operations for each number of a token, H100 and RTX 4090), not measured on a GPU yet.
TWICE_MID = 512
# On a CPU the definition is faster up to so many numbers of all soft tokens; above, chunked is as fast or faster and
# keeps less. AMD EPYC (AVX-512), 1 thread, torch 2.13.0, forward and backward, bfloat16 token embeddings, float32
# weights, 2026-11-22: 400 vectors, mid 704, hidden 576: 29 against 32 ms; 2000, 256, 2048: 216 against 146 ms.
PLAIN_NUMBERS = 1 << 20


def fits(dtype: torch.dtype, hidden: int) -> bool:
    """Whether the Triton kernels take this on a GPU."""
    return dtype != torch.float64 and hidden <= WIDEST


def route(dtype: torch.dtype, num_soft: int, hidden: int, device: torch.device) -> str:
    """"reference", "chunked" or "fused"."""
    if device.type != "cuda":
        return "chunked" if device.type == "cpu" and num_soft * hidden > PLAIN_NUMBERS else "reference"
    # on older cards Triton's products are plain multiply-adds
    return "fused" if fits(dtype, hidden) and by_triton(device, (8, 0)) else "chunked"


def products_of(backend: str, dtype: torch.dtype) -> torch.dtype:
    """Of the factors of matrix products, for token embeddings of ``dtype``: gradients leave the range of float16."""
    if dtype == torch.float64:
        return dtype
    return torch.bfloat16 if backend == "fused" and dtype == torch.bfloat16 else torch.float32
