"""Tile sizes of the Triton kernels, one table for all architectures; nothing is tuned at import.

``small``: cards with 99 KiB of shared memory a block (compute capability 8.6, 8.9, 12.x); ``ampere``: 8.0;
``hopper``: 9.x; ``blackwell``: 10.x. Every row is compiled ahead of time for its architectures by the tests, without
spills and within shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    rows: int  # BLOCK_M
    keys: int  # BLOCK_N
    width: int  # BLOCK_D
    warps: int
    stages: int

    def block(self) -> dict:
        """Arguments of a launch."""
        return {"BLOCK_M": self.rows, "BLOCK_N": self.keys, "BLOCK_D": self.width, "num_warps": self.warps,
                "num_stages": self.stages}

    def tile(self, width: int) -> dict:
        """The same where rows of ``width`` are read block by block."""
        return self.block() | {"EVEN_D": width % self.width == 0}


# kernel: family: bytes of an element: config
SCORES = {
    "small": {2: Config(128, 128, 32, 8, 3), 4: Config(64, 64, 32, 4, 2)},
    "ampere": {2: Config(128, 128, 64, 8, 3), 4: Config(128, 64, 32, 8, 3)},
    "hopper": {2: Config(128, 128, 64, 8, 4), 4: Config(128, 64, 32, 8, 3)},
    "blackwell": {2: Config(128, 128, 64, 8, 4), 4: Config(64, 64, 32, 4, 2)},
}
# scores come from memory; read ahead they would take more registers than there are
EPILOGUE = Config(32, 128, 16, 4, 1)
# the whole width of a row at once: (largest width, config), smallest that fits
ROWS = {
    "small": {2: [(64, Config(128, 64, 64, 8, 2)), (128, Config(64, 64, 128, 4, 2)), (256, Config(64, 32, 256, 8, 2))],
              4: [(64, Config(64, 32, 64, 4, 2)), (128, Config(32, 32, 128, 4, 2)), (256, Config(32, 16, 256, 4, 1))]},
    "ampere": {
        2: [(64, Config(128, 64, 64, 8, 2)), (128, Config(128, 64, 128, 8, 2)), (256, Config(64, 64, 256, 8, 2))],
        4: [(64, Config(64, 64, 64, 8, 2)), (128, Config(64, 32, 128, 8, 2)), (256, Config(32, 32, 256, 8, 1))]},
    "hopper": {
        2: [(64, Config(128, 64, 64, 8, 2)), (128, Config(128, 64, 128, 8, 2)), (256, Config(64, 64, 256, 4, 2))],
        4: [(64, Config(64, 64, 64, 4, 2)), (128, Config(64, 32, 128, 4, 2)), (256, Config(32, 32, 256, 8, 1))]},
    "blackwell": {
        2: [(64, Config(128, 64, 64, 8, 2)), (128, Config(128, 64, 128, 8, 2)), (256, Config(64, 64, 256, 8, 2))],
        4: [(64, Config(64, 32, 64, 4, 2)), (128, Config(32, 32, 128, 4, 2)), (256, Config(32, 16, 256, 4, 1))]},
}
WIDEST = 256  # above, a block of rows of the gradient no longer fits in registers
INTERPRETER = Config(16, 16, 16, 4, 1)


def family(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 6), (8, 9)) or major >= 12 or major < 8:
        return "small"
    return {8: "ampere", 9: "hopper"}.get(major, "blackwell")


def item_bytes(dtype: torch.dtype) -> int:
    return min(dtype.itemsize, 4)


def scores(device: torch.device, dtype: torch.dtype) -> Config:
    return INTERPRETER if device.type == "cpu" else SCORES[family(device)][item_bytes(dtype)]


def epilogue(device: torch.device) -> Config:
    return INTERPRETER if device.type == "cpu" else EPILOGUE


def rows(device: torch.device, dtype: torch.dtype, width: int) -> Config:
    """For width <= WIDEST."""
    if device.type == "cpu":
        return INTERPRETER._replace(width=max(16, 1 << (width - 1).bit_length()))
    return next(config for widest, config in ROWS[family(device)][item_bytes(dtype)] if width <= widest)


def multiprocessors(device: torch.device) -> int:
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
