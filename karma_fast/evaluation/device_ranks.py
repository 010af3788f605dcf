"""Ranks of tensors where they lie, by ``karma_kernels.ranks``: for a GPU, whose counts are those of a CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from karma_kernels.ranks import count_ranks, pair_scores

from . import native_ranks
from .catalogue import native
from .counting import Targets, left_out
from .csr import Csr
from .rows import not_finite
from .scores import check_overflow

PAIRS = 1 << 18  # of an item and a target, worked on together
NUMBERS = 1 << 22  # as float64 together


def count(queries: Tensor, items: Tensor, targets: Targets, seen: Csr | None, item_range: tuple[int, int]) \
        -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(T,) greater, ties and candidates among the items in ``item_range``, from checked targets and lists."""
    begin, end = item_range
    longest = [longest_of(name, x) for name, x in (("queries", queries), ("items", items))]
    check_overflow(longest[0] * longest[1])
    query, item = (torch.from_numpy(x).to(queries.device) for x in (targets.query, targets.item))
    score = pair_scores(queries, items, query, item)
    greater, ties = count_ranks(queries, items[begin:end], query, score)
    ties -= ((item >= begin) & (item < end)).long()  # the target itself
    candidates = torch.full_like(greater, end - begin)
    listed = (native_ranks.left_out if native else left_out)(seen, targets, len(items))
    if listed is not None:
        starts, size = torch.from_numpy(targets.starts).to(queries.device), np.diff(targets.starts)
        row, column = np.repeat(np.arange(len(queries)), np.diff(listed[0])), listed[1]
        inside = (column >= begin) & (column < end)
        row, column = row[inside], column[inside]
        pairs = max(1, PAIRS // int(size.max(initial=1)))
        for start in range(0, len(row), pairs):
            rows, columns = (torch.from_numpy(x[start:start + pairs]).to(queries.device) for x in (row, column))
            found = pair_scores(queries, items, rows, columns)
            # one entry for each target of the pair's query
            times = torch.from_numpy(size[row[start:start + pairs]]).to(queries.device)
            pair = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), times)
            nth = torch.arange(len(pair), device=rows.device) - (times.cumsum(0) - times)[pair]
            target = starts[rows[pair]] + nth
            greater.index_add_(0, target, -(found[pair] > score[target]).long())
            ties.index_add_(0, target, -(found[pair] == score[target]).long())
            candidates.index_add_(0, target, -torch.ones_like(target))
    return greater.cpu().numpy(), ties.cpu().numpy(), candidates.cpu().numpy()


def longest_of(name: str, x: Tensor) -> float:
    """Length of the longest row; ValueError for NaN or infinite values, and in what row."""
    longest, rows = 0.0, max(1, NUMBERS // x.shape[1])
    for start in range(0, len(x), rows):
        lengths = x[start:start + rows].double().norm(dim=1)
        most = float(lengths.max())
        if not np.isfinite(most):
            raise not_finite(name, start + int((~lengths.isfinite()).nonzero()[0]))
        longest = max(longest, most)
    return longest
