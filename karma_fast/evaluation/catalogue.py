"""A catalogue's vectors, and the packed copies that the C++ extension compares queries with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .rows import Rows, check_finite

try:
    import karma_fast._C as native

    failure = ""
except ModuleNotFoundError:  # built without a compiler
    native, failure = None, ""
except ImportError as error:  # built where the C++ library, for one, is another
    native, failure = None, str(error)

# what is wrong with the extension where there is none, and what to do
ABSENCE = (f"cannot be loaded ({failure})", "install karma-fast again, so that it is built for this machine") \
    if failure else ("was not built", "install a C++17 compiler (on Debian and Ubuntu: apt install g++ python3-dev) "
                     "and then karma-fast again")

FEW = 64  # queries that are not worth packing for a filter
SHALLOW = 300  # items for each of the k best
# Queries from which on torch is faster than a portable filter, on one thread of an Intel Xeon with AVX-512, ms: 16 x
# 12,000 x 256: 13.4 / 16.3 by torch, 32 x 12,000 x 64: 7.0 / 6.6, 128 x 12,000 x 256: 93 / 38.
MANY = 32
PART_BYTES = 1 << 30  # of packed copies at a time, for a catalogue that is used once


def paths() -> dict[str, str]:
    """What can run here: the name of each path, and what it computes in, the fastest first.

    "exact": float32 in the defined order. Others filter in less, and what their error bound leaves open is decided in
    float32. Results are the same for all.
    """
    return dict(native.paths()) if native else {}


class Catalogue:
    """Items to rank among, packed once and used by many calls in place of their vectors.

    Args:
        items: (N, D) float32, float16 or bfloat16, array, memory map or tensor. Not copied; must not change.
        path: pack at once for this path (see :func:`paths`); "auto" packs at the first use, for the path that suits
            the queries.
        threads: for packing; 0 takes torch's setting.

    Raises:
        ValueError: wrong shape or dtype, no items, an unknown path, NaN or infinite values (seen when packing).

    Attributes:
        rows: the vectors. nbytes: of the packed copies so far.

    Example:
        >>> import numpy as np
        >>> from karma_fast.evaluation import target_ranks
        >>> catalogue = Catalogue(np.eye(4, dtype=np.float32))
        >>> target_ranks(np.array([[0.1, 0.9, 0.2, 0.2]], np.float32), catalogue, [2]).expected
        array([1.5])
    """

    def __init__(self, items: Any, *, path: str = "auto", threads: int = 0) -> None:
        self.rows = Rows.of("items", items)
        if len(self.rows) == 0 or self.rows.width == 0:
            raise ValueError(f"items: the catalogue is empty, its shape is {self.rows.array.shape}")
        check_path(path)
        self._packed: dict[str, Any] = {}
        self.kept = True
        if path not in ("auto", "torch"):
            self.pack(path, threads)
        elif not native or path == "torch":
            check_finite("items", self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes for packed in self._packed.values())

    def pack(self, path: str, threads: int = 0) -> Any:
        """The packed copy for a path, made at the first call."""
        if path not in self._packed:
            self._packed[path] = pack(self.rows, path, 0, len(self), threads)
        return self._packed[path]

    def holds(self, path: str) -> bool:
        return path in self._packed

    def parts(self, path: str, begin: int, end: int, threads: int) -> Iterator[Any]:
        """Packed copies that together hold items begin..end; all of it in one if it is kept."""
        size = len(self) if self.kept else max(1024, PART_BYTES // native.item_bytes(path, self.rows.width))
        if self.kept or (begin == 0 and end == len(self) and end <= size):
            yield self.pack(path, threads)
            return
        for start in range(begin, end, size):
            yield pack(self.rows, path, start, min(start + size, end), threads)

    @classmethod
    def passing(cls, items: Any) -> Catalogue:
        """For vectors that were given to one call: a large catalogue is packed part by part and forgotten."""
        out = cls(items)
        out.kept = False
        return out


def pack(rows: Rows, path: str, begin: int, end: int, threads: int) -> Any:
    return native.Items(rows.array, rows.storage, path, begin, end, thread_count(threads))


def by_torch(rows: Rows, queries: int, path: str, largest_k: int | None = None) -> bool:
    """Whether torch ranks: where there is no extension, and where it has nothing for this kind of CPU, whose products
    torch has. Few queries, early stops and items that torch would copy as float32 stay with the extension."""
    if path != "auto" or not native:
        return path == "torch" or not native
    return (paths() == {"portable": "float32"} and queries >= MANY and largest_k is None
            and rows.storage == "float32")


def count_path(catalogue: Catalogue, queries: int, path: str) -> str:
    """The fastest path; for few queries and a catalogue that is used once, the one that packs fastest."""
    if path != "auto":
        return path
    quick = queries < FEW and not catalogue.kept
    return first_of("bfloat16", "exact") if quick else first_of()


def top_k_path(catalogue: Catalogue, queries: int, k: int, path: str) -> str:
    """Likewise. A filter pays once the catalogue is large against k: until then most of the time goes into the
    candidates."""
    if path != "auto":
        return path
    return first_of("exact") if len(catalogue) < SHALLOW * k else count_path(catalogue, queries, path)


def first_of(*meanings: str) -> str:
    """The first path that computes in the first of these that any path computes in; else the first path."""
    known = paths()
    for meaning in meanings:
        for name in known:
            if known[name] == meaning:
                return name
    return next(iter(known))


def check_path(path: str) -> None:
    known = ["auto", "torch", *paths()]
    if path not in known:
        raise ValueError(f"path: got {path!r}; this machine has {', '.join(known)}"
                         + ("" if native else f" (the C++ extension {ABSENCE[0]}, see `karma-fast doctor`)"))


def thread_count(threads: int) -> int:
    """0 means torch's own number, so that both together do not ask for more than there is."""
    if isinstance(threads, bool) or not isinstance(threads, int) or not 0 <= threads < 2**31:
        raise ValueError(f"threads: got {threads!r}; 0 or a positive number below 2**31 is needed")
    return threads or torch.get_num_threads()
