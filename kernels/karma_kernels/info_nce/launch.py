"""What the Triton paths share: arguments of the kernels, statistics of a region of scores, finished gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from . import configs
from . import triton_kernels as kernels
from .problem import Gradients, Problem, Statistics, Wanted, kinds

INTERPRETED = not isinstance(kernels.statistics_kernel, JITFunction)
LOG2E = math.log2(math.e)
# squares of the norms and products of two rows stay in the range of float32
SHORTEST, LONGEST = 2.0**-50, 2.0**50
FP16_RANGE = 2.0**14  # gradients for scores, at most 2, times this: 1 / N stays a normal number of float16


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype) -> str:
    """float32 products follow torch's own setting."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def aligned(x: Tensor) -> Tensor:
    """x itself where its rows can be read 16 bytes at a time, else a copy, zeros up to a multiple of 16 numbers."""
    width, stride = x.shape[1], x.stride(0) if len(x) > 1 else 16
    if x.stride(1) == 1 and width % 16 == 0 and stride % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -width % 16)).contiguous()


@dataclass
class Launch:
    """A problem with what every kernel needs of it."""

    x: Problem
    query: Tensor  # (B, D), aligned: D may have grown by zeros
    key: Tensor  # (N, D)
    query_norm: Tensor  # (B,) inverse norms; not read without normalize
    key_norm: Tensor
    query_ids: Tensor  # (B,) int32, int64 with two kinds; not read without ids
    key_ids: Tensor
    log_q: Tensor  # not read without log_q
    scale: Tensor
    valid: Tensor

    @staticmethod
    def of(x: Problem) -> Launch:
        query, key = aligned(x.query), aligned(x.key)
        scale = x.scale.contiguous()
        query_norm, query_usable = row_factors(query, x)
        key_norm, key_usable = row_factors(key, x)
        ids = [scale, scale] if x.key_ids is None else small_ids(x.query_ids, x.key_ids)
        return Launch(x, query, key, query_norm, key_norm, *ids, scale if x.log_q is None else x.log_q.contiguous(),
                      scale, x.valid & query_usable.all() & key_usable.all())

    def rows(self, r: slice) -> Launch:
        """The same for some of the queries."""
        x = replace(self.x, query=self.x.query[r], labels=self.x.labels[r])
        query_norm = self.query_norm[r] if x.normalize else self.query_norm
        return replace(self, x=x, query=self.query[r], query_norm=query_norm,
                       query_ids=self.query_ids if x.query_ids is None else self.query_ids[r])

    @property
    def flags(self) -> dict:
        return {"HAS_IDS": self.x.key_ids is not None, "HAS_LOGQ": self.x.log_q is not None,
                "NORMALIZE": self.x.normalize, "SYMMETRIC": self.x.symmetric, "ACC": accumulator(self.query.dtype),
                "PRECISION": precision(self.query.dtype), "UPCAST": INTERPRETED}

    def up(self) -> Tensor:
        """() that G is multiplied with: of the whole problem, as sums over pieces of it are divided by one number."""
        up = torch.ones_like(self.scale)
        if self.query.dtype == torch.float16:
            up = up * FP16_RANGE
            if self.x.normalize:  # the kernels also multiply with the inverse norms
                most = self.query_norm.amax() * self.key_norm.amax()
                up = up / most.masked_fill(most == 0, 1)  # where there are none but zero rows
        return up

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.x.dtype, device=self.query.device)


def small_ids(query_ids: Tensor, key_ids: Tensor) -> list[Tensor]:
    """int32 ids that are equal where the given ones are: a comparison for each score should be a narrow one.

    Of two kinds: int64 with one of such ids in either half.
    """
    if key_ids.ndim > 1:
        small = [small_ids(*kind) for kind in zip(kinds(query_ids), kinds(key_ids), strict=True)]
        return [(a.long() << 32) | (b.long() & 0xFFFFFFFF) for a, b in zip(*small, strict=True)]
    if max(query_ids.itemsize, key_ids.itemsize) <= 4:
        return [query_ids.int().contiguous(), key_ids.int().contiguous()]
    query_ids, key_ids = query_ids.long().contiguous(), key_ids.long().contiguous()
    ordered = key_ids.sort().values
    place = torch.searchsorted(ordered, query_ids)
    found = ordered[place.clamp(max=len(ordered) - 1)] == query_ids
    return [torch.where(found, place, -1).int(), torch.searchsorted(ordered, key_ids).int()]


def row_factors(x: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    inverse = torch.empty(rows if problem.normalize else 1, dtype=problem.dtype, device=x.device)
    usable = torch.empty(rows, dtype=torch.bool, device=x.device)
    block = 4
    kernels.row_factors_kernel[(triton.cdiv(rows, block),)](
        x, inverse, usable, rows, width, x.stride(0), LOW=SHORTEST, HIGH=LONGEST, NORMALIZE=problem.normalize,
        ACC=accumulator(x.dtype), BLOCK_R=block, BLOCK_D=128, num_warps=4)
    return inverse, usable


def positives(p: Launch) -> tuple[Tensor, Tensor]:
    """(B,) scores of the positives without and with log_q, in log2 units."""
    (rows, width), block = p.query.shape, 4
    plain, whole = p.empty(rows), p.empty(rows)
    kernels.positives_kernel[(triton.cdiv(rows, block),)](
        p.query, p.key, p.query_norm, p.key_norm, p.scale, p.x.labels, p.log_q, plain, whole, rows, width,
        p.query.stride(0), p.key.stride(0), HAS_LOGQ=p.x.log_q is not None, NORMALIZE=p.x.normalize,
        ACC=accumulator(p.query.dtype), BLOCK_R=block, BLOCK_D=128, num_warps=4)
    return plain, whole


def parts_of(blocks: int, length: int, tile: int, device: torch.device, programs: int) -> tuple[int, int]:
    """(parts, length of a part): so many that each multiprocessor has some programs, in multiples of a tile."""
    tiles = triton.cdiv(length, tile)
    parts = min(tiles, max(1, triton.cdiv(programs * configs.multiprocessors(device), blocks)))
    per_part = triton.cdiv(tiles, parts)
    return triton.cdiv(tiles, per_part), per_part * tile


def merge(part_top: Tensor, part_rest: Tensor, top: Tensor, rest: Tensor) -> None:
    block = 128
    parts, columns = part_top.shape
    kernels.merge_kernel[(triton.cdiv(columns, block),)](part_top, part_rest, top, rest, parts, columns, BLOCK=block,
                                                         num_warps=4)


def natural(positive: Tensor, top: Tensor, rest: Tensor) -> Statistics:
    """Statistics of log2 units; ``top`` stays in log2 units for the kernels, the loss is in nats."""
    found = Statistics.of((positive - top) / LOG2E, torch.zeros_like(top), rest)
    return Statistics(top, rest, found.norm, found.loss)


@dataclass
class Running:
    """Statistics while regions of the scores are added, in log2 units."""

    plain: Tensor  # (B,) score of the positive
    positive: Tensor  # (B,) the same with log_q
    top: Tensor  # (B,)
    rest: Tensor  # (B,)
    key_top: Tensor  # (N,), as the next with symmetric only
    key_rest: Tensor

    @staticmethod
    def of(p: Launch) -> Running:
        plain, positive = positives(p)
        top, rest = positive.clone(), torch.zeros_like(plain)
        if not p.x.symmetric:
            return Running(plain, positive, top, rest, plain, plain)
        # under the largest number, keys that are nobody's positive count nothing
        key_top = p.x.by_key(plain, torch.finfo(plain.dtype).max)
        return Running(plain, positive, top, rest, key_top, torch.zeros_like(key_top))

    def add(self, p: Launch, config: configs.Config, r: slice, k: slice, scores: Tensor | None = None) -> None:
        """``scores`` (R, K) float: products of the rows; None forms them."""
        rows, keys = r.stop - r.start, k.stop - k.start
        blocks = triton.cdiv(rows, config.rows)
        parts, per_part = parts_of(blocks, keys, config.keys, p.query.device, 32)
        top, rest = p.empty(parts, rows), p.empty(parts, rows)
        key_top, key_rest = (p.empty(blocks, keys), p.empty(blocks, keys)) if p.x.symmetric else (top, rest)
        kernels.statistics_kernel[(blocks * parts,)](
            p.query, p.key, p.scale if scores is None else scores, p.query_norm, p.key_norm, p.scale, self.positive,
            self.key_top, p.x.labels, p.query_ids, p.key_ids, p.log_q, top, rest, key_top, key_rest, r.start,
            r.stop, k.start, k.stop, per_part, p.query.shape[1], p.query.stride(0), p.key.stride(0),
            0 if scores is None else scores.stride(0), FROM_SCORES=scores is not None, **p.flags,
            **config.tile(p.query.shape[1]))
        merge(top, rest, self.top[r], self.rest[r])
        if p.x.symmetric:
            merge(key_top, key_rest, self.key_top[k], self.key_rest[k])

    def result(self, p: Launch) -> tuple[Tensor, Tensor]:
        """(B,) losses, and what :class:`Factors` needs."""
        rows = natural(self.positive, self.top, self.rest)
        losses, saved = rows.loss, rows.stacked()
        if p.x.symmetric:
            columns = natural(self.plain, self.key_top[p.x.labels], self.key_rest[p.x.labels])
            losses, saved = (rows.loss + columns.loss) / 2, torch.cat([saved, columns.stacked()])
        return losses * torch.where(p.valid, 1.0, torch.nan).to(losses.dtype), saved


@dataclass
class Factors:
    """What turns scores into their gradient; weights are relative to the largest, which ``multiplier`` restores."""

    row_top: Tensor  # (B,)
    row_factor: Tensor  # (B,) weight / norm
    row_value: Tensor  # (B,) of the positive, from the row direction
    key_top: Tensor  # (N,), symmetric only
    key_factor: Tensor  # (N,), symmetric only
    value: Tensor  # (B,) of the positive, from both directions
    multiplier: Tensor  # (): of sums of G y, without the scale

    @staticmethod
    def of(p: Launch, saved: Tensor, weights: Tensor, up: Tensor) -> Factors:
        """``up``: as :meth:`Launch.up` of the whole problem gives it, where p is a piece of one."""
        weights = weights.to(saved.dtype)
        largest = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
        weights = weights / largest * (up * p.x.direction_weight)
        top, rest, norm = saved[:3]
        factor = weights / norm
        value = row_value = -factor * rest
        key_top = key_factor = top
        if p.x.symmetric:
            back_top, back_rest, back_norm = saved[3:]
            back = weights / back_norm
            value = row_value - back * back_rest
            key_top, key_factor = p.x.by_key(back_top, torch.inf), p.x.by_key(back, 0.0)
        multiplier = torch.where(p.valid, largest / up, torch.nan)
        return Factors(top.contiguous(), factor, row_value, key_top, key_factor, value, multiplier)


def finish(p: Launch, f: Factors, x: Tensor, x_norm: Tensor, sums: Tensor,
           scale_grad: bool,
           dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Sums of G y -> (gradient, gradient of the scale)."""
    parts, rows, width = sums.shape
    block = 4
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    along = p.empty(rows) if scale_grad else p.scale
    multiplier = f.multiplier * p.scale
    kernels.finish_kernel[(triton.cdiv(rows, block),)](
        x, sums, x_norm, multiplier, out, along, rows, width, parts, rows * width, x.stride(0),
        NORMALIZE=p.x.normalize, ALONG=scale_grad, ACC=accumulator(x.dtype), BLOCK_R=block, BLOCK_D=128, num_warps=4)
    true_width = p.x.query.shape[1]
    return out[:, :true_width].contiguous(), along.sum() * f.multiplier if scale_grad else None


def finish_all(p: Launch, f: Factors, wanted: Wanted, query_sums: Tensor | None, key_sums: Tensor | None,
               log_q: Tensor | None, dtype: torch.dtype) -> Gradients:
    """(parts, rows, D) sums of G y of both sides and (N,) sums of G over the queries -> gradients in ``dtype``."""
    out = Gradients()
    if query_sums is not None:
        finish_queries(p, f, wanted, query_sums, dtype, out)
    if key_sums is not None:
        finish_keys(p, f, wanted, key_sums, log_q, dtype, out)
    return out


def finish_queries(p: Launch, f: Factors, wanted: Wanted, sums: Tensor, dtype: torch.dtype, out: Gradients) -> None:
    out.query, out.scale = finish(p, f, p.query, p.query_norm, sums, wanted.scale, dtype)


def finish_keys(p: Launch, f: Factors, wanted: Wanted, sums: Tensor, log_q: Tensor | None, dtype: torch.dtype,
                out: Gradients) -> None:
    """After the queries: where these gave the gradient of the scale, it is not formed again."""
    out.key, scale = finish(p, f, p.key, p.key_norm, sums, wanted.scale and out.scale is None, dtype)
    out.scale = scale if out.scale is None else out.scale
    if wanted.log_q:
        out.log_q = -log_q * f.multiplier
