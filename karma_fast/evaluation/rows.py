"""Matrices of vectors as they come: arrays, memory maps and tensors, in float32 or half precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PIECE = 65536  # rows looked at together
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass
class Rows:
    """(n, D) row by row, not copied where it already lies so.

    Attributes:
        array: float32, float16, or for bfloat16, which numpy does not have, its bits as uint16.
        storage: float32 | float16 | bfloat16.
    """

    array: np.ndarray
    storage: str

    def __len__(self) -> int:
        return self.array.shape[0]

    @property
    def width(self) -> int:
        return self.array.shape[1]

    def float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop; the array itself if it is float32."""
        part = self.array[start:stop]
        if self.storage == "bfloat16":
            return (part.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(part, dtype=np.float32)

    @classmethod
    def of(cls, name: str, x: Any) -> Rows:
        """Checks shape and dtype, not the values; ValueError if they do not fit.

        >>> Rows.of("items", torch.ones(2, 3).bfloat16()).float32().tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
        """
        if isinstance(x, cls):
            return x
        tensor = x.detach().cpu() if isinstance(x, torch.Tensor) else None
        array = np.asarray(x) if tensor is None else None
        dtype = tensor.dtype if array is None else getattr(torch, array.dtype.name, array.dtype)
        check_kind(name, (tensor if array is None else array).shape, dtype)
        if array is None:
            tensor = tensor.contiguous()
            array = tensor.view(torch.uint16).numpy() if dtype == torch.bfloat16 else tensor.numpy()
        if array.dtype.name == "bfloat16":  # of the package ml_dtypes
            array = array.view(np.uint16)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        array = np.require(array, requirements=["C", "ALIGNED"])
        # one row may still run backwards, which torch does not take
        return cls(array.copy() if min(array.strides) < 0 else array, DTYPES[dtype])


def check_kind(name: str, shape: Sequence[int], dtype: Any) -> None:
    """ValueError unless these are rows in a dtype that can be ranked."""
    if len(shape) != 2 or dtype not in DTYPES:
        raise ValueError(f"{name}: got shape {tuple(shape)}, dtype {dtype}; (rows, width) in float32, float16 or "
                         "bfloat16 is needed")


def not_finite(name: str, row: int) -> ValueError:
    return ValueError(f"{name}: NaN or infinite values in row {row} cannot be ranked; the model that made them has "
                      "diverged")


def check_finite(name: str, rows: Rows) -> None:
    """ValueError for NaN or infinite values."""
    for start in range(0, len(rows), PIECE):
        bad = ~np.isfinite(rows.float32(start, start + PIECE)).all(axis=1)
        if bad.any():
            raise not_finite(name, start + int(bad.argmax()))


def check_widths(queries: int, items: int, num_items: int) -> None:
    """ValueError unless each query can be multiplied with each item, and there are items."""
    if queries != items or queries == 0:
        raise ValueError(f"queries have width {queries} and items {items}; the same width >= 1 is needed")
    if num_items == 0:
        raise ValueError("items: the catalogue is empty")
