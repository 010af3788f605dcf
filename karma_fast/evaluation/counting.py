"""What is ranked: the targets of each query and the items to leave out; and counts, panel by panel of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .csr import Csr, check_csr, check_integers, check_range

BLOCK = 512  # targets at a time


@dataclass
class Targets:
    """Targets of Q queries.

    Attributes:
        starts: (Q + 1,) where each query's targets begin.
        item: (T,) catalogue indices.
        several: they came as a pair (indptr, indices).
    """

    starts: np.ndarray
    item: np.ndarray
    several: bool

    @property
    def query(self) -> np.ndarray:
        """(T,) of each target."""
        return np.repeat(np.arange(len(self.starts) - 1, dtype=np.int64), np.diff(self.starts))

    @property
    def indptr(self) -> np.ndarray | None:
        """``starts``, for :class:`Ranks` of several targets a query."""
        return self.starts if self.several else None

    @classmethod
    def check(cls, targets: Any, num_queries: int, num_items: int) -> Targets:
        """From (Q,) integers or a pair (indptr, indices); ValueError with what is wrong otherwise."""
        if isinstance(targets, (tuple, list)) and len(targets) == 2 and np.ndim(targets[0]) == 1:
            starts, item = check_csr("targets", targets, num_queries, num_items)
            if (np.diff(starts) == 0).any():
                empty = int(np.argmin(np.diff(starts)))
                raise ValueError(f"targets: query {empty} has none; leave such queries out")
            found = cls(starts, item, True)
            own = found.query * num_items + item  # one number for (query, item)
            if len(np.unique(own)) < len(own):
                raise ValueError("targets: the same item twice for one query; give each target once")
            return found
        item = check_integers("targets", targets)
        if len(item) != num_queries:
            raise ValueError(f"targets: got {len(item)} for {num_queries} queries; one each is needed, or a pair "
                             "(indptr, indices)")
        check_range("targets", item, num_items)
        return cls(np.arange(num_queries + 1, dtype=np.int64), item, False)


def left_out(seen: Csr | None, targets: Targets, num_items: int) -> Csr | None:
    """Seen items without repeats and without the query's own targets, which are never left out."""
    if seen is None:
        return None
    queries = len(targets.starts) - 1
    indptr, indices = check_csr("seen", seen, queries, num_items)
    pairs = np.setdiff1d(np.repeat(np.arange(queries, dtype=np.int64), np.diff(indptr)) * num_items + indices,
                         targets.query * num_items + targets.item)
    row, column = np.divmod(pairs, num_items)  # sorted by query, each pair once
    return np.searchsorted(row, np.arange(queries + 1)), column


def within(lists: Csr, begin: int, end: int) -> Csr:
    """Entries from begin to end of each list."""
    indptr, indices = lists
    inside = (indices >= begin) & (indices < end)
    return np.concatenate([[0], np.cumsum(inside)])[indptr], indices[inside]


class TargetCounts:
    """Counts of a set of targets so far, from scores that come in panels."""

    def __init__(self, targets: Targets, num_items: int, seen: Csr | None,
                 item_range: tuple[int, int] | None = None) -> None:
        begin, end = item_range or (0, num_items)
        self.targets, self.query, self.item = targets, targets.query, targets.item
        self.greater, self.ties = np.zeros((2, len(self.item)), np.int64)
        self.candidates = np.full(len(self.item), end - begin, np.int64)
        self.left_out = left_out(seen, targets, num_items)
        if self.left_out is not None:
            self.left_out = within(self.left_out, begin, end)
            self.candidates -= np.diff(self.left_out[0])[self.query]

    def blocks(self) -> Iterator[tuple[int, int, slice]]:
        """(first target, last target + 1, their queries)."""
        start, starts = 0, self.targets.starts
        while start < len(self.query):
            # whole queries, at most BLOCK targets unless one query alone has more
            last = max(np.searchsorted(starts, start + BLOCK, side="right") - 1, self.query[start] + 1)
            stop = int(starts[last])
            yield start, stop, slice(int(self.query[start]), int(last))
            start = stop

    def count(self, scores: torch.Tensor, start: int, stop: int, first: int, begin: int, exact: np.ndarray,
              margin: np.ndarray, decide: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        """Adds what one panel (queries from ``first``, items from ``begin``; overwritten) says on targets start..stop.

        ``decide(row, column)`` gives exact scores where a panel score is within ``margin`` of the target's.
        """
        width = scores.shape[1]
        if self.left_out is not None:
            indptr, columns = self.left_out
            part = slice(indptr[first], indptr[first + len(scores)])
            rows = np.repeat(np.arange(len(scores)), np.diff(indptr[first:first + len(scores) + 1]))
            inside = (columns[part] >= begin) & (columns[part] < begin + width)
            scores[torch.from_numpy(rows[inside]), torch.from_numpy(columns[part][inside] - begin)] = torch.nan
        rows = self.query[start:stop] - first
        if self.targets.several:
            scores = scores[torch.from_numpy(rows)]  # one row a target
        item = self.item[start:stop] - begin
        inside = np.flatnonzero((item >= 0) & (item < width))
        scores[torch.from_numpy(inside), torch.from_numpy(item[inside])] = torch.nan  # is never compared with itself

        goal = torch.from_numpy(exact[start:stop].astype(np.float64))
        slack = torch.from_numpy(margin[self.query[start:stop]])
        above = (scores > (goal + slack)[:, None]).sum(dim=1).numpy()
        near = (scores >= (goal - slack)[:, None]).sum(dim=1).numpy() - above
        self.greater[start:stop] += above
        which = np.flatnonzero(near)
        scores = scores[torch.from_numpy(which)]
        band = (scores >= (goal - slack)[which, None]) & (scores <= (goal + slack)[which, None])
        place, column = (x.numpy() for x in band.nonzero(as_tuple=True))
        target = which[place]
        found, goal = decide(rows[target], column), exact[start:stop][target]
        self.greater[start:stop] += np.bincount(target[found > goal], minlength=stop - start)
        self.ties[start:stop] += np.bincount(target[found == goal], minlength=stop - start)
