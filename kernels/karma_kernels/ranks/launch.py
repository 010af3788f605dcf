"""Launches of the Triton kernels of ranks, each without waiting for the device; ``parts.py`` puts them together.

Why the filter is right, for a target with query q and score s, and an item x. Let Q and X be q and x times powers of
two, which is exact, so that the largest number of q, and of all items of a part, lies in [2^14, 2^15). Let Q', X' be
their float16 copies, and z the product of the copies by a tensor core. The defined score d, scaled alike, obeys

    |d - Q.X|    <= g |Q| |X| + D 2^-149 scale          fma chain: g = D u / (1 - D u), u = 2^-24, and underflow
    |Q.X - Q'.X'| <= |Q| |X - X'| + |Q - Q'| |X'|       Cauchy-Schwarz
    |z - Q'.X'|  <= e |Q'| |X'|                         e = (D + 16) 2^-22

The last holds for sums in any order, each step exact to 2^-23 of the largest number in it: products of float16 are
exact, tensor cores align the terms of a short block (4 to 16 of them) to the largest and cut what is beyond 24 bits or
more (Fasi, Higham, Mikaitis and Pranesh 2021, https://doi.org/10.7717/peerj-cs.330), at worst 1.5 D 2^-23 in all. No
number of the copies is subnormal, so no product underflows. With |X| <= |X'| + |X - X'| the margin is linear in
|X - X'| and |X'|, whose largest values are taken for each block of items.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from ..info_nce.problem import pieces
from . import configs
from . import triton_kernels as kernels

INTERPRETED = not isinstance(kernels.filter_kernel, JITFunction)
LISTED_ROWS = 1 << 16  # targets, and items, of a part: a listed pair takes 32 bits
BEYOND = 2.0**80  # the largest scaled score is under 2^30 times the width
UP = 1 + 2.0**-20  # more than the rounding of a few float32 operations


class Copies(NamedTuple):
    """float16 copies of R scaled rows, padded with zeros to whole tiles."""

    values: Tensor  # (padded R, width)
    scale: Tensor  # (R,), or (1,) for all
    lost: Tensor  # (padded R,) float64: at least the length of what was rounded away, in scaled units
    kept: Tensor  # (padded R,) float64: at least the length of the copy

    @staticmethod
    def of(x: Tensor, rows: Tensor | None, scale: Tensor, block: int, buffer: Tensor) -> Copies:
        """Of ``x[rows]``, or of x; ``scale`` has one number for each row of x, or one; in ``buffer``, float16."""
        count, dim = len(x) if rows is None else len(rows), x.shape[1]
        padded, width = triton.cdiv(count, block) * block, copy_width(dim)
        values = buffer[:padded * width].view(padded, width)
        lost, kept = torch.empty((2, padded), dtype=torch.float32, device=x.device)
        kernels.round_rows_kernel[(triton.cdiv(padded, configs.ROWS["BLOCK_R"]),)](
            x, rows, scale, values, lost, kept, count, dim, width, *x.stride(), int(len(scale) > 1),
            HAS_ROWS=rows is not None, **configs.ROWS)
        if rows is not None:
            scale = scale[rows]
        return Copies(values, scale, length_bound(lost, dim), length_bound(kept, dim))


def copy_width(dim: int) -> int:
    return triton.cdiv(dim, configs.COPY_WIDTH) * configs.COPY_WIDTH


def length_bound(squares: Tensor, dim: int) -> Tensor:
    """Lengths in float64 from float32 sums of squares: at least the true ones, whatever rounding and underflow did."""
    return (squares.double() * (1 + (dim + 4) * 2.0**-23) + dim * 2.0**-120).sqrt()


def power_of_two(largest: Tensor) -> Tensor:
    """float32 powers of two that bring these numbers to [2^14, 2^15), as far as float32 reaches."""
    exponent = (largest.float().view(torch.int32) >> 23) - 127
    return (((14 - exponent).clamp(-126, 100) + 127) << 23).view(torch.float32)


def upwards(x: Tensor) -> Tensor:
    """float64, not negative -> float32, no smaller."""
    return (x * UP + 2.0**-120).float()


class Thresholds(NamedTuple):
    """What the filter compares with, float32, in units of the scaled scores."""

    scores: Tensor  # (T,)
    per_lost: Tensor  # (T,)
    per_kept: Tensor  # (T,)
    floor: Tensor  # (T,)
    block_lost: Tensor  # (blocks of items,)
    block_kept: Tensor

    @staticmethod
    def of(scores: Tensor, targets: Copies, items: Copies, dim: int, block: int) -> Thresholds:
        unit = targets.scale.double() * items.scale.double()
        kept, lost = (x[:len(scores)] for x in (targets.kept, targets.lost))
        chain, cores = dim * 2.0**-24 / (1 - dim * 2.0**-24), (dim + 16) * 2.0**-22
        goal = (scores.double() * unit).clamp(-BEYOND, BEYOND)  # an infinite one would make the thresholds NaN
        floor = dim * 2.0**-148 * unit + goal.abs() * 2.0**-22  # the second: of the thresholds' own rounding
        block_lost, block_kept = (x.view(-1, block).amax(1) for x in (items.lost, items.kept))
        return Thresholds(goal.float(), upwards((kept + lost) * (1 + chain)),
                          upwards(lost + chain * (kept + lost) + cores * kept), upwards(floor), upwards(block_lost),
                          upwards(block_kept))

    def rows(self, r: slice) -> Thresholds:
        """The same for some of the targets."""
        return self._replace(**{name: getattr(self, name)[r] for name in ("scores", "per_lost", "per_kept", "floor")})


class Close(NamedTuple):
    """Pairs too close to tell; if more were found than fit, the list is not to be used."""

    pairs: Tensor  # (capacity,) int32: target << 16 | item
    found: Tensor  # (1,) int64
    used: Tensor  # (1,) int32

    @staticmethod
    def empty(pairs: Tensor) -> Close:
        found, used = (torch.zeros(1, dtype=dtype, device=pairs.device) for dtype in (torch.int64, torch.int32))
        return Close(pairs, found, used)


def launch_filter(targets: Tensor, items: Copies, t: Thresholds, num_items: int, above: Tensor, close: Close) -> None:
    """Adds to ``above`` (T,) int32 how many items are surely above, and lists the close pairs."""
    tile, count, width = configs.filter_tile(above.device), len(above), items.values.shape[1]
    grid = triton.cdiv(count, tile.targets) * triton.cdiv(num_items, tile.items)
    kernels.filter_kernel[(grid,)](
        targets, items.values, *t, above, close.found, close.used, close.pairs, count, num_items, width,
        len(close.pairs), **tile.block())


def launch_resolve(queries: Tensor, items: Tensor, query_rows: Tensor, scores: Tensor, pairs: Tensor, found: int,
                   greater: Tensor, equal: Tensor) -> None:
    """Adds the first ``found`` of the listed pairs by their exact scores."""
    if found:
        kernels.resolve_kernel[(triton.cdiv(found, configs.PAIRS["BLOCK"]),)](
            queries, items, query_rows, scores, pairs, greater, equal, found, items.shape[1], *queries.stride(),
            *items.stride(), EVEN_D=items.shape[1] % 4 == 0, EMULATED=INTERPRETED, **configs.PAIRS)


def launch_exact(queries: Tensor, items: Tensor, query_rows: Tensor, scores: Tensor, greater: Tensor, equal: Tensor,
                 buffer: Tensor) -> None:
    """Adds all pairs by their exact scores; each side passes through half of ``buffer``, float32, a column each."""
    tile, dim = configs.exact_tile(items.device), items.shape[1]
    half = len(buffer) // 2 // 4 * 4  # both begin at 16 bytes, which the kernel reads at once
    rows, block = tile["BLOCK_M"], tile["BLOCK_N"]
    for t in pieces(0, len(scores), half // dim // rows * rows):
        targets = columns(queries[query_rows[t]], rows, buffer[:half])
        for p in pieces(0, len(items), half // dim // block * block):
            part = columns(items[p], block, buffer[half:])
            count, width = t.stop - t.start, p.stop - p.start
            kernels.exact_kernel[(triton.cdiv(count, rows) * triton.cdiv(width, block),)](
                targets, part, scores[t], greater[t], equal[t], count, width, dim, targets.stride(0), part.stride(0),
                EVEN_D=dim % tile["UNROLL"] == 0, EMULATED=INTERPRETED, **tile)


def columns(x: Tensor, block: int, buffer: Tensor) -> Tensor:
    """(R, D) -> (D, R in whole blocks, with zeros) float32 in the buffer."""
    count, dim = x.shape
    padded = triton.cdiv(count, block) * block
    out = buffer[:dim * padded].view(dim, padded)
    out[:, :count].copy_(x.T)
    out[:, count:].zero_()
    return out


def pair_scores(queries: Tensor, items: Tensor, query_rows: Tensor, item_rows: Tensor) -> Tensor:
    """(P,) float32; see :func:`karma_kernels.ranks.pair_scores`."""
    out = torch.empty(len(query_rows), dtype=torch.float32, device=queries.device)
    if len(out):
        kernels.pair_scores_kernel[(triton.cdiv(len(out), configs.PAIRS["BLOCK"]),)](
            queries, items, query_rows, item_rows, out, len(out), queries.shape[1], *queries.stride(), *items.stride(),
            EVEN_D=queries.shape[1] % 4 == 0, EMULATED=INTERPRETED, **configs.PAIRS)
    return out
