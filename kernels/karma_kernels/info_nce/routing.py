"""Which implementation ``backend="auto"`` takes: the fastest that was measured, as data.

``PLAIN_SCORES``: up to so many scores B N the dense reference is faster than the chunked implementation.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

# forward + backward, float32, 2 threads of an AMD EPYC (AVX-512) with torch 2.13.0; see benchmarks/results
PLAIN_SCORES = {"cpu": 1 << 16, "cuda": 1 << 16}


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def route(rows: int, keys: int, dtype: torch.dtype, device: torch.device) -> str:
    """"reference", "chunked" or "fused"."""
    if device.type not in PLAIN_SCORES or rows * keys <= PLAIN_SCORES[device.type]:
        return "reference"
    if device.type == "cuda" and dtype.itemsize == 2 and has_triton():
        return "fused"
    return "chunked"
