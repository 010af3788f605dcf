"""Which catalogues are ranked, most important first, and inputs made from a seed, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..cases import SHORT, unit_vectors

KS = (1, 10, 200)  # cut-offs of the hit rate
KINDS = ("trained", "untrained")
SEEN = 50  # items left out of each query's ranking, at most: half of them such as rank high
CHUNK = 16384  # items drawn at a time
NEAR = 65536  # of the first so many items those that rank high are taken


@dataclass(frozen=True)
class Case:
    """``queries`` with one target each against ``items`` of ``width``, all of one dtype.

    trained: a query is a noisy copy of its target, and 50 to 70% of the targets are among the first 200. untrained: it
    has nothing to do with its target, which lies anywhere in the ranking, most often where items are dense.
    """

    queries: int
    items: int
    width: int
    kind: str = "trained"
    dtype: str = "float32"
    seen: bool = True  # items are left out; else all are ranked

    @property
    def name(self) -> str:
        """What is not the rule is said: the dtype if not float32, and "all" if all items are ranked."""
        more = [SHORT[self.dtype]] * (self.dtype != "float32") + ["all"] * (not self.seen)
        return "-".join([f"{self.queries}x{self.items}x{self.width}", self.kind, *more])

    @classmethod
    def parse(cls, name: str) -> Case:
        """The reverse of ``name``.

        >>> Case.parse("512x100000x64-untrained-bf16")
        Case(queries=512, items=100000, width=64, kind='untrained', dtype='bfloat16', seen=True)
        """
        shape, kind, *more = name.split("-") if "-" in name else (name, "")
        sizes = shape.split("x")
        dtypes = {short: dtype for dtype, short in SHORT.items() if dtype != "float32"}
        dtype = dtypes[more.pop(0)] if more and more[0] in dtypes else "float32"
        if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes) or kind not in KINDS or \
                int(sizes[1]) <= SEEN or more not in ([], ["all"]):
            raise ValueError(f"case {name!r}: 512x100000x64-trained is the form, queries x items x width with more "
                             f"than {SEEN} items, and {' or '.join(KINDS)}; behind that -bf16 or -fp16, and -all")
        return cls(*map(int, sizes), kind, dtype, not more)

    @property
    def flops(self) -> int:
        """Multiplications and additions of every score once. Over the matrix peak: the least time in float32."""
        return 2 * self.queries * self.items * self.width

    @property
    def least_bytes(self) -> int:
        """Everything as float32, once. At B bytes/s no float32 code is faster than this over B."""
        return 4 * self.width * (self.items + self.queries)


def cpu_cases() -> list[Case]:
    """A small, a middle and a large catalogue at three widths; queries such that torch takes a second or less."""
    million = 10**6
    return [Case(512, 100_000, 256), Case(2048, 12_101, 64), Case(128, million, 64), Case(512, 100_000, 64),
            Case(512, 100_000, 256, "untrained"), Case(2048, 12_101, 256), Case(256, 100_000, 1024),
            Case(64, million, 256), Case(1024, 12_101, 1024), Case(256, 100_000, 1024, "untrained"),
            Case(64, million, 1024)]


def gpu_cases() -> list[Case]:
    """A million items first, then smaller catalogues; queries as many as a test set has."""
    million = 10**6
    return [Case(20_000, million, 256), Case(20_000, million, 256, seen=False), Case(8192, 100_000, 256),
            Case(22_363, 12_101, 256), Case(20_000, million, 256, "untrained"),
            Case(20_000, million, 256, dtype="bfloat16"), Case(8192, million, 1024), Case(8192, million, 64),
            Case(20_000, million, 256, "untrained", "bfloat16", seen=False),
            Case(8192, million, 1024, "untrained"), Case(8192, million, 1024, dtype="bfloat16"),
            Case(8192, million, 64, "untrained"), Case(8192, 100_000, 256, "untrained"),
            Case(22_363, 12_101, 256, "untrained")]


def cases_for(device: str) -> list[Case]:
    return gpu_cases() if device == "cuda" else cpu_cases()


@dataclass
class Inputs:
    queries: Tensor  # (Q, D)
    items: Tensor  # (N, D)
    targets: Tensor  # (Q,) int64
    seen: tuple[np.ndarray, np.ndarray]  # indptr (Q + 1,) and item numbers, rising in a query; never its target


def signal(case: Case) -> float:
    """Share of the target in a trained query, the rest being noise. Fitted to HR@200 of 0.5 to 0.7 from 12,101 to a
    million items and from width 64 to 1024.

    >>> round(signal(Case(1, 100_000, 256)), 2)
    0.34
    """
    return 0.41 * (64 / case.width) ** 0.13 * math.sqrt(math.log10(case.items) / 5)


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Made on the device; the lists of what was seen are arrays, as histories are."""
    generator = torch.Generator(device).manual_seed(seed)
    items = torch.empty(case.items, case.width, device=device)
    for rows in items.split(CHUNK):
        rows.copy_(unit_vectors(len(rows), case.width, generator))
    targets = torch.randint(case.items, (case.queries,), generator=generator, device=device)
    queries = unit_vectors(case.queries, case.width, generator)
    if case.kind == "trained":
        share = signal(case)
        queries = normalize(share * items[targets] + (1 - share) * queries)
    seen = seen_lists(case, queries, items, targets, generator) if case.seen else \
        (np.zeros(case.queries + 1, np.int64), np.zeros(0, np.int64))
    dtype = getattr(torch, case.dtype)
    return Inputs(queries.to(dtype), items.to(dtype), targets, seen)


def seen_lists(case: Case, queries: Tensor, items: Tensor, targets: Tensor,
               generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Items that a hit may hang on, as histories hold what is like the next item, and any others."""
    high = torch.cat([(part @ items[:NEAR].T).topk(SEEN).indices[:, ::2] for part in queries.split(256)])
    drawn = torch.randint(case.items, (case.queries, SEEN // 2), generator=generator, device=high.device)
    row = np.arange(case.queries)
    pairs = np.setdiff1d(torch.cat([high, drawn], 1).cpu().numpy() + row[:, None] * case.items,
                         targets.cpu().numpy() + row * case.items)  # one number for (query, item); each once, in order
    row, seen = np.divmod(pairs, case.items)
    return np.searchsorted(row, np.arange(case.queries + 1)), seen
