"""The Triton kernels of the soft-prompt projection.

Shapes: after GELU ``a`` (R, MID), ``w2`` (num_tokens * H, MID), positions N of a prompt, S = R * num_tokens soft
tokens. MID is a multiple of BLOCK_D, by zeros. Offsets of rows are 64 bit. Each output has one writer, so bits repeat.
"""

from __future__ import annotations

import triton
import triton.language as tl

# the inverse of a number in this range is a normal one, and squares of what it leaves are in range
LIMIT32 = tl.constexpr(2.0**100)
LIMIT64 = tl.constexpr(2.0**1000)


@triton.jit
def in_range(largest, ACC: tl.constexpr):
    """What a row is divided by before its numbers are squared."""
    limit: tl.constexpr = LIMIT64 if ACC is tl.float64 else LIMIT32
    return tl.minimum(tl.maximum(largest, 1 / limit), limit)


@triton.jit
def merge(top, squares, other_top, other_squares, ACC: tl.constexpr):
    """Largest |z| and sum of squares relative to it, of two parts of a row."""
    new = tl.maximum(top, other_top)
    by = in_range(new, ACC)
    own, other = in_range(top, ACC) / by, in_range(other_top, ACC) / by
    return new, squares * (own * own) + other_squares * (other * other)


@triton.jit
def scale_of(top, squares, ACC: tl.constexpr):
    """i and m with ``z * i / m`` of length 1; 0 and 1 for a row of zeros, NaN where anything is not finite."""
    zero = (top == 0.0) & (squares == 0.0)
    norm = tl.sqrt(tl.where(zero, 1.0, squares))
    norm = tl.where(norm < float("inf"), norm, float("nan"))
    return tl.where(zero, 0.0, 1.0 / in_range(top, ACC)), norm


@triton.jit
def token_tile(a, w2, rows, tokens, inside, first_token, num_tokens, columns, column_inside, MID, H,
               ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(M, N) columns of z: of each row's own token, which is one of num_tokens from the first on."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    d = tl.arange(0, BLOCK_D)
    a_at = a + rows.to(tl.int64)[:, None] * MID + d[None, :]
    w_at = w2 + columns.to(tl.int64)[:, None] * MID + d[None, :]
    blocks = MID // BLOCK_D
    for i in range(num_tokens * blocks):
        token, start = first_token + i // blocks, i % blocks * BLOCK_D
        own = inside & (tokens == token)
        token_at = w_at + (token.to(tl.int64) * H * MID + start)
        x = tl.load(a_at + start, mask=own[:, None], other=0.0)
        y = tl.load(token_at, mask=column_inside[:, None], other=0.0)
        if UPCAST:
            x = x.to(ACC)
            y = y.to(ACC)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def given_rows(token_ids, table, learned, positions, slot, inside, columns, column_inside, H, V, E, table_stride,
               ACC: tl.constexpr):
    """(M, N) columns of token embeddings and learned rows; NaN where there is neither."""
    token = tl.load(token_ids + positions, mask=inside, other=0).to(tl.int64)
    here = inside & (slot == -1) & (token >= 0) & (token < V)
    value = tl.load(table + token[:, None] * table_stride + columns[None, :],
                    mask=here[:, None] & column_inside[None, :], other=0.0).to(ACC)
    row = -2 - slot
    trained = inside & (row >= 0) & (row < E)
    own = tl.load(learned + row[:, None] * H + columns[None, :], mask=trained[:, None] & column_inside[None, :],
                  other=0.0).to(ACC)
    return tl.where(here[:, None], value, tl.where(trained[:, None], own, float("nan")))


@triton.jit
def lengths_kernel(a, w2, top_out, squares_out, R, H, MID, num_tokens, columns_per_program, ACC: tl.constexpr,
                   PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_D: tl.constexpr):
    """(parts, S) largest |z| and sum of squares relative to it.

    Grid: blocks of rows times tokens, parts of columns.
    """
    token, part = tl.program_id(0) % num_tokens, tl.program_id(1)
    rows = tl.program_id(0) // num_tokens * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < R
    tokens = tl.zeros((BLOCK_M,), tl.int32) + token
    top = tl.zeros((BLOCK_M,), ACC)
    squares = tl.zeros((BLOCK_M,), ACC)
    first = part * columns_per_program
    for start in range(first, tl.minimum(first + columns_per_program, H), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        z = token_tile(a, w2, rows, tokens, inside, token, 1, columns, columns < H, MID, H, ACC, PRECISION, UPCAST,
                       BLOCK_M, BLOCK_N, BLOCK_D)
        new = tl.maximum(top, tl.max(tl.abs(z), 1))
        by = in_range(new, ACC)
        before = in_range(top, ACC) / by
        z *= (1.0 / by)[:, None]
        squares = squares * (before * before) + tl.sum(z * z, 1)
        top = new
    at = (part.to(tl.int64) * R + rows) * num_tokens + token
    tl.store(top_out + at, top, mask=inside)
    tl.store(squares_out + at, squares, mask=inside)


@triton.jit
def write_kernel(a, w2, top, squares, token_norm, token_ids, slots, table, learned, out, N, S, H, MID, V, E,
                 num_tokens, parts, table_stride, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(N, H) prompt from numbers after GELU and the statistics of their z. Grid: blocks of positions and columns."""
    column_blocks = tl.cdiv(H, BLOCK_N)
    positions = tl.program_id(0) // column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, column_inside = positions < N, columns < H
    slot = tl.load(slots + positions, mask=inside, other=-1).to(tl.int64)
    soft = inside & (slot >= 0) & (slot < S)
    own = tl.where(soft, slot, 0).to(tl.int32)
    tokens = own % num_tokens
    first = tl.min(tl.where(soft, tokens, num_tokens), 0)
    last = tl.max(tl.where(soft, tokens, -1), 0)
    z = token_tile(a, w2, own // num_tokens, tokens, soft, first, tl.maximum(last - first + 1, 0), columns,
                   column_inside, MID, H, ACC, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D)
    t = tl.zeros((BLOCK_M,), ACC)
    q = tl.zeros((BLOCK_M,), ACC)
    at = own.to(tl.int64)
    for _ in range(parts):
        t, q = merge(t, q, tl.load(top + at, mask=soft, other=0.0), tl.load(squares + at, mask=soft, other=0.0), ACC)
        at += S
    inverse, norm = scale_of(t, q, ACC)
    z = z * inverse[:, None] * (tl.load(token_norm) / norm)[:, None]
    value = given_rows(token_ids, table, learned, positions, slot, inside, columns, column_inside, H, V, E,
                       table_stride, ACC)
    tl.store(out + positions.to(tl.int64)[:, None] * H + columns[None, :],
             tl.where(soft[:, None], z, value).to(out.dtype.element_ty), mask=inside[:, None] & column_inside[None, :])


@triton.jit
def place_kernel(z, token_norm, token_ids, slots, table, learned, out, first_slot, stop_slot, S, H, V, E,
                 table_stride, ACC: tl.constexpr, BLOCK_H: tl.constexpr):
    """The same from z itself, (stop - first, H), for the positions of these soft tokens; the first part does the rest.

    Grid: positions.
    """
    position = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.arange(0, BLOCK_H)
    column_inside = columns < H
    slot = tl.load(slots + position).to(tl.int64)
    here = (slot >= first_slot) & (slot < stop_slot)
    row = tl.load(z + (slot - first_slot)[:, None] * H + columns[None, :], mask=here[:, None] & column_inside[None, :],
                  other=0.0)
    top = tl.max(tl.abs(row), 1)
    scaled = row * (1.0 / in_range(top, ACC))[:, None]
    inverse, norm = scale_of(top, tl.sum(scaled * scaled, 1), ACC)
    row = row * inverse[:, None] * (tl.load(token_norm) / norm)[:, None]
    other = (first_slot == 0) & ((slot < 0) | (slot >= S))
    value = given_rows(token_ids, table, learned, position, slot, other, columns, column_inside, H, V, E,
                       table_stride, ACC)
    tl.store(out + position.to(tl.int64)[:, None] * H + columns[None, :],
             tl.where(here[:, None], row, value).to(out.dtype.element_ty),
             mask=(here | other)[:, None] & column_inside[None, :])


@triton.jit
def sum_of_places(grad, order, start, stop, columns, column_inside, H, ACC: tl.constexpr, BLOCK_P: tl.constexpr,
                  BLOCK_H: tl.constexpr):
    """(H,) sum of the rows ``order[start:stop]`` of grad, in that order."""
    total = tl.zeros((BLOCK_H,), ACC)
    for at in range(start, stop, BLOCK_P):
        p = at + tl.arange(0, BLOCK_P)
        position = tl.load(order + p, mask=p < stop, other=0).to(tl.int64)
        total += tl.sum(tl.load(grad + position[:, None] * H + columns[None, :],
                                mask=(p < stop)[:, None] & column_inside[None, :], other=0.0).to(ACC), 0)
    return total


@triton.jit
def through_norm_kernel(z, grad, order, starts, token_norm, out, first_slot, H, ACC: tl.constexpr,
                        BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr):
    """(n, H) gradient for z from that of the prompt; ``order[starts[s]:starts[s + 1]]`` are a soft token's places.

    Grid: soft tokens from the first on.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_H)
    column_inside = columns < H
    at = starts + first_slot + row
    total = sum_of_places(grad, order, tl.load(at), tl.load(at + 1), columns, column_inside, H, ACC, BLOCK_P, BLOCK_H)
    unit = tl.load(z + row * H + columns, mask=column_inside, other=0.0)
    top = tl.max(tl.abs(unit), 0)
    scaled = unit * (1.0 / in_range(top, ACC))
    inverse, norm = scale_of(top, tl.sum(scaled * scaled, 0), ACC)
    unit = unit * inverse / norm
    total -= unit * tl.sum(unit * total, 0)
    tl.store(out + row * H + columns, (total * (tl.load(token_norm) * inverse / norm)).to(out.dtype.element_ty),
             mask=column_inside)


@triton.jit
def row_sums_kernel(grad, order, starts, out, first_slot, H, ACC: tl.constexpr, BLOCK_P: tl.constexpr,
                    BLOCK_H: tl.constexpr):
    """(parts, rows, H) sums of the prompt's gradient over parts of each row's places. Grid: rows, parts."""
    row, rows, part, parts = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.num_programs(1)
    columns = tl.arange(0, BLOCK_H)
    column_inside = columns < H
    start = tl.load(starts + first_slot + row)
    stop = tl.load(starts + first_slot + row + 1)
    share = tl.cdiv(stop - start, parts)
    start += part * share
    total = sum_of_places(grad, order, start, tl.minimum(start + share, stop), columns, column_inside, H, ACC,
                          BLOCK_P, BLOCK_H)
    at = (part * rows + row).to(tl.int64) * H + columns
    tl.store(out + at, total.to(out.dtype.element_ty), mask=column_inside)
