"""Tile sizes of the Triton kernels, by the families of ``info_nce.configs``; nothing is tuned at import.

Every row is compiled ahead of time for its architectures by the tests, without spills and within shared memory. Not
measured on a GPU yet.
"""

from __future__ import annotations

import torch
import triton

from ..info_nce.configs import INTERPRETER, Config, family

# positions or vectors, columns, numbers before the second layer; for factors of 2 bytes
TILES = {"small": Config(64, 128, 32, 8, 3), "ampere": Config(64, 128, 32, 8, 3), "hopper": Config(64, 128, 64, 8, 3),
         "blackwell": Config(64, 64, 64, 8, 3)}
# of 4 bytes, with TF32 or without
FLOAT32 = {"small": Config(64, 32, 16, 8, 2), "ampere": Config(64, 64, 32, 8, 2), "hopper": Config(64, 64, 16, 8, 2),
           "blackwell": Config(64, 32, 16, 8, 3)}


def tile(device: torch.device, products: torch.dtype) -> Config:
    if device.type == "cpu":
        return INTERPRETER
    return (FLOAT32 if products.itemsize > 2 else TILES)[family(device)]


def whole_row(width: int) -> dict:
    """Arguments of a launch whose programs hold a whole row, and read several (BLOCK_P) at a time."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_H": block, "BLOCK_P": 4 if block <= 4096 else 1,
            "num_warps": 4 if block <= 1024 else 8 if block <= 8192 else 16}
