"""Lists of different lengths as a pair of arrays: list i is ``indices[indptr[i]:indptr[i + 1]]``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..data.flat import spans

Csr = tuple[np.ndarray, np.ndarray]


def csr_from_lists(lists: Iterable[Sequence[int]]) -> Csr:
    """Lists of item numbers -> (indptr (n + 1,), indices) int64.

    >>> csr_from_lists([[3, 1], [], [2]])
    (array([0, 2, 2, 3]), array([3, 1, 2]))
    """
    lists = [np.asarray(part, dtype=np.int64) for part in lists]
    indptr = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(part) for part in lists], out=indptr[1:])
    return indptr, np.concatenate(lists) if lists else np.zeros(0, np.int64)


def csr_ranges(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Csr:
    """Row i becomes ``values[starts[i]:ends[i]]``, without a loop over rows.

    >>> csr_ranges(np.array([5, 6, 7, 8]), np.array([0, 2]), np.array([3, 2]))
    (array([0, 3, 3]), array([5, 6, 7]))
    """
    starts, lengths = np.asarray(starts, np.int64), np.asarray(ends, np.int64) - np.asarray(starts, np.int64)
    if (lengths < 0).any():
        raise ValueError(f"range {int(np.argmax(lengths < 0))} ends before it starts")
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return indptr, np.asarray(values)[spans(starts, lengths)].astype(np.int64)


def csr_rows(csr: Csr, start: int, stop: int) -> Csr:
    """Rows start to stop, or to the last.

    >>> csr_rows(csr_from_lists([[3, 1], [4], [2]]), 1, 3)
    (array([0, 1, 2]), array([4, 2]))
    """
    indptr, indices = csr
    indptr = indptr[start:stop + 1]
    return indptr - indptr[0], indices[indptr[0]:indptr[-1]]


def seen_before(sequences: Any, positions: np.ndarray) -> Csr:
    """What each request's user chose earlier: the pair to pass as ``seen``.

    Args:
        sequences: :class:`karma_fast.data.Sequences`.
        positions: (T,) flat positions of the targets.
    """
    positions = np.asarray(positions, np.int64)
    return csr_ranges(sequences.items, sequences.indptr[sequences.user_of(positions)], positions)


def check_csr(name: str, csr: Any, rows: int, num_items: int) -> Csr:
    """int64 copies of a well-formed pair; ValueError with the first thing that is wrong otherwise."""
    if not isinstance(csr, (tuple, list)) or len(csr) != 2:
        raise ValueError(f"{name}: got {type(csr).__name__}; a pair (indptr, indices) is needed")
    indptr, indices = (check_integers(f"{name} {part}", x) for part, x in zip(("indptr", "indices"), csr, strict=True))
    if len(indptr) != rows + 1:
        raise ValueError(f"{name}: indptr has {len(indptr)} entries; {rows + 1} are needed for {rows} queries")
    if indptr[0] != 0 or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any():
        raise ValueError(f"{name}: indptr must rise from 0 to the number of indices ({len(indices)}); got "
                         f"{indptr[0]} to {indptr[-1]}" + (", not rising" if (np.diff(indptr) < 0).any() else ""))
    check_range(name, indices, num_items)
    return indptr, indices


def check_integers(name: str, x: Any) -> np.ndarray:
    """(n,) integers, array or tensor -> int64 array."""
    x = x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)
    if x.size == 0 and not np.issubdtype(x.dtype, np.integer):
        x = x.astype(np.int64)  # an empty list has no integer type of its own
    if x.ndim != 1 or not np.issubdtype(x.dtype, np.integer):
        raise ValueError(f"{name}: got shape {x.shape}, dtype {x.dtype}; integers in one dimension are needed")
    return x.astype(np.int64)


def check_range(name: str, indices: np.ndarray, num_items: int) -> None:
    if len(indices) and not 0 <= indices.min() <= indices.max() < num_items:
        raise ValueError(f"{name}: got items {indices.min()} to {indices.max()}; the catalogue has 0 to "
                         f"{num_items - 1}")
