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


# family: config, for inputs of 2 bytes
STATISTICS = {"small": Config(128, 128, 32, 8, 3), "ampere": Config(128, 128, 32, 8, 3),
              "hopper": Config(128, 128, 64, 8, 3), "blackwell": Config(64, 128, 64, 8, 3)}
GRADIENT = {"small": Config(128, 64, 64, 8, 3), "ampere": Config(128, 64, 64, 8, 3),
            "hopper": Config(128, 64, 64, 8, 3), "blackwell": Config(64, 64, 64, 8, 3)}
# fits in registers without ids, log_q and the other direction
WIDE_GRADIENT = {"small": Config(128, 128, 32, 8, 3), "ampere": Config(128, 128, 64, 8, 3),
                 "hopper": Config(128, 128, 64, 8, 3), "blackwell": Config(128, 128, 64, 8, 3)}
FLOAT32 = Config(64, 64, 16, 8, 3)  # for both, everywhere, with TF32 or without
# scores come from memory; read ahead they would take more registers than there are
EPILOGUE = Config(16, 256, 16, 4, 1)
# bytes of an element: the whole width of a row at once: (largest width, config), smallest that fits. Above, a block of
# rows of the gradient no longer fits in registers
ROWS = {2: [(64, Config(128, 64, 64, 8, 2)), (128, Config(128, 64, 128, 8, 2)), (256, Config(64, 64, 256, 8, 2))],
        4: [(64, Config(64, 32, 64, 8, 2))]}
INTERPRETER = Config(16, 16, 16, 4, 1)


def family(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 6), (8, 9)) or major >= 12 or major < 8:
        return "small"
    return {8: "ampere", 9: "hopper"}.get(major, "blackwell")


def item_bytes(dtype: torch.dtype) -> int:
    return min(dtype.itemsize, 4)


def statistics(device: torch.device, dtype: torch.dtype) -> Config:
    if device.type == "cpu":
        return INTERPRETER
    return STATISTICS[family(device)] if item_bytes(dtype) == 2 else FLOAT32


def gradient(device: torch.device, dtype: torch.dtype, plain: bool) -> Config:
    """plain: neither ids nor log_q, one direction."""
    if device.type == "cpu":
        return INTERPRETER
    if item_bytes(dtype) == 4:
        return FLOAT32
    return (WIDE_GRADIENT if plain else GRADIENT)[family(device)]


def epilogue(device: torch.device) -> Config:
    return INTERPRETER if device.type == "cpu" else EPILOGUE


def rows(device: torch.device, dtype: torch.dtype, width: int) -> Config | None:
    """None where rows are too wide."""
    config = next((config for widest, config in ROWS[item_bytes(dtype)] if width <= widest), None)
    if config is None or device.type != "cpu":
        return config
    return INTERPRETER._replace(width=max(16, 1 << (width - 1).bit_length()))


def multiprocessors(device: torch.device) -> int:
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
