"""Which implementation ``backend="auto"`` takes, and how the work is cut, as arithmetic and data.

Nothing here imports Triton, but for a constant, so that a compiled function can decide without leaving its graph.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings

import torch

from ..numerics import adds_wider
from .chunked import Plan

# Up to so many scores B N the dense reference is faster than the others. CPU: 2 threads of an AMD EPYC (AVX-512),
# torch 2.13.0, float32, widths 128 and 256, forward and backward, 2026-11-22: 1.06 against 1.42 ms at 256 x 256, 3.08
# against 3.01 at 512 x 512, 18.5 against 14.4 at 1024 x 1024. CUDA: not measured yet.
PLAIN_SCORES = {"cpu": 1 << 17, "cuda": 1 << 17}
LIBRARY_ONE_PASS_ROWS = 1024  # as in chunked, on a GPU


@functools.cache
def triton_problem() -> str:
    """Why Triton launches nothing here, and what to do; "" where it does.

    Before its first launch Triton compiles C code on this machine: where there is a GPU, that is tried here.
    """
    if importlib.util.find_spec("triton") is None:
        return "which is not installed: pip install triton"
    if torch.cuda.is_available():
        try:
            from triton.backends import backends

            # a driver of its own: the one that launches keeps torch's functions as it finds them, maybe simulated ones
            backends["nvidia" if torch.version.hip is None else "amd"].driver().utils  # noqa: B018
        except Exception as error:  # no compiler, no headers, no libcuda, a cache that cannot be written, ...
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return (f"which cannot launch kernels here ({reason}): install a C compiler and Python's headers (on "
                    "Debian: gcc, python3-dev), make TRITON_CACHE_DIR a folder that can be written")
    return ""


@functools.cache
def serves() -> bool:
    if problem := triton_problem():
        warnings.warn(f"plain torch serves instead of Triton, {problem}", stacklevel=2)
    return not problem


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether Triton can launch kernels; if not, a warning says so once."""
    return serves()


@torch.compiler.assume_constant_result
def capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def by_triton(device: torch.device, least: tuple[int, int]) -> bool:
    """Whether the Triton kernels serve: on NVIDIA GPUs (AMD's are "cuda" too) of this compute capability or later."""
    return (device.type == "cuda" and torch.version.cuda is not None and has_triton()
            and capability(device.index or 0) >= least)


def route(rows: int, keys: int, dtype: torch.dtype, device: torch.device) -> str:
    """"reference", "chunked" or "fused"."""
    if device.type not in PLAIN_SCORES or rows * keys <= PLAIN_SCORES[device.type]:
        return "reference"
    # on older cards Triton's products are plain multiply-adds
    return "fused" if dtype.itemsize == 2 and by_triton(device, (8, 0)) else "chunked"


def module_of(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """What computes: "chunked" in plain torch, "library" (chunked with Triton's epilogue) or "fused"."""
    if backend != "chunked" or dtype == torch.float64:
        return backend
    return "library" if by_triton(device, (7, 5)) else "chunked"  # the oldest that Triton compiles for


@torch.compiler.assume_constant_result
def converts(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the library's products on a GPU need such numbers in float32."""
    return device.type == "cuda" and dtype.itemsize == 2 and not adds_wider(dtype, device)


def forms_gradients(rows: int, keys: int, width: int, dtype: torch.dtype, device: torch.device, symmetric: bool,
                    normalize: bool, module: str, workspace_bytes: int) -> bool:
    """Whether the gradient of a sum costs least in the forward: one pass over the scores instead of two."""
    if rows == 0 or module == "fused":
        return False
    if module == "library":
        return library_tile(rows, keys, dtype.itemsize, symmetric, workspace_bytes,
                            width if converts(dtype, device) else 0)[2]
    return Plan.of(rows, keys, width, dtype, symmetric, normalize, workspace_bytes).one_pass


def library_tile(rows: int, keys: int, item: int, symmetric: bool, workspace_bytes: int,
                 converted: int = 0) -> tuple[int, int, bool]:
    """(rows, keys) of a tile of scores, and whether whole rows fit, so that one pass does.

    A score takes 4 bytes, its gradient for 2-byte inputs 2 more, statistics of keys by blocks of rows up to 1.
    ``converted``: the width of inputs that are converted to float32 for products, else 0. A quarter of the workspace
    is for each side then, and a gradient takes 4 bytes more.
    """
    most_rows, most_keys, score = rows, keys, 4 + (item if item < 4 else 0) + (1 if symmetric else 0)
    if converted:
        most = whole_blocks(workspace_bytes // 4 // (4 * converted))
        most_rows, most_keys, score = min(rows, most), min(keys, most), score + 4
        workspace_bytes //= 2
    scores = max(1, workspace_bytes // score)
    if not symmetric and most_keys == keys and min(most_rows, scores // keys) >= min(rows, LIBRARY_ONE_PASS_ROWS):
        return min(most_rows, whole_blocks(scores // keys)), keys, True
    tile_rows = min(most_rows, whole_blocks(math.isqrt(scores)))
    tile_keys = min(most_keys, whole_blocks(scores // tile_rows))
    return min(most_rows, whole_blocks(scores // tile_keys)), tile_keys, False


def whole_blocks(n: int) -> int:
    """Rows of a tile start at aligned addresses, where there are many."""
    return n // 128 * 128 if n >= 128 else max(1, n)
