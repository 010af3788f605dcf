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


# family: (statistics, gradient of a tile), for inputs of 2 bytes
FULL = {"small": (Config(64, 128, 64, 8, 3), Config(128, 64, 64, 8, 3)),
        "ampere": (Config(64, 128, 64, 8, 3), Config(128, 64, 64, 8, 3)),
        "hopper": (Config(64, 128, 64, 8, 3), Config(128, 64, 64, 8, 3)),
        "blackwell": (Config(64, 128, 64, 8, 3), Config(64, 64, 64, 8, 3))}
# without ids, log_q and the other direction more scores fit in registers
PLAIN = {"small": (Config(128, 128, 32, 8, 3), Config(128, 128, 32, 8, 3)),
         "ampere": (Config(128, 128, 32, 8, 3), Config(128, 128, 64, 8, 3)),
         "hopper": (Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 3)),
         "blackwell": (Config(128, 128, 32, 8, 3), Config(128, 128, 64, 8, 3))}
# both, for inputs of 4 bytes, with TF32 or without
FLOAT32 = {"small": Config(64, 64, 16, 8, 2), "ampere": Config(64, 64, 16, 8, 3), "hopper": Config(64, 64, 16, 8, 3),
           "blackwell": Config(64, 64, 32, 8, 2)}
# scores come from memory; read ahead they would take more registers than there are
EPILOGUE = Config(32, 128, 16, 8, 1)
# the whole width of a row at once: (largest width, config), smallest that fits. Above, a block of rows of the gradient
# no longer fits in registers
_HALF = [(64, Config(128, 64, 64, 8, 2)), (128, Config(64, 64, 128, 8, 2)), (256, Config(64, 64, 256, 8, 2))]
_WHOLE = [(64, Config(128, 64, 64, 8, 2)), (128, Config(128, 64, 128, 8, 2)), (256, Config(64, 64, 256, 8, 2))]
ROWS = {"small": _HALF, "ampere": _HALF, "hopper": _WHOLE, "blackwell": _WHOLE}
ROWS_FLOAT32 = [(64, Config(64, 32, 64, 8, 2))]
INTERPRETER = Config(16, 16, 16, 4, 1)


def family(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 6), (8, 9)) or major >= 12 or major < 8:
        return "small"
    return {8: "ampere", 9: "hopper"}.get(major, "blackwell")


def tiles(device: torch.device, dtype: torch.dtype, plain: bool) -> tuple[Config, Config]:
    """For the statistics and for the gradient; plain: neither ids nor log_q, one direction."""
    if device.type == "cpu":
        return INTERPRETER, INTERPRETER
    if dtype.itemsize > 2:
        return FLOAT32[family(device)], FLOAT32[family(device)]
    return (PLAIN if plain else FULL)[family(device)]


def epilogue(device: torch.device) -> Config:
    return INTERPRETER if device.type == "cpu" else EPILOGUE


def rows(device: torch.device, dtype: torch.dtype, width: int) -> Config | None:
    """None where rows are too wide."""
    if device.type == "cpu":
        return INTERPRETER._replace(width=max(16, 1 << (width - 1).bit_length()))
    configs = ROWS_FLOAT32 if dtype.itemsize > 2 else ROWS[family(device)]
    return next((config for widest, config in configs if width <= widest), None)


def multiprocessors(device: torch.device) -> int:
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
