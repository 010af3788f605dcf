"""The score of a query and an item, defined to the last bit, and how to get it for few pairs among many.

The score is the chain ``acc = fma(q[d], x[d], acc)`` over the width in float32, from 0. It does not depend on
blocking, threads or instruction set, so equal vectors have equal scores wherever they stand.
"""

from __future__ import annotations

import numpy as np

PAIRS = 1024  # pairs worked on at once: their running sums stay in the cache
MIDPOINT, BELOW_FLOAT32 = 1 << 28, (1 << 29) - 1  # of the 29 bits which float64 has and float32 has not


def pair_scores(queries: np.ndarray, items: np.ndarray, query_rows: np.ndarray, item_rows: np.ndarray) -> np.ndarray:
    """Exact scores of P pairs: (Q, D) float32, (N, D) float32, (P,) and (P,) row numbers -> (P,) float32.

    float64 holds the product of two float32 exactly, so each step rounds twice, once in float64 and once to float32.
    That differs from one rounding only if the float64 sum was rounded to the middle between two float32; these are
    found and moved off the middle, to the side of the true sum. (Sums below 1e-38 may keep the difference.)

    >>> x = np.array([[1.0, 2.0], [0.5, 0.25]], np.float32)
    >>> pair_scores(x, x, np.array([0, 0]), np.array([0, 1]))
    array([5., 1.], dtype=float32)
    """
    out = np.empty(len(query_rows), np.float32)
    for start in range(0, len(out), PAIRS):
        part = slice(start, start + PAIRS)
        q = np.ascontiguousarray(queries[query_rows[part]].T, dtype=np.float64)  # (D, pairs)
        x = np.ascontiguousarray(items[item_rows[part]].T, dtype=np.float64)
        np.multiply(q, x, out=q)
        acc, total = np.zeros(q.shape[1]), np.empty(q.shape[1])
        bits = np.empty(q.shape[1], np.int64)
        for product in q:
            np.add(acc, product, out=total)
            np.bitwise_and(total.view(np.int64), BELOW_FLOAT32, out=bits)
            middle = bits == MIDPOINT
            if middle.any():
                total = np.where(middle, _off_the_middle(acc, product, total), total)
            acc[:] = total.astype(np.float32)
        out[part] = acc
    return out


def _off_the_middle(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Moves ``total``, the rounded a + b, by its last bit towards the true sum; unchanged where it is the sum."""
    part = total - a
    error = (a - (total - part)) + (b - part)  # Knuth's two-sum: a + b == total + error
    return np.where(error == 0, total, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)))


def error_bound(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
    """(Q,) float64: how far a float64 dot product with any item can lie from the defined score.

    Raises ValueError if a score could overflow float32.
    """
    width = queries.shape[1]
    rounding = (width + 1) * 2.0**-24 / (1 - (width + 1) * 2.0**-24)
    longest = max((norms(items[i:i + 65536]).max() for i in range(0, len(items), 65536)), default=0.0)
    largest = norms(queries) * longest
    check_overflow(largest.max(initial=0))
    return 1.001 * rounding * largest + width * 2.0**-149


def check_overflow(largest: float) -> None:
    """ValueError if scores of this size are too near the end of float32."""
    if largest > 1e38:
        raise ValueError(f"queries and items: scores may reach {largest:.3g} and overflow float32; scale them down")


def norms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
