"""Exact ranks and the k best items with torch alone, for where the C++ extension was not built.

Products in float64 settle all pairs but those whose score lies within the rounding error of the target's; these few
are computed as defined (``karma_fast/evaluation/scores.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from .counting import TargetCounts, Targets
from .csr import Csr
from .scores import error_bound, pair_scores

ITEM_PANEL = 8192  # with the 512 targets of a block 32 MB of float64 scores at a time
ROW_BYTES = 64 << 20  # of whole rows of scores in best_items


def count(queries: np.ndarray, items: np.ndarray, targets: Targets, seen: Csr | None, item_range: tuple[int, int],
          threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(T,) greater, ties and candidates among the items in ``item_range``, from checked input in float32."""
    begin, end = item_range
    goal = TargetCounts(targets, len(items), seen, item_range)
    margin = error_bound(queries, items)
    exact = pair_scores(queries, items, goal.query, goal.item)
    with limited(threads):
        wide = torch.from_numpy(queries).double()
        for first_item in range(begin, end, ITEM_PANEL):
            panel = torch.from_numpy(items[first_item:min(first_item + ITEM_PANEL, end)]).double().T
            for start, stop, rows in goal.blocks():
                first = rows.start

                def decide(row, column, first_item=first_item, first=first):
                    return pair_scores(queries, items, row + first, column + first_item)

                goal.count(wide[rows] @ panel, start, stop, first, first_item, exact, margin, decide)
    return goal.greater, goal.ties, goal.candidates


def best_items(queries: np.ndarray, items: np.ndarray, k: int, seen: Csr | None, threads: int) \
        -> tuple[np.ndarray, np.ndarray]:
    """As :func:`karma_fast.evaluation.top_k`, of checked input."""
    margin = 2 * error_bound(queries, items)
    best, found = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    size, take = max(1, ROW_BYTES // (8 * len(items))), min(k, len(items))
    with limited(threads):
        for start in range(0, len(queries), size):
            block = torch.from_numpy(queries[start:start + size]).double()
            scores = torch.cat([block @ torch.from_numpy(items[i:i + ITEM_PANEL]).double().T
                                for i in range(0, len(items), ITEM_PANEL)], dim=1)
            if seen is not None:
                left_out = seen[1][seen[0][start]:seen[0][start + len(block)]]
                rows = np.repeat(np.arange(len(block)), np.diff(seen[0][start:start + len(block) + 1]))
                scores[torch.from_numpy(rows), torch.from_numpy(left_out)] = -torch.inf
            least = scores.topk(take, dim=1).values[:, -1] - torch.from_numpy(margin[start:start + size])
            near = (scores >= least[:, None]) & (scores > -torch.inf)
            row, item = (x.numpy() for x in near.nonzero(as_tuple=True))
            exact = pair_scores(queries, items, row + start, item)
            order = np.lexsort((item, -exact, row))
            row, item, exact = row[order], item[order], exact[order]
            place = np.arange(len(row)) - np.searchsorted(row, row)  # in the query's own list
            row, item, exact, place = (x[place < k] for x in (row, item, exact, place))
            best[row + start, place], found[row + start, place] = exact, item
    return best, found


@contextlib.contextmanager
def limited(threads: int) -> Iterator[None]:
    """torch's threads for the time of a `with` block; 0 leaves them."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
