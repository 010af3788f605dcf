"""InfoNCE tile by tile in plain torch, on any device, in a bounded workspace.

Cost for one direction: 6 B N D operations where a whole row of scores fits (the gradient is formed while the scores
are there), else 8 B N D (the scores are formed once for the statistics and once for the gradient); both directions
together 8 B N D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import compute_dtype
from .problem import Gradients, Problem, Statistics, Wanted, kinds, pieces

ONE_PASS_ROWS = 128  # with fewer rows at a time, adding to the gradient of all keys costs more than a second pass


@dataclass(frozen=True)
class Plan:
    rows: int  # of a tile of scores
    keys: int  # of a tile of scores
    key_block: int  # keys converted to compute dtype, or normalised, at a time
    one_pass: bool

    @staticmethod
    def of(rows: int, keys: int, width: int, dtype: torch.dtype, symmetric: bool, normalize: bool,
           workspace_bytes: int) -> Plan:
        """Half of the workspace for scores, a quarter for converted keys, the rest for converted queries and masks."""
        item = compute_dtype(dtype).itemsize
        scores = max(1, workspace_bytes // 2 // item // (2 if symmetric else 1))
        most_rows = max(1, min(rows, workspace_bytes // 12 // (width * item)))
        block = keys
        if normalize or item != dtype.itemsize:
            block = max(1, min(keys, workspace_bytes // 4 // (width * item)))
        at_once = min(most_rows, scores // keys)
        if not symmetric and at_once >= min(rows, ONE_PASS_ROWS):
            return Plan(at_once, keys, block, True)
        tile_rows = min(most_rows, math.isqrt(scores))
        tile_keys = min(keys, scores // tile_rows)
        return Plan(min(most_rows, scores // tile_keys), tile_keys, block, False)


class Side:
    """Queries or keys, read in compute dtype and normalised if asked, some rows at a time."""

    def __init__(self, x: Tensor, problem: Problem) -> None:
        self.x, self.dtype, self.normalize = x, problem.dtype, problem.normalize
        self.piece = max(1, problem.workspace_bytes // 8 // (x.shape[1] * problem.dtype.itemsize))
        self.inverse = None  # (R,) 1 / norm
        if not self.normalize:
            self.finite = torch.isfinite(torch.stack(x.aminmax())).all()
            return
        largest = torch.cat([torch.linalg.vector_norm(x[r].to(self.dtype), torch.inf, dim=1)
                             for r in pieces(0, len(x), self.piece)])
        zero = largest == 0
        by = largest.masked_fill(zero, 1).unsqueeze(1)
        norms = torch.cat([torch.linalg.vector_norm(x[r].to(self.dtype) / by[r], dim=1)
                           for r in pieces(0, len(x), self.piece)])
        inverse = 1 / by.squeeze(1) / norms.masked_fill(zero, 1)
        # the inverse of the length of a row at the very end of the range of numbers is none that can be used
        self.finite = ((inverse >= torch.finfo(self.dtype).tiny) & torch.isfinite(inverse)).all()
        self.inverse = inverse.masked_fill(zero, 0)

    def rows(self, r: slice | Tensor) -> Tensor:
        x = self.x[r].to(self.dtype)
        return x if self.inverse is None else x * self.inverse[r].unsqueeze(1)

    def finish(self, grad: Tensor, factor: Tensor | None, scale_grad: Tensor | None) -> None:
        """In place: sum_j G_ij y_j -> ``factor`` times the gradient of the unnormalised row.

        Adds sum_i <x_i, grad_i> to ``scale_grad``.
        """
        if factor is None and scale_grad is None and not self.normalize:
            return
        for r in pieces(0, len(grad), self.piece // 2 or 1):
            part = grad[r]
            if self.normalize or scale_grad is not None:
                x = self.rows(r)
                along = (x * part).sum(1)
                if scale_grad is not None:
                    scale_grad += along.sum()
                if self.normalize:
                    part.sub_(x.mul_(along.unsqueeze(1))).mul_(self.inverse[r].unsqueeze(1))
            if factor is not None:
                part.mul_(factor)


class Tiles:
    """The problem in tiles: scores, statistics and gradients of one tile at a time."""

    def __init__(self, x: Problem) -> None:
        self.x = x
        self.plan = Plan.of(*x.query.shape[:1], *x.key.shape, x.query.dtype, x.symmetric, x.normalize,
                            x.workspace_bytes)
        self.query, self.key = Side(x.query, x), Side(x.key, x)
        valid = x.valid & self.query.finite & self.key.finite
        self.poison = torch.where(valid, 1.0, torch.nan).to(x.dtype)
        self.log_q = None if x.log_q is None else x.log_q.to(x.dtype)
        self.buffers = [x.query.new_empty(self.plan.rows * self.plan.keys, dtype=x.dtype)
                        for _ in range(2 if x.symmetric else 1)]
        positive = [(self.query.rows(r) * self.key.rows(x.labels[r])).sum(1) * x.scale
                    for r in self.row_pieces()]
        self.positive = torch.cat(positive)  # (B,) scores, without log_q
        self.row_positive = self.positive if self.log_q is None else self.positive - self.log_q[x.labels]

    def row_pieces(self) -> Iterator[slice]:
        return pieces(0, self.x.query.shape[0], self.plan.rows)

    def key_pieces(self) -> Iterator[slice]:
        return pieces(0, self.x.key.shape[0], self.plan.keys)

    def scores(self, r: slice, c: slice) -> Tensor:
        """(R, C) scores without log_q; -inf for dropped keys and, so that it is counted apart, for the positive."""
        out = self.buffers[0][:(r.stop - r.start) * (c.stop - c.start)].view(r.stop - r.start, c.stop - c.start)
        q = self.query.rows(r) * self.x.scale
        for k in pieces(c.start, c.stop, self.plan.key_block):
            torch.mm(q, self.key.rows(k).T, out=out[:, k.start - c.start:k.stop - c.start])
        if self.x.key_ids is not None:
            for kind in zip(kinds(self.x.query_ids[r]), kinds(self.x.key_ids[c]), strict=True):
                drop_equal(out, *kind)
        self.put_positive(out, r, c, -torch.inf)
        return out

    def put_positive(self, tile: Tensor, r: slice, c: slice, value: float | Tensor) -> None:
        column = (self.x.labels[r] - c.start).unsqueeze(1)
        inside = (column >= 0) & (column < tile.shape[1])
        column = column.clamp(0, tile.shape[1] - 1)
        if isinstance(value, Tensor):
            value = value.unsqueeze(1)
        tile.scatter_(1, column, torch.where(inside, value, tile.gather(1, column)))

    def second(self, tile: Tensor) -> Tensor:
        """Another buffer with the tile's content."""
        return self.buffers[1][:tile.numel()].view(tile.shape).copy_(tile)

    def row_logits(self, tile: Tensor, c: slice) -> Tensor:
        return tile if self.log_q is None else tile.sub_(self.log_q[c])

    def statistics(self) -> tuple[Statistics, Statistics | None]:
        x = self.x
        top, rest = self.row_positive.clone(), torch.zeros_like(self.positive)
        if x.symmetric:  # under the largest number, keys that are nobody's positive count nothing
            key_top = x.by_key(self.positive, torch.finfo(x.dtype).max)
            key_rest = torch.zeros_like(key_top)
        for r in self.row_pieces():
            for c in self.key_pieces():
                tile = self.scores(r, c)
                if x.symmetric:
                    add_logits(self.second(tile), key_top[c], key_rest[c], 0)
                add_logits(self.row_logits(tile, c), top[r], rest[r], 1)
        rows = Statistics.of(self.row_positive, top, rest)
        if not x.symmetric:
            return rows, None
        return rows, Statistics.of(self.positive, key_top[x.labels], key_rest[x.labels])

    def new_gradients(self, wanted: Wanted) -> Gradients:
        new, query, key = self.positive.new_empty, self.x.query, self.x.key
        return Gradients(new(query.shape) if wanted.over_query else None, new(key.shape) if wanted.over_key else None,
                         new(()).zero_() if wanted.scale else None,
                         new(key.shape[0]).zero_() if wanted.log_q else None)

    def add_products(self, tile: Tensor, weights: Tensor, r: slice, c: slice, grads: Gradients) -> None:
        """``weights`` (R,) times ``tile`` (R, C): gradient for scores. The first that reaches a sum overwrites it.

        Weights, and for the keys the scale, go with the queries: those are fewer numbers than scores or keys.
        """
        weights = weights.unsqueeze(1)
        if grads.query is not None:
            for k in pieces(c.start, c.stop, self.plan.key_block):
                grads.query[r].addmm_(tile[:, k.start - c.start:k.stop - c.start], self.key.rows(k),
                                      beta=int(k.start > 0))
            if c.stop == self.x.key.shape[0]:
                grads.query[r].mul_(weights)
        if grads.key is not None:
            query = self.query.rows(r) * (weights if self.scale_from_key(grads) else weights * self.x.scale)
            grads.key[c].addmm_(tile.T, query, beta=int(r.start > 0))

    @staticmethod
    def scale_from_key(grads: Gradients) -> bool:
        return grads.scale is not None and grads.query is None

    def finish(self, grads: Gradients, wanted: Wanted) -> Gradients:
        if grads.query is not None:
            self.query.finish(grads.query, self.x.scale, grads.scale)
        if grads.key is not None:
            from_key = self.scale_from_key(grads)
            self.key.finish(grads.key, self.x.scale if from_key else None, grads.scale if from_key else None)
        return Gradients(grads.query if wanted.query else None, grads.key if wanted.key else None, grads.scale,
                         grads.log_q)


def drop_equal(tile: Tensor, row_ids: Tensor, key_ids: Tensor) -> None:
    """-inf wherever the ids are equal."""
    if tile.device.type == "cpu":  # few are: look them up in the sorted ids instead of comparing all pairs
        row_ids, (ordered, order) = row_ids.long().contiguous(), key_ids.long().sort()
        first = torch.searchsorted(ordered, row_ids)
        count = torch.searchsorted(ordered, row_ids, right=True) - first
        total = int(count.sum())
        if total <= tile.numel() // 32:
            row = torch.repeat_interleave(count)
            place = torch.arange(total) + (first - count.cumsum(0) + count)[row]
            tile[row, order[place]] = -torch.inf
            return
    tile.masked_fill_(row_ids.unsqueeze(1) == key_ids, -torch.inf)


def add_logits(logits: Tensor, top: Tensor, rest: Tensor, dim: int) -> None:
    """Updates the running (top, rest) of :class:`Statistics`; the logits become exp(logits - top)."""
    new = torch.maximum(top, logits.amax(dim))
    logits.sub_(new.unsqueeze(dim)).exp_()
    rest.mul_(torch.exp(top - new)).add_(logits.sum(dim))
    top.copy_(new)


def forward(x: Problem, wanted: Wanted) -> tuple[Tensor, Tensor, Gradients]:
    """(B,) losses, what :func:`backward` needs, and the wanted gradients of the sum of the losses.

    Gradients are for where one pass does, see ``routing.forms_gradients``.
    """
    tiles = Tiles(x)
    if wanted.any:
        rows, columns, grads = one_pass(tiles, wanted)
    else:
        (rows, columns), grads = tiles.statistics(), Gradients()
    losses = rows.loss if columns is None else (rows.loss + columns.loss) / 2
    saved = rows.stacked() if columns is None else torch.cat([rows.stacked(), columns.stacked()])
    return losses * tiles.poison, saved, grads


def one_pass(tiles: Tiles, wanted: Wanted) -> tuple[Statistics, None, Gradients]:
    parts, grads, c = [], tiles.new_gradients(wanted), slice(0, tiles.x.key.shape[0])
    for r in tiles.row_pieces():
        tile = tiles.row_logits(tiles.scores(r, c), c)
        top, rest = tiles.row_positive[r].clone(), torch.zeros_like(tiles.positive[r])
        add_logits(tile, top, rest, 1)
        rows = Statistics.of(tiles.row_positive[r], top, rest)
        tiles.put_positive(tile, r, c, -rest)
        parts.append(rows)
        weights = tiles.poison / rows.norm
        if grads.log_q is not None:
            grads.log_q.addmv_(tile.T, weights, alpha=-1)
        tiles.add_products(tile, weights, r, c, grads)
    whole = Statistics(*(torch.cat([getattr(p, name) for p in parts]) for name in ("top", "rest", "norm", "loss")))
    return whole, None, tiles.finish(grads, wanted)


def backward(x: Problem, saved: Tensor, weights: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of ``sum_i weights_i loss_i``: a second pass over the scores."""
    tiles = Tiles(x)
    grads, weights = tiles.new_gradients(wanted), weights * (tiles.poison * x.direction_weight)
    top, rest, norm = saved[:3]
    factor = weights / norm
    if x.symmetric:  # keys have factors too: both go into the tile
        back_top, back_rest, back_norm = saved[3:]
        back_factor = weights / back_norm
        key_top, key_factor = x.by_key(back_top, torch.inf), x.by_key(back_factor, 0.0)
        factor, row_factor = torch.ones_like(factor), factor
    for r in tiles.row_pieces():
        for c in tiles.key_pieces():
            tile = tiles.scores(r, c)
            if x.symmetric:
                back = tiles.second(tile).sub_(key_top[c]).exp_().mul_(key_factor[c])
            tiles.row_logits(tile, c).sub_(top[r].unsqueeze(1)).exp_()
            tiles.put_positive(tile, r, c, -rest[r])
            if x.symmetric:
                tile.mul_(row_factor[r].unsqueeze(1))
            if grads.log_q is not None:
                grads.log_q[c].addmv_(tile.T, factor[r], alpha=-1)
            if x.symmetric:
                tiles.put_positive(back, r, c, -(back_factor * back_rest)[r])
                tile.add_(back)
            tiles.add_products(tile, factor[r], r, c, grads)
    return tiles.finish(grads, wanted)
