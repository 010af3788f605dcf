"""Counting on a GPU: the items in parts that fit in the workspace, filtered, and settled by exact chains.

Work for T targets, N items, width D: 2 T N D operations on tensor cores, about 5 instructions for each of T N scores
beside them, N D (4 + 4 + 2) bytes to make float16 copies of float32 items, and 4 D bytes for each close pair. For
T = 20,000, N = 1,000,000, D = 256 on an H100 (798 TFLOP/s and 3.0 TB/s measured): 12.8 ms, 3.5 ms, 0.9 ms, and 7 ms
for each thousandth of the pairs that is close. In exact chains alone the same is 5.1 T multiply-adds, at the card's
33 T/s 153 ms. (All by arithmetic; no time of these kernels is measured yet.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..info_nce.problem import pieces
from . import configs
from .launch import (
    LISTED_ROWS,
    Close,
    Copies,
    Thresholds,
    copy_width,
    launch_exact,
    launch_filter,
    launch_resolve,
    power_of_two,
)

# A listed pair is settled at the speed of memory (4 D bytes, at 3 TB/s 0.34 ns for D = 256), one of a whole tile at
# that of multiply-adds (D of them, at 20 T/s 0.013 ns): beyond one close pair in so many, whole tiles cost less.
CLOSE_ONE_IN = 32
WIDEST = 1 << 16  # the margin takes D 2^-24 to be small; wider rows are counted exactly


class Plan(NamedTuple):
    """How much is worked on at once; at least one tile of each, however small the workspace."""

    targets: int
    items: int
    listed: int  # pairs
    columns: int  # float32 numbers of both sides, for whole exact tiles

    @staticmethod
    def of(dim: int, device: torch.device, workspace_bytes: int) -> Plan:
        tile, exact, width = configs.filter_tile(device), configs.exact_tile(device), copy_width(dim)
        targets, items = (min(LISTED_ROWS, max(1, share // (2 * width) // block) * block) for share, block in (
            (workspace_bytes // 8, tile.targets), (workspace_bytes * 3 // 8, tile.items)))
        # an eighth and three eighths for copies, a quarter for the list, a quarter for columns and what they come from
        return Plan(targets, items, min(1 << 30, max(1, workspace_bytes // 4 // 4)),
                    max(workspace_bytes // 4 // 6, 2 * dim * exact["BLOCK_N"]))


def count_ranks(queries: Tensor, items: Tensor, query_rows: Tensor, scores: Tensor, workspace_bytes: int,
                filtered: bool) -> tuple[Tensor, Tensor]:
    """(T,) and (T,) int64; see :func:`karma_kernels.ranks.count_ranks`. ``filtered``: with tensor cores."""
    (num_items, dim), device, total = items.shape, items.device, len(scores)
    greater, equal = torch.zeros((2, total), dtype=torch.int64, device=device)
    if total == 0 or num_items == 0:
        return greater, equal
    plan = Plan.of(dim, device, workspace_bytes)
    if not filtered or dim > WIDEST:
        buffer = torch.empty(plan.columns, dtype=torch.float32, device=device)
        launch_exact(queries, items, query_rows, scores, greater, equal, buffer)
        return greater, equal
    tile, width = configs.filter_tile(device), copy_width(dim)
    targets, part = (min(most, -(-count // block) * block) for most, count, block in (
        (plan.targets, total, tile.targets), (plan.items, num_items, tile.items)))
    target_buffer, item_buffer = (torch.empty(n * width, dtype=torch.float16, device=device) for n in (targets, part))
    pairs = torch.empty(plan.listed, dtype=torch.int32, device=device)
    query_scale = power_of_two(torch.linalg.vector_norm(queries, torch.inf, dim=1))
    size = targets  # at once, for the list to hold the close pairs
    for t in pieces(0, total, targets):
        copies = Copies.of(queries, query_rows[t], query_scale, tile.targets, target_buffer)
        for p in pieces(0, num_items, part):
            rows = items[p]
            scale = power_of_two(torch.linalg.vector_norm(rows, torch.inf).view(1))
            item_copies = Copies.of(rows, None, scale, tile.items, item_buffer)
            limits = Thresholds.of(scores[t], copies, item_copies, dim, tile.items)
            size = count_part(queries, rows, query_rows[t], scores[t], copies.values, item_copies, limits, pairs, size,
                              plan.columns, greater[t], equal[t])
    return greater, equal


def count_part(queries: Tensor, items: Tensor, query_rows: Tensor, scores: Tensor, targets: Tensor, copies: Copies,
               limits: Thresholds, pairs: Tensor, size: int, columns: int, greater: Tensor,
               equal: Tensor) -> int:
    """Adds one part of the items to the counts, some targets at a time; returns how many went at once in the end.

    Waits for the device once for each group of targets, to learn how many pairs are close. What the filter counts is
    added only if the list held all of them: else the group is made smaller, or counted in whole exact tiles. A list
    that stays short lets the groups grow again.
    """
    block, start = configs.filter_tile(items.device).targets, 0
    while start < len(scores):
        r = slice(start, min(start + size, len(scores)))
        count = r.stop - start
        above = torch.zeros(count, dtype=torch.int32, device=items.device)
        close = Close.empty(pairs)
        launch_filter(targets[start:], copies, limits.rows(r), len(items), above, close)
        found = int(close.found)
        if found <= len(pairs):
            greater[r] += above
            launch_resolve(queries, items, query_rows[r], scores[r], pairs, found, greater[r], equal[r])
            if 4 * found < len(pairs):
                size = min(2 * size, LISTED_ROWS)
        elif count <= block or found * CLOSE_ONE_IN > count * len(items):
            buffer = torch.empty(columns, dtype=torch.float32, device=items.device)
            launch_exact(queries, items, query_rows[r], scores[r], greater[r], equal[r], buffer)
        else:  # room for twice as many as expected
            size = max(block, int(count * len(pairs) / (2 * found)) // block * block)
            continue
        start = r.stop
    return size
