"""Counting, panel by panel of scores, how many candidates lie above and level with each target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .csr import Csr, check_csr, check_integers, check_range

BLOCK = 512  # targets at a time


class TargetCounts:
    """Targets and left-out items of a set of queries, and the counts so far."""

    def __init__(self, targets: Any, num_queries: int, num_items: int, seen: Csr | None) -> None:
        if isinstance(targets, (tuple, list)) and len(targets) == 2 and np.ndim(targets[0]) == 1:
            self.indptr, self.item = check_csr("targets", targets, num_queries, num_items)
            if (np.diff(self.indptr) == 0).any():
                empty = int(np.argmin(np.diff(self.indptr)))
                raise ValueError(f"targets: query {empty} has none; leave such queries out")
        else:
            self.indptr, self.item = None, check_integers("targets", targets)
            if len(self.item) != num_queries:
                raise ValueError(f"targets: got {len(self.item)} for {num_queries} queries; one each is needed, or a "
                                 "pair (indptr, indices)")
            check_range("targets", self.item, num_items)
        starts = np.arange(num_queries + 1) if self.indptr is None else self.indptr
        self.starts, self.query = starts, np.repeat(np.arange(num_queries), np.diff(starts))
        own = self.query * num_items + self.item  # one number for (query, item)
        if len(np.unique(own)) < len(own):
            raise ValueError("targets: the same item twice for one query; give each target once")
        self.greater, self.ties = np.zeros((2, len(own)), np.int64)
        self.candidates = np.full(len(own), num_items, np.int64)
        self.left_out = None
        if seen is not None:
            indptr, indices = check_csr("seen", seen, num_queries, num_items)
            pairs = np.setdiff1d(np.repeat(np.arange(num_queries), np.diff(indptr)) * num_items + indices, own)
            row, column = np.divmod(pairs, num_items)  # sorted by query, each pair once
            self.left_out = (np.searchsorted(row, np.arange(num_queries + 1)), column)
            self.candidates -= np.diff(self.left_out[0])[self.query]

    def blocks(self) -> Iterator[tuple[int, int, slice]]:
        """(first target, last target + 1, their queries)."""
        start = 0
        while start < len(self.query):
            # whole queries, at most BLOCK targets unless one query alone has more
            last = max(np.searchsorted(self.starts, start + BLOCK, side="right") - 1, self.query[start] + 1)
            stop = int(self.starts[last])
            yield start, stop, slice(int(self.query[start]), int(last))
            start = stop

    def count(self, scores: torch.Tensor, start: int, stop: int, first: int, begin: int, exact: np.ndarray,
              margin: np.ndarray, decide: Callable[[np.ndarray, np.ndarray], np.ndarray] | None) -> None:
        """Adds what one panel (queries from ``first``, items from ``begin``; overwritten) says on targets start..stop.

        ``decide(row, column)`` gives exact scores where a panel score is within ``margin`` of the target's; without it
        panel scores are exact.
        """
        width = scores.shape[1]
        if self.left_out is not None:
            indptr, columns = self.left_out
            part = slice(indptr[first], indptr[first + len(scores)])
            rows = np.repeat(np.arange(len(scores)), np.diff(indptr[first:first + len(scores) + 1]))
            inside = (columns[part] >= begin) & (columns[part] < begin + width)
            scores[torch.from_numpy(rows[inside]), torch.from_numpy(columns[part][inside] - begin)] = torch.nan
        rows = self.query[start:stop] - first
        if self.indptr is not None:
            scores = scores[torch.from_numpy(rows)]  # one row a target
        item = self.item[start:stop] - begin
        inside = np.flatnonzero((item >= 0) & (item < width))
        scores[torch.from_numpy(inside), torch.from_numpy(item[inside])] = torch.nan  # is never compared with itself

        goal = torch.from_numpy(exact[start:stop].astype(np.float64))
        slack = torch.from_numpy(margin[self.query[start:stop]])
        above = (scores > (goal + slack)[:, None]).sum(dim=1).numpy()
        near = (scores >= (goal - slack)[:, None]).sum(dim=1).numpy() - above
        self.greater[start:stop] += above
        if decide is None:
            self.ties[start:stop] += near
            return
        which = np.flatnonzero(near)
        scores = scores[torch.from_numpy(which)]
        band = (scores >= (goal - slack)[which, None]) & (scores <= (goal + slack)[which, None])
        place, column = (x.numpy() for x in band.nonzero(as_tuple=True))
        target = which[place]
        found, goal = decide(rows[target], column), exact[start:stop][target]
        self.greater[start:stop] += np.bincount(target[found > goal], minlength=stop - start)
        self.ties[start:stop] += np.bincount(target[found == goal], minlength=stop - start)
