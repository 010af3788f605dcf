"""Counting ranks against the definition and against ``target_ranks`` on a CPU; a part of ``benchmarks.check``.

Scores must be equal to the last bit and counts equal, at any workspace.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .exact import spread

Shape = tuple[int, int, int]  # queries, items, width
SHAPES = ((33, 300, 64), (130, 5000, 96), (5, 40, 33), (150, 3001, 257), (64, 20_000, 256), (1, 1, 1),
          (700, 20_000, 128), (3, 2, 5), (40, 70_000, 1024))
SMALL = 2e7  # multiply-adds of all scores: what the definition, in plain torch, counts in a second or two
SAMPLED = 3e8  # and what NumPy does if all pairs are close
KINDS = ("plain", "copies", "alike", "last bits", "lengths", "positive", "tiny")
WORKSPACES = (1, 1 << 18, 1 << 22, 64 << 20)  # bytes; the small ones make many parts, and lists that overflow
DTYPES = ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16))


@dataclass
class Problem:
    """On a CPU; the targets of query i are ``chosen[starts[i]:starts[i + 1]]``."""

    queries: Tensor  # (Q, D)
    items: Tensor  # (N, D)
    starts: Tensor  # (Q + 1,) int64
    chosen: Tensor  # (T,) int64, different ones in a query

    @property
    def rows(self) -> Tensor:
        """(T,) each target's query."""
        return torch.repeat_interleave(torch.arange(len(self.queries)), self.starts.diff())


def draw(shape: Shape, dtypes: tuple[torch.dtype, torch.dtype], kind: str, seed: int) -> Problem:
    """One to three targets a query. The kinds: normal numbers; copies of one item, or nothing else; items that differ
    in their last bits; of very different lengths; positive numbers; scores at the lower end of float32."""
    num_queries, num_items, width = shape
    g = torch.Generator().manual_seed(seed)
    queries, items = torch.randn(num_queries, width, generator=g), torch.randn(num_items, width, generator=g)
    if kind == "copies":
        items[num_items // 4:num_items // 2] = items[0].clone()
    elif kind in ("alike", "last bits"):
        items[:] = items[0].clone()
    elif kind == "lengths":
        items *= torch.logspace(-2, 2, num_items)[:, None]
    elif kind == "positive":
        queries, items = 1 + 1e-3 * queries.abs(), 1 + 1e-3 * items.abs()
    elif kind == "tiny":
        queries, items = queries * 2.0**-70, items * 2.0**-70
    queries, items = queries.to(dtypes[0]), items.to(dtypes[1])
    if kind == "last bits":
        each = torch.arange(num_items)
        items[each, each % width] *= 1 + 2 * torch.finfo(dtypes[1]).eps
    counts = torch.randint(1, 1 + min(3, num_items), (num_queries,), generator=g)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    step = max(1, num_items // 3)  # the targets of a query are this far apart, so they differ
    nth = torch.arange(int(starts[-1])) - torch.repeat_interleave(starts[:-1], counts)
    first = torch.repeat_interleave(torch.randint(num_items, (num_queries,), generator=g), counts)
    return Problem(queries, items, starts, (first + nth * step) % num_items)


def operations(shape: Shape) -> int:
    """Multiply-adds of the scores, at most three targets a query."""
    return 3 * shape[0] * shape[1] * shape[2]


@dataclass
class Truth:
    """What is expected, on a CPU."""

    scores: Tensor  # (T,)
    judged: Tensor  # (J,) int64: the targets whose counts are known
    above: Tensor  # (J,)
    level: Tensor  # (J,) the target included


def truth(problem: Problem) -> Truth:
    """By the definition where that is quick, else by ``target_ranks``: of all targets, or without its C++ extension,
    which settles close pairs quickly, of some."""
    from karma_fast.evaluation import paths, target_ranks
    from karma_kernels.ranks import reference

    queries, items, rows, chosen = problem.queries, problem.items, problem.rows, problem.chosen
    scores = reference.pair_scores(queries, items, rows, chosen)
    if len(chosen) * items.numel() <= SMALL:
        return Truth(scores, torch.arange(len(chosen)), *reference.count_ranks(queries, items, rows, scores))
    most = None if paths() else max(1, int(SAMPLED // items.numel()))
    judged = spread(len(chosen), most, torch.device("cpu"))
    ranks = target_ranks(queries[rows[judged]], items, chosen[judged])
    return Truth(scores, judged, torch.from_numpy(ranks.greater), torch.from_numpy(ranks.ties) + 1)


def check(problem: Problem, expected: Truth, device: str, workspace_bytes: int) -> str:
    """What is wrong, or ""."""
    from karma_kernels.ranks import count_ranks, pair_scores

    queries, items, rows, chosen = (x.to(device) for x in (problem.queries, problem.items, problem.rows,
                                                           problem.chosen))
    scores = pair_scores(queries, items, rows, chosen)
    above, level = count_ranks(queries, items, rows, scores, workspace_bytes=workspace_bytes)
    differ = int((scores.cpu() != expected.scores).sum())
    if differ:
        return f"{differ} of {len(scores)} scores are not those of the definition"
    for name, found, right in (("above", above, expected.above), ("level", level, expected.level)):
        differ = int((found.cpu()[expected.judged] != right).sum())
        if differ:
            return f"{differ} of {len(right)} counts of items {name} differ"
    return ""


def shapes_for(device: str) -> list[Shape]:
    """Without Triton kernels for the device, only what the definition itself can count in a second or two."""
    from karma_kernels.ranks import on_gpu

    kernels = on_gpu(torch.empty(0, device=device))
    return [shape for shape in SHAPES if kernels or operations(shape) <= SMALL]


def combinations(rounds: int, shapes: list[Shape]) -> Iterator[tuple[Shape, tuple, str]]:
    """Every pair of dtypes and kind once a round, each time with another shape; tiny scores only where the definition
    counts."""
    kinds = list(itertools.product(DTYPES, KINDS))
    random.Random(0).shuffle(kinds)  # so that little time still sees all of both
    for at in range(rounds):
        for number, (dtypes, kind) in enumerate(kinds):
            fit = [shape for shape in shapes if kind != "tiny" or operations(shape) <= SMALL]
            yield fit[(number + at * 2) % len(fit)], dtypes, kind
