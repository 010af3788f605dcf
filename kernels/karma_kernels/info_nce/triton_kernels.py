"""The Triton kernels of InfoNCE. Shapes: queries (B, D), keys (N, D), a tile of scores (M, N).

Logits are ``z = scale * f_i * f_j * <x_i, y_j> (- log_q_j)`` with f the inverse norms (``NORMALIZE``) and are kept in
units of log2, so that ``exp2`` serves. Sums leave the positive out, see ``problem.Statistics``. Ids are int32 or pairs
of them, see ``launch.small_ids``. Offsets of rows are 64 bit. Nothing is added atomically: each output has one writer,
so bits repeat.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def grouped(blocks, others, GROUP: tl.constexpr):
    """(block, other) of a program: those that run together share few blocks and few others, kept in the cache."""
    index = tl.program_id(0)
    start = index // (GROUP * others) * GROUP
    size = tl.minimum(blocks - start, GROUP)
    within = index % (GROUP * others)
    return start + within % size, within // size


@triton.jit
def tile_dot(x, y, x_rows, y_rows, x_inside, y_inside, D, x_stride, y_stride, ACC: tl.constexpr,
             PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """(M, N) products of rows of x and y, D in blocks."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    d = tl.arange(0, BLOCK_D)
    x_at = x + x_rows.to(tl.int64)[:, None] * x_stride + d[None, :]
    y_at = y + y_rows.to(tl.int64)[:, None] * y_stride + d[None, :]
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            a = tl.load(x_at, mask=x_inside[:, None], other=0.0)
            b = tl.load(y_at, mask=y_inside[:, None], other=0.0)
        else:
            a = tl.load(x_at, mask=x_inside[:, None] & (start + d < D)[None, :], other=0.0)
            b = tl.load(y_at, mask=y_inside[:, None] & (start + d < D)[None, :], other=0.0)
        if UPCAST:
            a = a.to(ACC)
            b = b.to(ACC)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION, out_dtype=ACC)
        x_at += BLOCK_D
        y_at += BLOCK_D
    return acc


@triton.jit
def row_factors_kernel(x, inverse, usable, R, D, x_stride, LOW: tl.constexpr, HIGH: tl.constexpr,
                       NORMALIZE: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / |x| (0 for a zero row), and whether a row can be used: finite, and no norm beyond [LOW, HIGH]."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < R
    d = tl.arange(0, BLOCK_D)
    at = x + rows.to(tl.int64)[:, None] * x_stride + d[None, :]
    squares = tl.zeros((BLOCK_R,), ACC)
    zeros = tl.zeros((BLOCK_R,), ACC)
    largest = tl.zeros((BLOCK_R,), ACC)
    for start in range(0, D, BLOCK_D):
        v = tl.load(at + start, mask=inside[:, None] & (start + d < D)[None, :], other=0.0).to(ACC)
        squares += tl.sum(v * v, 1)
        zeros += tl.sum(v * 0.0, 1)  # NaN where anything is not finite
        largest = tl.maximum(largest, tl.max(tl.abs(v), 1))
    finite = zeros == 0.0
    if NORMALIZE:
        norm = tl.sqrt(squares)
        zero = largest == 0.0
        tl.store(inverse + rows, tl.where(zero, 0.0, 1.0 / tl.where(zero, 1.0, norm)), mask=inside)
        finite = finite & (zero | ((norm >= LOW) & (norm <= HIGH)))
    tl.store(usable + rows, finite, mask=inside)


@triton.jit
def positives_kernel(q, k, q_factor, k_factor, scale, labels, log_q, plain, positive, B, D, q_stride, k_stride,
                     HAS_LOGQ: tl.constexpr, NORMALIZE: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
                     BLOCK_D: tl.constexpr):
    """Scores of the positives without (``plain``) and with (``positive``) log_q, in units of log2."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < B
    label = tl.load(labels + rows, mask=inside, other=0)
    d = tl.arange(0, BLOCK_D)
    q_at = q + rows.to(tl.int64)[:, None] * q_stride + d[None, :]
    k_at = k + label.to(tl.int64)[:, None] * k_stride + d[None, :]
    total = tl.zeros((BLOCK_R,), ACC)
    for start in range(0, D, BLOCK_D):
        here = inside[:, None] & (start + d < D)[None, :]
        a = tl.load(q_at + start, mask=here, other=0.0).to(ACC)
        total += tl.sum(a * tl.load(k_at + start, mask=here, other=0.0).to(ACC), 1)
    total *= tl.load(scale) * LOG2E
    if NORMALIZE:
        total *= tl.load(q_factor + rows, mask=inside, other=0.0) * tl.load(k_factor + label, mask=inside, other=0.0)
    tl.store(plain + rows, total, mask=inside)
    if HAS_LOGQ:
        total -= tl.load(log_q + label, mask=inside, other=0.0).to(ACC) * LOG2E
    tl.store(positive + rows, total, mask=inside)


@triton.jit
def differ(a, b):
    """Whether ids differ; int64 hold two, which must both."""
    if a.dtype == tl.int64:
        x = a ^ b
        return (x.to(tl.int32) != 0) & ((x >> 32).to(tl.int32) != 0)
    return a != b


@triton.jit
def statistics_kernel(q, k, scores, q_factor, k_factor, scale, positive, key_least, labels, q_ids, k_ids, log_q,
                      top_out, rest_out, key_top_out, key_rest_out, row_start, row_stop, key_start, key_stop,
                      keys_per_program, D, q_stride, k_stride, scores_stride, HAS_IDS: tl.constexpr,
                      HAS_LOGQ: tl.constexpr, NORMALIZE: tl.constexpr, SYMMETRIC: tl.constexpr,
                      FROM_SCORES: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """Largest logit, the positive's at least, and sum of exp2: of a block of rows over some keys, of keys over it.

    Grid: blocks of rows times parts of the keys. ``top_out``, ``rest_out``: (parts, rows); ``key_top_out``,
    ``key_rest_out``: (blocks of rows, keys), with ``SYMMETRIC``. Rows and keys count from row_start and key_start.
    """
    block, part = grouped(tl.cdiv(row_stop - row_start, BLOCK_M), tl.cdiv(key_stop - key_start, keys_per_program), 16)
    rows = row_start + block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < row_stop
    label = tl.load(labels + rows, mask=row_inside, other=-1).to(tl.int32)
    a = tl.load(scale) * LOG2E
    if NORMALIZE:
        row_factor = tl.load(q_factor + rows, mask=row_inside, other=0.0) * a
    top = tl.load(positive + rows, mask=row_inside, other=0.0)
    if HAS_IDS:
        row_id = tl.load(q_ids + rows, mask=row_inside, other=0)
    rest = tl.zeros((BLOCK_M,), ACC)
    first = key_start + part * keys_per_program
    for start in range(first, tl.minimum(first + keys_per_program, key_stop), BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key_inside = keys < key_stop
        if FROM_SCORES:
            at = (rows - row_start).to(tl.int64)[:, None] * scores_stride + (keys - key_start)[None, :]
            z = tl.load(scores + at, mask=row_inside[:, None] & key_inside[None, :], other=0.0)
        else:
            z = tile_dot(q, k, rows, keys, row_inside, key_inside, D, q_stride, k_stride, ACC, PRECISION, UPCAST,
                         BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D)
        if NORMALIZE:
            z *= row_factor[:, None] * tl.load(k_factor + keys, mask=key_inside, other=0.0)[None, :]
        else:
            z *= a
        keep = row_inside[:, None] & key_inside[None, :] & (label[:, None] != keys[None, :])
        if HAS_IDS:
            keep = keep & differ(row_id[:, None], tl.load(k_ids + keys, mask=key_inside, other=0)[None, :])
        z = tl.where(keep, z, -float("inf"))
        if SYMMETRIC:
            key_top = tl.maximum(tl.max(z, 0), tl.load(key_least + keys, mask=key_inside, other=0.0))
            key_rest = tl.sum(tl.exp2(z - key_top[None, :]), 0)
            to = block.to(tl.int64) * (key_stop - key_start) + keys - key_start
            tl.store(key_top_out + to, key_top, mask=key_inside)
            tl.store(key_rest_out + to, key_rest, mask=key_inside)
        if HAS_LOGQ:
            z -= tl.load(log_q + keys, mask=key_inside, other=0.0).to(ACC)[None, :] * LOG2E
        new = tl.maximum(top, tl.max(z, 1))
        rest = rest * tl.exp2(top - new) + tl.sum(tl.exp2(z - new[:, None]), 1)
        top = new
    to = part.to(tl.int64) * (row_stop - row_start) + rows - row_start
    tl.store(top_out + to, top, mask=row_inside)
    tl.store(rest_out + to, rest, mask=row_inside)


@triton.jit
def merge_kernel(part_top, part_rest, top, rest, parts, C, BLOCK: tl.constexpr):
    """Adds (parts, C) statistics to the (C,) running ones, part by part."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    t = tl.load(top + c, mask=inside, other=0.0)
    r = tl.load(rest + c, mask=inside, other=0.0)
    at = c.to(tl.int64)
    for _ in range(parts):
        other = tl.load(part_top + at, mask=inside, other=0.0)
        new = tl.maximum(t, other)
        r = r * tl.exp2(t - new) + tl.load(part_rest + at, mask=inside, other=0.0) * tl.exp2(other - new)
        t = new
        at += C
    tl.store(top + c, t, mask=inside)
    tl.store(rest + c, r, mask=inside)


@triton.jit
def score_gradient(z, keep, is_positive, positive_value, row_top, row_factor, key_top, key_factor, bias,
                   HAS_LOGQ: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Gradient for a tile of scores z in log2 units; statistics come with the shape they broadcast from.

    z comes from a select, as in the statistics: of a product the compiler would form ``products * scale - top`` in one
    step, without rounding z, and large logits at the top would no longer be level with it.
    """
    biased = z - bias if HAS_LOGQ else z
    # the statistics came from other tiles, whose last bits may differ: large logits must not turn that into p > 1
    g = tl.exp2(tl.minimum(biased - row_top, 0.0)) * row_factor
    if SYMMETRIC:
        g += tl.exp2(tl.minimum(z - key_top, 0.0)) * key_factor
    return tl.where(is_positive, positive_value, tl.where(keep, g, 0.0))


@triton.jit
def gradient_rows_kernel(x, y, out, log_q_out, x_norm, y_norm, scale, labels, x_ids, y_ids, log_q, row_top,
                         row_factor, row_value, key_top, key_factor, value, X, Y, y_per_program, D, x_stride,
                         y_stride, QUERY_IS_X: tl.constexpr, HAS_IDS: tl.constexpr, HAS_LOGQ: tl.constexpr,
                         LOGQ_GRAD: tl.constexpr, NORMALIZE: tl.constexpr, SYMMETRIC: tl.constexpr, ACC: tl.constexpr,
                         PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_D: tl.constexpr):
    """(parts, X, D) sums over y of G y: the gradient for a block of rows x over some of the rows y, D <= BLOCK_D.

    x are the queries and y the keys, or the other way round. ``log_q_out``: (parts, X), for x the keys.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    xs = block * BLOCK_M + tl.arange(0, BLOCK_M)
    x_inside = xs < X
    d = tl.arange(0, BLOCK_D)
    x_tile = tl.load(x + xs.to(tl.int64)[:, None] * x_stride + d[None, :],
                     mask=x_inside[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        x_tile = x_tile.to(ACC)
    a = tl.load(scale) * LOG2E
    if NORMALIZE:
        x_factor = tl.load(x_norm + xs, mask=x_inside, other=0.0)
    if HAS_IDS:
        x_id = tl.load(x_ids + xs, mask=x_inside, other=0)
    if QUERY_IS_X:
        label = tl.load(labels + xs, mask=x_inside, other=-1).to(tl.int32)
        x_top = tl.load(row_top + xs, mask=x_inside, other=0.0)[:, None]
        x_scale = tl.load(row_factor + xs, mask=x_inside, other=0.0)[:, None]
        x_value = tl.load(value + xs, mask=x_inside, other=0.0)[:, None]
    else:
        if HAS_LOGQ:
            x_bias = tl.load(log_q + xs, mask=x_inside, other=0.0).to(ACC)[:, None] * LOG2E
        if SYMMETRIC:
            x_top = tl.load(key_top + xs, mask=x_inside, other=float("inf"))[:, None]
            x_scale = tl.load(key_factor + xs, mask=x_inside, other=0.0)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    column_sum = tl.zeros((BLOCK_M,), ACC)
    first = part * y_per_program
    for start in range(first, tl.minimum(first + y_per_program, Y), BLOCK_N):
        ys = start + tl.arange(0, BLOCK_N)
        y_inside = ys < Y
        y_tile = tl.load(y + ys.to(tl.int64)[:, None] * y_stride + d[None, :],
                         mask=y_inside[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            y_tile = y_tile.to(ACC)
        z = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION, out_dtype=ACC)
        if NORMALIZE:  # multiplied in the order of the statistics, for the same bits
            y_factor = tl.load(y_norm + ys, mask=y_inside, other=0.0)
            if QUERY_IS_X:
                z *= (x_factor * a)[:, None] * y_factor[None, :]
            else:
                z *= (y_factor * a)[None, :] * x_factor[:, None]
        else:
            z *= a
        keep = x_inside[:, None] & y_inside[None, :]
        if HAS_IDS:
            keep = keep & differ(x_id[:, None], tl.load(y_ids + ys, mask=y_inside, other=0)[None, :])
        if QUERY_IS_X:
            is_positive = label[:, None] == ys[None, :]
            top_r, factor_r, v = x_top, x_scale, x_value
        else:
            is_positive = tl.load(labels + ys, mask=y_inside, other=-1).to(tl.int32)[None, :] == xs[:, None]
            top_r = tl.load(row_top + ys, mask=y_inside, other=0.0)[None, :]
            factor_r = tl.load(row_factor + ys, mask=y_inside, other=0.0)[None, :]
            v = tl.load(value + ys, mask=y_inside, other=0.0)[None, :]
        top_k, factor_k, bias = top_r, factor_r, top_r  # stand-ins where they are not used
        if HAS_LOGQ:
            bias = tl.load(log_q + ys, mask=y_inside, other=0.0).to(ACC)[None, :] * LOG2E if QUERY_IS_X else x_bias
        if SYMMETRIC:
            if QUERY_IS_X:
                top_k = tl.load(key_top + ys, mask=y_inside, other=float("inf"))[None, :]
                factor_k = tl.load(key_factor + ys, mask=y_inside, other=0.0)[None, :]
            else:
                top_k, factor_k = x_top, x_scale
        z = tl.where(keep, z, -float("inf"))
        if LOGQ_GRAD:
            own = tl.load(row_value + ys, mask=y_inside, other=0.0)[None, :]
            g = score_gradient(z, keep, is_positive, own, top_r, factor_r, top_k, factor_k, bias, HAS_LOGQ, False)
            column_sum += tl.sum(g, 1)
        g = score_gradient(z, keep, is_positive, v, top_r, factor_r, top_k, factor_k, bias, HAS_LOGQ, SYMMETRIC)
        if NORMALIZE:
            g *= x_factor[:, None] * y_factor[None, :]
        g = g.to(y.dtype.element_ty)
        if UPCAST:
            g = g.to(ACC)
        acc = tl.dot(g, y_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    at = part.to(tl.int64) * X + xs
    tl.store(out + at[:, None] * D + d[None, :], acc, mask=x_inside[:, None] & (d < D)[None, :])
    if LOGQ_GRAD:
        tl.store(log_q_out + at, column_sum, mask=x_inside)


@triton.jit
def gradient_tile_kernel(q, k, scores, out, log_q_out, q_factor, k_factor, scale, labels, q_ids, k_ids, log_q,
                         row_top, row_factor, row_value, key_top, key_factor, value, row_start, row_stop,
                         key_start, key_stop, D, q_stride, k_stride, scores_stride, out_stride, HAS_IDS: tl.constexpr,
                         HAS_LOGQ: tl.constexpr, LOGQ_GRAD: tl.constexpr, NORMALIZE: tl.constexpr,
                         SYMMETRIC: tl.constexpr, FROM_SCORES: tl.constexpr, ACC: tl.constexpr,
                         PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """G itself, (rows, keys), for the library's matrix products. ``log_q_out``: (blocks of rows, keys).

    Grid: blocks of rows times blocks of keys.
    """
    block, key_block = grouped(tl.cdiv(row_stop - row_start, BLOCK_M), tl.cdiv(key_stop - key_start, BLOCK_N), 16)
    rows = row_start + block * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = key_start + key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, key_inside = rows < row_stop, keys < key_stop
    inside = row_inside[:, None] & key_inside[None, :]
    row_at, key_at = (rows - row_start).to(tl.int64)[:, None], (keys - key_start)[None, :]
    if FROM_SCORES:
        z = tl.load(scores + row_at * scores_stride + key_at, mask=inside, other=0.0)
    else:
        z = tile_dot(q, k, rows, keys, row_inside, key_inside, D, q_stride, k_stride, ACC, PRECISION, UPCAST, BLOCK_M,
                     BLOCK_N, BLOCK_D, EVEN_D)
    a = tl.load(scale) * LOG2E
    if NORMALIZE:
        row_norm = tl.load(q_factor + rows, mask=row_inside, other=0.0)
        key_norm = tl.load(k_factor + keys, mask=key_inside, other=0.0)
        z *= (row_norm * a)[:, None] * key_norm[None, :]
    else:
        z *= a
    z = tl.where(inside, z, -float("inf"))
    is_positive = tl.load(labels + rows, mask=row_inside, other=-1).to(tl.int32)[:, None] == keys[None, :]
    keep = inside
    if HAS_IDS:
        keep = keep & differ(tl.load(q_ids + rows, mask=row_inside, other=0)[:, None],
                             tl.load(k_ids + keys, mask=key_inside, other=0)[None, :])
    top_r = tl.load(row_top + rows, mask=row_inside, other=0.0)[:, None]
    factor_r = tl.load(row_factor + rows, mask=row_inside, other=0.0)[:, None]
    top_k, factor_k, bias = top_r, factor_r, top_r  # stand-ins where they are not used
    if HAS_LOGQ:
        bias = tl.load(log_q + keys, mask=key_inside, other=0.0).to(ACC)[None, :] * LOG2E
    if SYMMETRIC:
        top_k = tl.load(key_top + keys, mask=key_inside, other=float("inf"))[None, :]
        factor_k = tl.load(key_factor + keys, mask=key_inside, other=0.0)[None, :]
    if LOGQ_GRAD:
        own = tl.load(row_value + rows, mask=row_inside, other=0.0)[:, None]
        g = score_gradient(z, keep, is_positive, own, top_r, factor_r, top_k, factor_k, bias, HAS_LOGQ, False)
        to = block.to(tl.int64) * (key_stop - key_start) + keys - key_start
        tl.store(log_q_out + to, tl.sum(g, 0), mask=key_inside)
    v = tl.load(value + rows, mask=row_inside, other=0.0)[:, None]
    g = score_gradient(z, keep, is_positive, v, top_r, factor_r, top_k, factor_k, bias, HAS_LOGQ, SYMMETRIC)
    if NORMALIZE:
        g *= row_norm[:, None] * key_norm[None, :]
    tl.store(out + row_at * out_stride + key_at, g.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_of_parts(sums, at, inside, parts, part_size, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    total = tl.zeros((BLOCK_R, BLOCK_D), ACC)
    for _ in range(parts):
        total += tl.load(sums + at, mask=inside, other=0.0)
        at += part_size
    return total


@triton.jit
def finish_kernel(x, sums, x_norm, multiplier, out, along_out, R, D, parts, part_size, x_stride,
                  NORMALIZE: tl.constexpr, ALONG: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
                  BLOCK_D: tl.constexpr):
    """(parts, R, D) sums of f_i f_j G y -> gradient of the rows x; ``along_out`` (R,): <x, sum>. part_size = R D."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < R
    d = tl.arange(0, BLOCK_D)
    wide = rows.to(tl.int64)[:, None]
    m = tl.load(multiplier)
    along = tl.zeros((BLOCK_R,), ACC)
    if NORMALIZE or ALONG:
        for start in range(0, D, BLOCK_D):
            columns = (start + d)[None, :]
            here = inside[:, None] & (columns < D)
            v = tl.load(x + wide * x_stride + columns, mask=here, other=0.0).to(ACC)
            s = sum_of_parts(sums, wide * D + columns, here, parts, part_size, ACC, BLOCK_R, BLOCK_D)
            along += tl.sum(v * s, 1)
    if ALONG:
        tl.store(along_out + rows, along, mask=inside)
    if NORMALIZE:
        f = tl.load(x_norm + rows, mask=inside, other=0.0)
        along *= f * f
    for start in range(0, D, BLOCK_D):
        columns = (start + d)[None, :]
        here = inside[:, None] & (columns < D)
        s = sum_of_parts(sums, wide * D + columns, here, parts, part_size, ACC, BLOCK_R, BLOCK_D)
        if NORMALIZE:
            v = tl.load(x + wide * x_stride + columns, mask=here, other=0.0).to(ACC)
            s -= v * along[:, None]
        tl.store(out + wide * D + columns, (s * m).to(out.dtype.element_ty), mask=here)
