"""Exact ranks over the whole catalogue, without ever holding the whole score matrix.

Two items tie exactly if the defined scores (``karma_fast/evaluation/scores.py``) are the same float32. Products in
float64 settle all pairs but those whose score lies within the rounding error of the target's; these few are computed
as defined. So the counts do not depend on blocks, threads, machine or libraries, a target never counts itself, and
copies of an item always tie.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .counting import TargetCounts
from .csr import Csr, check_csr
from .scores import check_vectors, error_bound, pair_scores

ITEM_PANEL = 8192  # with the 512 targets of a block 32 MB of float64 scores at a time
ROW_BYTES = 64 << 20  # of whole rows of scores in top_k


@dataclass
class Ranks:
    """Counts for each target, all int64; targets of one query follow each other.

    Attributes:
        greater: (T,) candidates with a higher score.
        ties: (T,) other candidates with the same score.
        candidates: (T,) items that were ranked, the target included: the catalogue without the items left out.
        indptr: (Q + 1,) where each query's targets begin; None: one target a query.
    """

    greater: np.ndarray
    ties: np.ndarray
    candidates: np.ndarray
    indptr: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.greater) if self.indptr is None else len(self.indptr) - 1

    @property
    def expected(self) -> np.ndarray:
        """(T,) float64, mean rank over all orders of the ties, from 0."""
        return self.greater + self.ties / 2

    @staticmethod
    def concat(parts: list[Ranks]) -> Ranks:
        """The ranks of several calls as one."""
        if not parts:
            raise ValueError("parts: got an empty list; at least one Ranks is needed")
        counts = [np.concatenate([getattr(p, name) for p in parts]) for name in ("greater", "ties", "candidates")]
        if all(p.indptr is None for p in parts):
            return Ranks(*counts)
        sizes = [np.ones(len(p), np.int64) if p.indptr is None else np.diff(p.indptr) for p in parts]
        return Ranks(*counts, indptr=np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))


def target_ranks(queries: Any, items: Any, targets: Any, *, seen: Csr | None = None, threads: int = 0) -> Ranks:
    """Ranks of each query's targets among all items by inner product.

    Args:
        queries: (Q, D) float32, float16 or bfloat16, array or tensor.
        items: (N, D), likewise.
        targets: (Q,) integers, or a pair (indptr (Q + 1,), indices) for several different targets a query.
        seen: pair (indptr (Q + 1,), indices) of items to leave out of a query's ranking. Its own targets never are.
        threads: of the matrix products; 0 leaves torch's setting.

    Raises:
        ValueError: NaN or infinite values, wrong shapes, widths or dtypes, items outside the catalogue, an empty
            catalogue, a query without a target or with the same one twice.

    Example:
        >>> items = np.eye(4, dtype=np.float32)
        >>> queries = np.array([[0.1, 0.9, 0.2, 0.2]], np.float32)
        >>> target_ranks(queries, items, [2])
        Ranks(greater=array([1]), ties=array([1]), candidates=array([4]), indptr=None)
        >>> target_ranks(queries, items, [2], seen=([0, 1], [1])).expected
        array([0.5])
    """
    queries, items = check_vectors(queries, items)
    goal = TargetCounts(targets, len(queries), len(items), seen)
    margin = error_bound(queries, items)
    exact = pair_scores(queries, items, goal.query, goal.item)
    with _threads(threads):
        wide = torch.from_numpy(queries).double()
        for begin in range(0, len(items), ITEM_PANEL):
            panel = torch.from_numpy(items[begin:begin + ITEM_PANEL]).double().T
            for start, stop, rows in goal.blocks():
                scores = wide[rows] @ panel
                first = rows.start

                def decide(row, column, begin=begin, first=first):
                    return pair_scores(queries, items, row + first, column + begin)

                goal.count(scores, start, stop, first, begin, exact, margin, decide)
    return Ranks(goal.greater, goal.ties, goal.candidates, goal.indptr)


def rank_scores(scores: Any, targets: Any, seen: Csr | None = None) -> Ranks:
    """The same counts from given scores.

    Args:
        scores: (Q, N) floating, array or tensor; compared as they are.
        targets, seen: see :func:`target_ranks`.

    Example:
        >>> rank_scores(np.array([[3.0, 1.0, 1.0, 0.0]]), [1]).expected
        array([1.5])
    """
    scores = scores.detach().cpu() if isinstance(scores, torch.Tensor) else torch.as_tensor(np.asarray(scores))
    if scores.ndim != 2 or not scores.is_floating_point() or scores.shape[1] == 0:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, dtype {scores.dtype}; floating (queries, items) "
                         "with at least one item is needed")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores: NaN or infinite values cannot be ranked")
    goal = TargetCounts(targets, *scores.shape, seen)
    exact = scores[torch.from_numpy(goal.query), torch.from_numpy(goal.item)].double().numpy()
    for begin in range(0, scores.shape[1], ITEM_PANEL):
        for start, stop, rows in goal.blocks():
            panel = scores[rows, begin:begin + ITEM_PANEL].to(torch.float64, copy=True)
            goal.count(panel, start, stop, rows.start, begin, exact, np.zeros(len(scores)), None)
    return Ranks(goal.greater, goal.ties, goal.candidates, goal.indptr)


def top_k(queries: Any, items: Any, k: int, *, seen: Csr | None = None, threads: int = 0) \
        -> tuple[np.ndarray, np.ndarray]:
    """The k items of highest score for each query, best first, ties by lower index.

    Args:
        queries, items, seen, threads: see :func:`target_ranks`; here everything in ``seen`` is left out.
        k: at least 1.

    Returns:
        scores (Q, k) float32 and indices (Q, k) int64; -inf and -1 where fewer than k items remain.

    Example:
        >>> top_k(np.array([[1.0, 2.0]], np.float32), np.eye(2, dtype=np.float32), 3)
        (array([[  2.,   1., -inf]], dtype=float32), array([[ 1,  0, -1]]))
    """
    queries, items = check_vectors(queries, items)
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k: got {k!r}; a whole number >= 1 is needed")
    if seen is not None:
        seen = check_csr("seen", seen, len(queries), len(items))
    margin = 2 * error_bound(queries, items)
    best, found = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    size, take = max(1, ROW_BYTES // (8 * len(items))), min(k, len(items))
    with _threads(threads):
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
def _threads(threads: int) -> Iterator[None]:
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise ValueError(f"threads: got {threads!r}; 0 or a positive number is needed")
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
