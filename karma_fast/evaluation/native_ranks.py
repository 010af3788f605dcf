"""Ranks and the k best items by the C++ extension, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from .catalogue import Catalogue, count_path, native, thread_count, top_k_path
from .counting import Targets, within
from .csr import Csr, csr_rows
from .rows import check_finite
from .scores import check_overflow, norms

SECONDS = 1.5  # of a step: between two looks at the progress bar, at Ctrl-C and at who is done
STEP = 10 * 10**9  # products a thread of the first step, before it is known how long they take
SLICE = 4096  # queries at a time, or more where that makes less than a step
FEWEST = 64  # queries at a time for the k best, even where that makes more than a step
FIRST_ITEMS = 8192  # of the first step if queries may stop early; each step is twice as long


class Pace:
    """The products of the next step, from the time that the steps before took."""

    def __init__(self, threads: int) -> None:
        self.products = STEP * threads

    @contextmanager
    def step(self, products: int) -> Iterator[None]:
        start = perf_counter()
        yield
        seconds = max(perf_counter() - start, 1e-9)
        if seconds > SECONDS or 2 * products > self.products:  # of a short step most may be the time to begin it
            self.products = int(products * min(SECONDS / seconds, 10))


class Counts:
    """Targets, their scores, and the counts so far, all (T,)."""

    def __init__(self, queries: np.ndarray, catalogue: Catalogue, targets: Targets, threads: int) -> None:
        rows = catalogue.rows
        self.queries, self.rows, self.targets = queries, rows, targets
        self.threads = thread_count(threads)
        self.query = targets.query
        self.score = native.pair_scores(queries, rows.array, rows.storage, self.query, targets.item, self.threads)
        if not np.isfinite(self.score).all():  # no part of the catalogue that is counted need hold the targets
            check_finite("items", rows)
            check_overflow(np.inf)
        self.greater, self.equal = np.zeros((2, len(self.score)), np.int64)
        self.longest_query = longest(queries)
        self.longest_item = 0.0

    def of(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the targets of some queries, and where each query's begin among them."""
        starts = self.targets.starts
        count = starts[which + 1] - starts[which]
        first = np.concatenate([[0], np.cumsum(count)])
        mine = np.arange(first[-1]) - np.repeat(first[:-1] - starts[which], count)
        return mine, first

    def below(self, which: np.ndarray, most: np.ndarray) -> np.ndarray:
        """Of these queries, those with a target that fewer than its ``most`` items are above so far."""
        mine, first = self.of(which)
        return which[np.maximum.reduceat(self.greater[mine] < most[mine], first[:-1])]

    def add(self, packed: Any, which: np.ndarray, begin: int, end: int) -> None:
        """Counts items begin..end of a packed copy for some queries."""
        self.longest_item = max(self.longest_item, packed.longest)
        check_overflow(self.longest_query * self.longest_item)
        mine, first = self.of(which)
        together = which[-1] - which[0] == len(which) - 1  # which rises: then this is no copy
        queries = self.queries[which[0]:which[-1] + 1] if together else self.queries[which]
        greater, equal = np.zeros((2, len(mine)), np.int64)
        packed.count(queries, first, self.targets.item[mine], self.score[mine], begin, end, greater, equal,
                     self.threads)
        self.greater[mine] += greater
        self.equal[mine] += equal

    def leave_out(self, listed: Csr) -> None:
        """Takes listed items of each query off its counts."""
        greater, equal = np.zeros((2, len(self.score)), np.int64)
        native.count_listed(self.rows.array, self.rows.storage, self.longest_item, self.queries, self.targets.starts,
                            self.targets.item, self.score, *listed, greater, equal, self.threads)
        self.greater -= greater
        self.equal -= equal


def count(queries: np.ndarray, catalogue: Catalogue, targets: Targets, seen: Csr | None, item_range: tuple[int, int],
          largest_k: int | None, path: str, threads: int, bar: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(T,) greater, equal and candidates among the items in ``item_range``, from checked input."""
    begin, end = item_range
    counts = Counts(queries, catalogue, targets, threads)
    listed = left_out(seen, targets, len(catalogue))
    if listed is not None and item_range != (0, len(catalogue)):
        listed = within(listed, begin, end)
    most = None
    if largest_k is not None:  # seen items are counted first and taken off at the end
        most = np.full(len(counts.score), largest_k)
        if listed is not None:
            most += np.diff(listed[0])[counts.query]
    width, still = queries.shape[1], np.arange(len(queries))  # still: whose counts go on
    pace = Pace(counts.threads)
    for packed in catalogue.parts(count_path(catalogue, len(queries), path), begin, end, threads):
        first, going_on = 0, []
        while first < len(still):
            which = still[first:first + max(SLICE, pace.products // (width * (packed.end - packed.begin)))]
            first += len(which)
            for start, stop in steps(packed, begin, end, len(which) * width, pace, most is None):
                with pace.step(len(which) * width * (stop - start)):
                    counts.add(packed, which, start, stop)
                bar.update((stop - start) * len(which) / len(queries))
                if most is not None:
                    which = counts.below(which, most)
                if not len(which):
                    break
            going_on.append(which)
        still = np.concatenate([still[:0], *going_on])
        if not len(still):
            break
        del packed  # before the next part is made
    candidates = np.full(len(counts.score), end - begin, np.int64)
    if listed is not None:
        counts.leave_out(listed)
        candidates -= np.diff(listed[0])[counts.query]
    return counts.greater, counts.equal, candidates


def steps(packed: Any, begin: int, end: int, work: int, pace: Pace, whole: bool) -> Iterator[tuple[int, int]]:
    """Ranges of items, full blocks where they can be; ``work``: products of an item with all queries."""
    block, last, start = packed.block_items, min(end, packed.end), max(begin, packed.begin)
    size = last if whole else -(-FIRST_ITEMS // block) * block
    while start < last:
        size = min(size, max(1, pace.products // max(1, work) // block) * block)
        stop = min(start + size - (start - packed.begin) % block, last)
        yield start, stop
        start, size = stop, last if whole else 2 * size


def best_items(queries: np.ndarray, catalogue: Catalogue, k: int, seen: Csr | None, path: str, threads: int) \
        -> tuple[np.ndarray, np.ndarray]:
    """As :func:`karma_fast.evaluation.top_k`, of checked input."""
    team = thread_count(threads)
    scores, items = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    none = Targets(np.zeros(len(queries) + 1, np.int64), np.zeros(0, np.int64), True)
    listed = left_out(seen, none, len(catalogue))
    pace = Pace(team)
    for packed in catalogue.parts(top_k_path(catalogue, len(queries), k, path), 0, len(catalogue), threads):
        check_overflow(longest(queries) * packed.longest)
        work, start = queries.shape[1] * (packed.end - packed.begin), 0
        while start < len(queries):
            part = slice(start, min(start + max(FEWEST, pace.products // work), len(queries)))
            out = None if listed is None else csr_rows(listed, part.start, part.stop)
            with pace.step(work * (part.stop - part.start)):
                packed.top_k(queries[part], out, scores[part], items[part], team)
            start = part.stop
        del packed  # before the next part is made
    return scores, items


def left_out(seen: Csr | None, targets: Targets, num_items: int) -> Csr | None:
    """Checked lists of the items to leave out: sorted, each once, without the query's own targets."""
    if seen is None:
        return None
    return native.left_out(*seen, targets.starts, targets.item, num_items)


def longest(rows: np.ndarray) -> float:
    return float(norms(rows).max(initial=0))

