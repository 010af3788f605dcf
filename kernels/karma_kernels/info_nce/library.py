"""The chunked implementation on GPUs: scores by the library's matrix product, one Triton epilogue over each tile.

Costs as in ``chunked``. A score takes 4 bytes of workspace and, for inputs of 2 bytes, 2 more for its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..numerics import product
from . import configs
from .launch import Factors, Launch, Running, finish_all
from .problem import Gradients, Problem, Wanted, pieces
from .routing import converts, library_tile
from .staged import Accumulators, add_tile


class Tiles:
    """Buffers, and the tiles of a problem one after the other with their scores."""

    def __init__(self, p: Launch) -> None:
        x = p.x
        (rows, width), keys, kind = x.query.shape, x.key.shape[0], (x.query.dtype, x.query.device)
        self.rows, self.keys, self.one_pass = library_tile(rows, keys, x.query.itemsize, x.symmetric,
                                                           x.workspace_bytes, width if converts(*kind) else 0)
        self.scores = p.empty(self.rows * self.keys)
        self.gradient = self.scores
        if x.query.dtype != x.dtype:
            self.gradient = torch.empty(self.rows * self.keys, dtype=x.query.dtype, device=x.query.device)

    def each(self, p: Launch) -> Iterator[tuple[slice, slice, Tensor]]:
        for r in pieces(0, p.query.shape[0], self.rows):
            for k in pieces(0, p.key.shape[0], self.keys):
                out = self.scores[:(r.stop - r.start) * (k.stop - k.start)].view(r.stop - r.start, k.stop - k.start)
                yield r, k, product(p.query[r], p.key[k].T, out.dtype, out)


def forward(x: Problem, wanted: Wanted) -> tuple[Tensor, Tensor, Gradients]:
    """(B,) losses, what :func:`backward` needs, and the wanted gradients of the sum of the losses if one pass does."""
    p = Launch.of(x)
    tiles, config = Tiles(p), configs.epilogue(p.query.device)
    if tiles.one_pass and wanted.any:
        return one_pass(p, tiles, wanted)
    running = Running.of(p)
    for r, k, scores in tiles.each(p):
        running.add(p, config, r, k, scores)
    return *running.result(p), Gradients()


def one_pass(p: Launch, tiles: Tiles, wanted: Wanted) -> tuple[Tensor, Tensor, Gradients]:
    config, sums, up = configs.epilogue(p.query.device), Accumulators.of(p, wanted), p.up()
    losses, saved = [], []
    for r in pieces(0, p.query.shape[0], tiles.rows):
        part = p.rows(r)
        running = Running.of(part)
        (own, k, scores), = tiles.each(part)
        running.add(part, config, own, k, scores)
        for found, value in zip((losses, saved), running.result(part), strict=True):
            found.append(value)
        f = Factors.of(part, saved[-1], torch.ones_like(losses[-1]), up)
        rows = replace(sums, query=None if sums.query is None else sums.query[:, r])
        add_tile(part, f, rows, config, own, k, scores, tiles.gradient)
    grads = finish_all(p, f, wanted, sums.query, sums.key, sums.log_q, p.x.dtype)
    return torch.cat(losses), torch.cat(saved, 1), grads


def backward(x: Problem, saved: Tensor, weights: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of ``sum_i weights_i loss_i`` in the dtype of the inputs."""
    p = Launch.of(x)
    f, tiles, sums = Factors.of(p, saved, weights, p.up()), Tiles(p), Accumulators.of(p, wanted)
    for r, k, scores in tiles.each(p):
        add_tile(p, f, sums, configs.epilogue(p.query.device), r, k, scores, tiles.gradient)
    return finish_all(p, f, wanted, sums.query, sums.key, sums.log_q, x.query.dtype)
