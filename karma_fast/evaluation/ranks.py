"""Exact ranks over the whole catalogue, without ever holding the whole score matrix.

The score of a query and an item is the chain ``acc = fma(q[d], x[d], acc)`` over the width in float32, from 0. Two
items tie exactly if these are the same float32. So counts do not depend on blocks, threads, machine or libraries, a
target never counts itself, and copies of an item always tie.
"""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from . import device_ranks, native_ranks, torch_ranks
from .catalogue import ABSENCE, Catalogue, by_torch, check_path, native, thread_count
from .counting import Targets, left_out
from .csr import Csr, check_csr, csr_ranges
from .rows import Rows, check_finite, check_kind, check_widths

LONG = 20 * 10**9  # products, about a second by torch


@dataclass
class Ranks:
    """Counts for each target, all int64; targets of one query follow each other.

    Attributes:
        greater: (T,) candidates with a higher score.
        ties: (T,) other candidates with the same score.
        candidates: (T,) items that were ranked, the target included: the catalogue without the items left out.
        indptr: (Q + 1,) where each query's targets begin; None: one target a query.
        largest_k: a target with this many candidates above it has just this as ``greater``, and no ties, wherever it
            stands; None: all counts are complete.
    """

    greater: np.ndarray
    ties: np.ndarray
    candidates: np.ndarray
    indptr: np.ndarray | None = None
    largest_k: int | None = None

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.greater) if self.indptr is None else len(self.indptr) - 1

    @property
    def expected(self) -> np.ndarray:
        """(T,) float64, mean rank over all orders of the ties, from 0."""
        return self.greater + self.ties / 2

    def missed(self, which: np.ndarray) -> Ranks:
        """With the last places for the targets in ``which``, (T,) bool, as of items that no list shows.

        Those of one query share as many places as they are, and its other targets move up.

        >>> Ranks(np.array([0, 2]), np.array([1, 0]), np.array([9, 9])).missed(np.array([True, False])).expected
        array([8., 2.])
        >>> pair = Ranks(np.array([0, 2]), np.array([0, 0]), np.array([9, 9]), indptr=np.array([0, 2]))
        >>> pair.missed(np.array([True, True])).expected, pair.missed(np.array([True, False])).expected
        (array([7.5, 7.5]), array([8., 1.]))
        """
        which, span = np.asarray(which, bool), int(self.candidates.max(initial=0)) + 1
        sizes = np.ones(len(self), np.int64) if self.indptr is None else np.diff(self.indptr)
        begin = np.repeat(np.arange(len(self)) * span, sizes)  # of the query's places in a line of all
        lost = np.sort((begin + self.greater)[which])
        bounds = (begin, begin + self.greater, begin + self.greater + 1, begin + span)
        first, above, level, last = (np.searchsorted(lost, bound) for bound in bounds)
        shared = last - first - 1  # the other missed targets of the query
        greater = np.where(which, self.candidates - 1 - shared, self.greater - (above - first))
        ties = np.where(which, shared, self.ties - (level - above))
        if self.largest_k is None:
            return replace(self, greater=greater, ties=ties)
        greater = np.where(self.greater >= self.largest_k, self.largest_k, greater)  # how far below is not known
        return limited_to(self.largest_k, greater, ties, self.candidates, self.indptr)

    @staticmethod
    def concat(parts: list[Ranks]) -> Ranks:
        """The ranks of several sets of queries as one."""
        limit = same_limit(parts)
        counts = [np.concatenate([getattr(p, name) for p in parts]) for name in ("greater", "ties", "candidates")]
        if all(p.indptr is None for p in parts):
            return Ranks(*counts, largest_k=limit)
        sizes = [np.ones(len(p), np.int64) if p.indptr is None else np.diff(p.indptr) for p in parts]
        return Ranks(*counts, indptr=np.concatenate([[0], np.cumsum(np.concatenate(sizes))]), largest_k=limit)

    @staticmethod
    def sum(parts: list[Ranks]) -> Ranks:
        """The ranks of the same targets from parts of the catalogue (``item_range``) as those from all of it."""
        limit = same_limit(parts)
        sizes = [len(p.greater) for p in parts]
        if len(set(sizes)) > 1:
            raise ValueError(f"parts: got {sizes} targets; each part must rank the same ones")
        greater, ties, candidates = (sum(getattr(p, name) for p in parts) for name in
                                     ("greater", "ties", "candidates"))
        return limited_to(limit, greater, ties, candidates, parts[0].indptr)


def same_limit(parts: list[Ranks]) -> int | None:
    if not parts:
        raise ValueError("parts: got an empty list; at least one Ranks is needed")
    if len({p.largest_k for p in parts}) > 1:
        raise ValueError(f"parts: largest_k differs, got {[p.largest_k for p in parts]}; rank all parts with one")
    return parts[0].largest_k


def target_ranks(queries: Any, items: Any, targets: Any, *, seen: Csr | None = None, threads: int = 0,
                 item_range: tuple[int, int] | None = None, largest_k: int | None = None, path: str = "auto",
                 progress: bool = False) -> Ranks:
    """Ranks of each query's targets among all items by inner product.

    On a CPU a C++ extension streams packed items past the queries and counts; if queries and items are tensors on a
    GPU, they are ranked there. Memory beyond the inputs is that of the packed items, at most about 1 GiB at a time if
    they are not a :class:`Catalogue`; ``items`` may be a memory map larger than the memory.

    Args:
        queries: (Q, D) float32, float16 or bfloat16, array or tensor.
        items: (N, D), likewise, or a :class:`Catalogue`, which is packed once for many calls.
        targets: (Q,) integers, or a pair (indptr (Q + 1,), indices) for several different targets a query.
        seen: pair (indptr (Q + 1,), indices) of items to leave out of a query's ranking. Its own targets never are.
        threads: 0 takes torch's setting. (A GPU needs none.)
        item_range: (start, stop): only these candidates count. Parts that cover the catalogue, from several processes
            for example, add up with :meth:`Ranks.sum`.
        largest_k: stop at targets with this many candidates above them (a GPU counts all). Hit rates, recall and NDCG
            up to this K stay exact; MRR and AUC cannot be had from it.
        path: one of :func:`karma_fast.evaluation.paths`, or "torch"; all have the same result.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: NaN or infinite values, wrong shapes, widths or dtypes, items outside the catalogue, an empty
            catalogue, a query without a target or with the same one twice. (With ``largest_k`` or ``item_range``,
            values of items that are not looked at are not checked.)

    Example:
        >>> items = np.eye(4, dtype=np.float32)
        >>> queries = np.array([[0.1, 0.9, 0.2, 0.2]], np.float32)
        >>> ranks = target_ranks(queries, items, [2])
        >>> ranks.greater, ranks.ties, ranks.candidates
        (array([1]), array([1]), array([4]))
        >>> target_ranks(queries, items, [2], seen=([0, 1], [1])).expected
        array([0.5])
        >>> Ranks.sum([target_ranks(queries, items, [2], item_range=part) for part in ((0, 3), (3, 4))]).expected
        array([1.5])
    """
    on_device = path == "auto" and all(isinstance(x, torch.Tensor) and x.is_cuda for x in (queries, items))
    if on_device:
        check_tensors(queries, items)
        users, catalogue = queries.detach(), items.detach()
    else:
        users, catalogue = checked(queries, items, path)
    goal = Targets.check(targets, len(users), len(catalogue))
    if seen is not None:
        seen = check_csr("seen", seen, len(users), len(catalogue))
    span = check_range_of(item_range, len(catalogue))
    whole = isinstance(largest_k, (int, np.integer)) and not isinstance(largest_k, bool)
    if largest_k is not None and not (whole and 1 <= largest_k < 2**62):
        raise ValueError(f"largest_k: got {largest_k!r}; a whole number >= 1 is needed")
    thread_count(threads)
    with Bar(progress, span[1] - span[0]) as bar:
        if on_device:
            counts = device_ranks.count(users, catalogue, goal, seen, span)
        elif by_torch(catalogue.rows, len(users), path, largest_k):
            warn_of_torch(path, len(users) * len(catalogue) * users.shape[1])
            counts = torch_ranks.count(users, for_torch(catalogue), goal, seen, span, threads)
        else:
            counts = native_ranks.count(users, catalogue, goal, seen, span, largest_k, path, threads, bar)
        bar.finish()
    return limited_to(largest_k, *counts, goal.indptr)


def limited_to(largest_k: int | None, greater: np.ndarray, ties: np.ndarray, candidates: np.ndarray,
               indptr: np.ndarray | None) -> Ranks:
    """Counts that stop at ``largest_k``, whatever they were stopped at."""
    if largest_k is not None:
        ties = np.where(greater >= largest_k, 0, ties)
        greater = np.minimum(greater, largest_k)
    return Ranks(greater, ties, candidates, indptr, largest_k)


def top_k(queries: Any, items: Any, k: int, *, seen: Csr | None = None, threads: int = 0, path: str = "auto") \
        -> tuple[np.ndarray, np.ndarray]:
    """The k items of highest score for each query, best first, ties by lower index.

    Args:
        queries, items, seen, threads, path: see :func:`target_ranks`; here everything in ``seen`` is left out, and
            tensors on a GPU are moved to the CPU.
        k: at least 1.

    Returns:
        scores (Q, k) float32 and indices (Q, k) int64; -inf and -1 where fewer than k items remain.

    Example:
        >>> top_k(np.array([[1.0, 2.0]], np.float32), np.eye(2, dtype=np.float32), 3)
        (array([[  2.,   1., -inf]], dtype=float32), array([[ 1,  0, -1]]))
    """
    users, catalogue = checked(queries, items, path)
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k: got {k!r}; a whole number >= 1 is needed")
    if seen is not None:
        seen = check_csr("seen", seen, len(users), len(catalogue))
    thread_count(threads)
    if not by_torch(catalogue.rows, len(users), path):
        return native_ranks.best_items(users, catalogue, int(k), seen, path, threads)
    warn_of_torch(path, len(users) * len(catalogue) * users.shape[1])
    return torch_ranks.best_items(users, for_torch(catalogue), int(k), seen, threads)


def checked(queries: Any, items: Any, path: str) -> tuple[np.ndarray, Catalogue]:
    """(Q, D) float32 and the catalogue."""
    users = Rows.of("queries", queries)
    check_path(path)
    rows = items.rows if isinstance(items, Catalogue) else Rows.of("items", items)
    check_widths(users.width, rows.width, len(rows))
    check_finite("queries", users)
    return users.float32(), items if isinstance(items, Catalogue) else Catalogue.passing(rows)


def for_torch(catalogue: Catalogue) -> np.ndarray:
    """(N, D) float32, checked."""
    if native:  # else the catalogue has done it
        check_finite("items", catalogue.rows)
    return catalogue.rows.float32()


def warn_of_torch(path: str, products: int) -> None:
    """pip shows nothing of a build that left the extension out, so this is where one learns of it."""
    if path == "auto" and not native and products > LONG:
        warnings.warn(f"the C++ extension {ABSENCE[0]}, so torch ranks, which takes many times longer; {ABSENCE[1]}",
                      stacklevel=3)


def check_tensors(queries: torch.Tensor, items: torch.Tensor) -> None:
    for name, x in (("queries", queries), ("items", items)):
        check_kind(name, x.shape, x.dtype)
    check_widths(queries.shape[1], items.shape[1], len(items))
    if queries.device != items.device:
        raise ValueError(f"queries are on {queries.device} and items on {items.device}; move one of them")


def check_range_of(item_range: Any, num_items: int) -> tuple[int, int]:
    if item_range is None:
        return 0, num_items
    try:
        start, stop = (operator.index(x) for x in item_range)
    except (TypeError, ValueError):
        raise ValueError(f"item_range: got {item_range!r}; two whole numbers (start, stop) are needed") from None
    if not 0 <= start <= stop <= num_items:
        raise ValueError(f"item_range: got {tuple(item_range)}; 0 <= start <= stop <= {num_items} is needed")
    return start, stop


class Bar:
    """A bar over the items, or none; full at the end although queries may have stopped early."""

    def __init__(self, progress: bool, items: int) -> None:
        self.bar, self.items = None, items
        if progress:
            from tqdm import tqdm

            self.bar = tqdm(total=items, desc="ranking", unit="item", unit_scale=True)

    def update(self, items: float) -> None:
        if self.bar is not None:
            self.bar.update(items)

    def finish(self) -> None:
        self.update(self.items - self.bar.n if self.bar is not None else 0)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def rank_scores(scores: Any, targets: Any, seen: Csr | None = None) -> Ranks:
    """The same counts from given scores.

    Args:
        scores: (Q, N) floating, array or tensor; compared as they are.
        targets, seen: see :func:`target_ranks`.

    Example:
        >>> rank_scores(np.array([[3.0, 1.0, 1.0, 0.0]]), [1]).expected
        array([1.5])
    """
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().cpu()
        scores = scores.float() if scores.dtype == torch.bfloat16 else scores  # which numpy lacks; the same values
    scores = np.asarray(scores)
    if scores.ndim != 2 or not np.issubdtype(scores.dtype, np.floating) or scores.shape[1] == 0:
        raise ValueError(f"scores: got shape {scores.shape}, dtype {scores.dtype}; floating (queries, items) "
                         "with at least one item is needed")
    if not np.isfinite(scores).all():
        raise ValueError("scores: NaN or infinite values cannot be ranked")
    targets = Targets.check(targets, *scores.shape)
    query, own = targets.query, scores[targets.query, targets.item]
    greater, ties = np.zeros((2, len(own)), np.int64)
    for place, (row, score) in enumerate(zip(query, own, strict=True)):
        greater[place] = np.count_nonzero(scores[row] > score)
        ties[place] = np.count_nonzero(scores[row] == score) - 1  # the target itself
    candidates = np.full(len(own), scores.shape[1], np.int64)
    listed = left_out(seen, targets, scores.shape[1])
    if listed is not None:  # what is left out was counted, so it is taken off
        indptr, items = csr_ranges(listed[1], listed[0][query], listed[0][query + 1])
        place = np.repeat(np.arange(len(own)), np.diff(indptr))
        given, goal = scores[query[place], items], own[place]
        greater -= np.bincount(place[given > goal], minlength=len(own))
        ties -= np.bincount(place[given == goal], minlength=len(own))
        candidates -= np.diff(indptr)
    return Ranks(greater, ties, candidates, targets.indptr)
