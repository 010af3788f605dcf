"""The definition of a score and of the counts, in plain torch: float64 holds what decides how float32 rounds."""

from __future__ import annotations

import torch
from torch import Tensor

PAIRS = 1 << 12  # worked on at once: their sums stay in the cache


def pair_scores(queries: Tensor, items: Tensor, query_rows: Tensor, item_rows: Tensor) -> Tensor:
    """(P,) float32 scores of pairs of rows.

    >>> x = torch.tensor([[1.0, 2.0], [0.5, 0.25]])
    >>> pair_scores(x, x, torch.tensor([0, 0]), torch.tensor([0, 1]))
    tensor([5., 1.])
    """
    out = torch.empty(len(query_rows), dtype=torch.float32, device=queries.device)
    for start in range(0, len(out), PAIRS):
        p = slice(start, start + PAIRS)
        out[p] = chain(queries[query_rows[p]], items[item_rows[p]])
    return out


def count_ranks(queries: Tensor, items: Tensor, query_rows: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) and (T,) int64: how many items score above and exactly as ``scores``.

    >>> count_ranks(torch.ones(1, 2), torch.eye(2), torch.tensor([0]), torch.tensor([1.0]))
    (tensor([0]), tensor([2]))
    """
    greater, equal = torch.zeros((2, len(scores)), dtype=torch.int64, device=items.device)
    panel = max(1, PAIRS // max(1, len(scores)))
    for t in range(0, len(scores), PAIRS):
        q, goal = queries[query_rows[t:t + PAIRS]][:, None], scores[t:t + PAIRS, None]
        for start in range(0, len(items), panel):
            found = chain(q, items[None, start:start + panel])
            greater[t:t + PAIRS] += (found > goal).sum(1)
            equal[t:t + PAIRS] += (found == goal).sum(1)
    return greater, equal


def chain(q: Tensor, x: Tensor) -> Tensor:
    """float32 ``acc = fma(q[..., d], x[..., d], acc)`` over the last dimension, from 0; the others broadcast.

    >>> chain(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]))
    tensor(1.)
    """
    acc = torch.zeros(torch.broadcast_shapes(q.shape, x.shape)[:-1], dtype=torch.float32, device=q.device)
    for a, b in zip(q.unbind(-1), x.unbind(-1), strict=True):
        acc = fma(a.float(), b.float(), acc)
    return acc


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c of float32 tensors, rounded once, subnormal results included.

    The product is exact in float64. Its sum with c is rounded to odd (inexact: the neighbour whose last bit is 1),
    after which rounding to float32 is as if from the true sum (Boldo and Melquiond 2008,
    https://doi.org/10.1109/TC.2007.70819).

    >>> a = torch.tensor(1 + 2.0**-12)
    >>> (fma(a, a, -a * a), a * a - a * a)  # what rounding the product drops
    (tensor(5.9605e-08), tensor(0.))
    """
    product, wide = a.double() * b.double(), c.double()
    total = wide + product
    part = total - wide
    error = (wide - (total - part)) + (product - part)  # Knuth's two-sum: what the sum lacks
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where((error != 0) & (bits % 2 == 0), bits + away, bits).view(torch.float64).float()
