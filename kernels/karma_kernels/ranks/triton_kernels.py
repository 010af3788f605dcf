"""The Triton kernels of ranks. Shapes: queries (Q, D), items (N, D), T targets, a tile of scores (M, N).

Scores that decide are chains of float32 fma in the order of the width. Products of float16 copies on tensor cores only
sort out what is surely above or surely below. Counts are integers, so atomic adds give the same in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..info_nce.triton_kernels import grouped

SMALLEST_NORMAL = tl.constexpr(2.0**-14)  # of float16


@triton.jit
def fma(a, b, acc, EMULATED: tl.constexpr):
    """a * b + acc in float32, rounded once; ``EMULATED``: for the interpreter, whose own fma rounds twice."""
    if EMULATED:
        product, wide = a.to(tl.float64) * b.to(tl.float64), acc.to(tl.float64)  # both exact
        total = wide + product
        part = total - wide
        error = (wide - (total - part)) + (product - part)  # Knuth's two-sum: what the sum lacks
        bits = total.to(tl.int64, bitcast=True)
        # rounded to odd, so that rounding again to float32 is as if from the true sum
        away = tl.where((error > 0) == (total > 0), 1, -1)
        bits = tl.where((error != 0) & (bits % 2 == 0), bits + away, bits)
        return bits.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, acc)


@triton.jit
def four_columns(x, P: tl.constexpr):
    """Columns of (P, 4), which a thread reads at once and has in its own registers."""
    even, odd = tl.split(tl.reshape(x, (P, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def pair_chain(q, x, q_rows, x_rows, inside, D, q_stride, q_step, x_stride, x_step, EVEN_D: tl.constexpr,
               EMULATED: tl.constexpr, P: tl.constexpr):
    """(P,) scores of the pairs (q_rows, x_rows), int64; a thread has a pair."""
    d = tl.arange(0, 4)
    acc = tl.zeros((P,), tl.float32)
    for start in range(0, D, 4):
        column = (start + d).to(tl.int64)[None, :]
        q_at = q + q_rows[:, None] * q_stride + column * q_step
        x_at = x + x_rows[:, None] * x_stride + column * x_step
        here = inside[:, None] if EVEN_D else inside[:, None] & (start + d < D)[None, :]
        # zeros beyond the width leave the chain as it is
        a0, a1, a2, a3 = four_columns(tl.load(q_at, mask=here, other=0.0).to(tl.float32), P)
        b0, b1, b2, b3 = four_columns(tl.load(x_at, mask=here, other=0.0).to(tl.float32), P)
        acc = fma(a1, b1, fma(a0, b0, acc, EMULATED), EMULATED)
        acc = fma(a3, b3, fma(a2, b2, acc, EMULATED), EMULATED)
    return acc


@triton.jit
def pair_scores_kernel(q, x, q_rows, x_rows, out, P, D, q_stride, q_step, x_stride, x_step, EVEN_D: tl.constexpr,
                       EMULATED: tl.constexpr, BLOCK: tl.constexpr):
    pairs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pairs < P
    q_row = tl.load(q_rows + pairs, mask=inside, other=0)
    x_row = tl.load(x_rows + pairs, mask=inside, other=0)
    score = pair_chain(q, x, q_row, x_row, inside, D, q_stride, q_step, x_stride, x_step, EVEN_D, EMULATED, BLOCK)
    tl.store(out + pairs, score, mask=inside)


@triton.jit
def resolve_kernel(q, x, query_rows, scores, pairs, greater, equal, P, D, q_stride, q_step, x_stride, x_step,
                   EVEN_D: tl.constexpr, EMULATED: tl.constexpr, BLOCK: tl.constexpr):
    """Adds P pairs, listed as ``target << 16 | item``, to the counts, by their exact scores."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < P
    pair = tl.load(pairs + at, mask=inside, other=0)
    target, x_row = (pair >> 16) & 0xFFFF, (pair & 0xFFFF).to(tl.int64)
    q_row = tl.load(query_rows + target, mask=inside, other=0)
    score = pair_chain(q, x, q_row, x_row, inside, D, q_stride, q_step, x_stride, x_step, EVEN_D, EMULATED, BLOCK)
    goal = tl.load(scores + target, mask=inside, other=0.0)
    one = tl.full((BLOCK,), 1, tl.int64)
    tl.atomic_add(greater + target, one, mask=inside & (score > goal), sem="relaxed")
    tl.atomic_add(equal + target, one, mask=inside & (score == goal), sem="relaxed")


@triton.jit
def exact_kernel(q, x, scores, greater, equal, T, N, D, q_stride, x_stride, EVEN_D: tl.constexpr,
                 EMULATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNROLL: tl.constexpr):
    """Adds a tile of exact scores to the counts. q: (D, T) and x: (D, N), float32, a column each, in whole blocks."""
    block, other = grouped(tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N), 16)
    targets = block * BLOCK_M + tl.arange(0, BLOCK_M)
    items = other * BLOCK_N + tl.arange(0, BLOCK_N)
    q_at, x_at = q + targets, x + items
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, UNROLL):
        for k in tl.static_range(UNROLL):
            if EVEN_D:
                a, b = tl.load(q_at + k * q_stride), tl.load(x_at + k * x_stride)
            else:  # zeros beyond the width leave the chain as it is
                a = tl.load(q_at + k * q_stride, mask=(targets >= 0) & (start + k < D), other=0.0)
                b = tl.load(x_at + k * x_stride, mask=(items >= 0) & (start + k < D), other=0.0)
            acc = fma(tl.broadcast_to(a[:, None], (BLOCK_M, BLOCK_N)), tl.broadcast_to(b[None, :], (BLOCK_M, BLOCK_N)),
                      acc, EMULATED)
        q_at += UNROLL * q_stride
        x_at += UNROLL * x_stride
    inside = targets < T
    goal = tl.load(scores + targets, mask=inside, other=0.0)
    acc = tl.where((items < N)[None, :], acc, float("nan"))  # which is neither above nor level
    above = tl.sum((acc > goal[:, None]).to(tl.int32), 1)
    level = tl.sum((acc == goal[:, None]).to(tl.int32), 1)
    tl.atomic_add(greater + targets, above.to(tl.int64), mask=inside & (above > 0), sem="relaxed")
    tl.atomic_add(equal + targets, level.to(tl.int64), mask=inside & (level > 0), sem="relaxed")


@triton.jit
def round_rows_kernel(x, rows, scale, out, lost, kept, R, D, width, x_stride, x_step, scale_stride,
                      HAS_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """float16 copies (padded R, width) of scaled rows, zeros beyond R and D; squared lengths of the rest and the copy.

    What float16 holds as a subnormal number becomes 0, so it does not matter what a tensor core makes of those.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < R
    row = tl.load(rows + r, mask=inside, other=0) if HAS_ROWS else r.to(tl.int64)
    factor = tl.load(scale + row * scale_stride, mask=inside, other=1.0)
    d = tl.arange(0, BLOCK_D)
    at = x + row[:, None] * x_stride
    to = out + r.to(tl.int64)[:, None] * width + d[None, :]
    lost_squares = tl.zeros((BLOCK_R,), tl.float32)
    kept_squares = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, width, BLOCK_D):
        here = inside[:, None] & (start + d < D)[None, :]
        v = tl.load(at + (start + d).to(tl.int64)[None, :] * x_step, mask=here, other=0.0).to(tl.float32)
        v *= factor[:, None]
        half = tl.where(tl.abs(v) < SMALLEST_NORMAL, 0.0, v).to(tl.float16)
        tl.store(to, half)
        back = half.to(tl.float32)
        lost_squares += tl.sum((v - back) * (v - back), 1)
        kept_squares += tl.sum(back * back, 1)
        to += BLOCK_D
    tl.store(lost + r, lost_squares)
    tl.store(kept + r, kept_squares)


@triton.jit
def filter_kernel(q, x, scores, per_lost, per_kept, floor, block_lost, block_kept, above_out, found, used,
                  pairs, T, N, width, capacity, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_D: tl.constexpr):
    """Counts what is surely above and lists the pairs too close to tell, for a tile of scores of float16 copies.

    The score of target t and item j of block b is as near as ``per_lost[t] block_lost[b] + per_kept[t] block_kept[b]
    + floor[t]`` to the defined one. ``found`` counts all close pairs; a tile's are listed if they fit in ``capacity``.
    A listed pair is ``target << 16 | item``: in registers one number less than two allow a second block to run.
    """
    block, other = grouped(tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N), 16)
    targets = block * BLOCK_M + tl.arange(0, BLOCK_M)
    items = other * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    q_at = q + targets.to(tl.int64)[:, None] * width + d[None, :]
    x_at = x + items.to(tl.int64)[:, None] * width + d[None, :]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, width, BLOCK_D):
        z = tl.dot(tl.load(q_at), tl.trans(tl.load(x_at)), z)
        q_at += BLOCK_D
        x_at += BLOCK_D
    inside = targets < T
    margin = tl.load(per_lost + targets, mask=inside, other=0.0) * tl.load(block_lost + other)
    margin += tl.load(per_kept + targets, mask=inside, other=0.0) * tl.load(block_kept + other)
    margin += tl.load(floor + targets, mask=inside, other=0.0)
    score = tl.load(scores + targets, mask=inside, other=float("nan"))
    low, high = score - margin, score + margin
    if (other + 1) * BLOCK_N > N:
        z = tl.where((items < N)[None, :], z, float("nan"))  # which is neither above nor close
    above = tl.sum((z > high[:, None]).to(tl.int32), 1)
    tl.atomic_add(above_out + targets, above, mask=above > 0, sem="relaxed")
    close = tl.sum(tl.sum((z >= low[:, None]).to(tl.int32), 1) - above, 0)
    if close > 0:  # noqa: SIM102 - "and" would add in any case
        if tl.atomic_add(found, close.to(tl.int64), sem="relaxed") + close <= capacity:
            listed = (z >= low[:, None]) & ~(z > high[:, None])  # as counted, whatever is NaN
            slot = tl.atomic_add(used + tl.zeros_like(z).to(tl.int32), 1, mask=listed, sem="relaxed")
            tl.store(pairs + slot, (targets << 16)[:, None] | items[None, :], mask=listed)
