"""Tile sizes of the Triton kernels of ranks, one table for all architectures; nothing is tuned at import.

Families as in ``karma_kernels/info_nce/configs.py``. Every row is compiled ahead of time by the tests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..info_nce.configs import family


class Filter(NamedTuple):
    targets: int  # BLOCK_M
    items: int  # BLOCK_N
    width: int  # BLOCK_D
    warps: int
    stages: int
    registers: int | None  # of a thread at most: with 128 two blocks of 256 threads share a multiprocessor

    def block(self) -> dict:
        return {"BLOCK_M": self.targets, "BLOCK_N": self.items, "BLOCK_D": self.width, "num_warps": self.warps,
                "num_stages": self.stages, "maxnreg": self.registers}


FILTER = {"small": Filter(128, 64, 64, 8, 3, 128), "ampere": Filter(128, 128, 32, 8, 4, None),
          "hopper": Filter(128, 128, 64, 8, 3, 128), "blackwell": Filter(128, 128, 64, 8, 3, 128)}
INTERPRETER = Filter(16, 16, 16, 4, 1, None)
# wide, so that a thread has whole columns of targets and neighbouring items and reads 16 bytes at once
EXACT = {"BLOCK_M": 32, "BLOCK_N": 256, "UNROLL": 2, "num_warps": 4}
EXACT_INTERPRETER = EXACT | {"BLOCK_M": 16, "BLOCK_N": 16}
COPY_WIDTH = 64  # copies are padded to multiples, which the width of every tile divides
ROWS = {"BLOCK_R": 8, "BLOCK_D": COPY_WIDTH, "num_warps": 4}
PAIRS = {"BLOCK": 128, "num_warps": 4}  # a thread each


def filter_tile(device: torch.device) -> Filter:
    return INTERPRETER if device.type == "cpu" else FILTER[family(device)]


def exact_tile(device: torch.device) -> dict:
    return EXACT_INTERPRETER if device.type == "cpu" else EXACT
