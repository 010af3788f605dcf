"""Exact inner products of chosen rows, and how many rows of a table score above and level with a given score.

The score of a query q and an item x is the chain ``acc = fma(q[d], x[d], acc)``, d = 0 .. D - 1, in float32 from 0, of
the inputs' values as float32. It does not depend on blocking, device or library, so equal rows score the same wherever
they stand, and results on a CPU and on any GPU are equal to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..info_nce.routing import by_triton
from . import reference

__all__ = ["count_ranks", "pair_scores"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def pair_scores(queries: Tensor, items: Tensor, query_rows: Tensor, item_rows: Tensor) -> Tensor:
    """Scores of P pairs of rows.

    Args:
        queries: (Q, D) float32, float16 or bfloat16.
        items: (N, D), likewise; the dtypes may differ.
        query_rows: (P,) int64, rows of ``queries``.
        item_rows: (P,) int64, rows of ``items``.

    Returns:
        (P,) float32, by Triton on CUDA devices, else in plain torch (slow: it is the definition).

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes or devices, rows out of range (which waits for the device).

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [0.5, 0.25]])
        >>> pair_scores(x, x.half(), torch.tensor([0, 0]), torch.tensor([0, 1]))
        tensor([5., 1.])
    """
    check_tables(queries, items)
    check_rows("query_rows", query_rows, queries)
    check_rows("item_rows", item_rows, items)
    if len(item_rows) != len(query_rows):
        raise ValueError(f"got {len(query_rows)} query_rows and {len(item_rows)} item_rows; one of each makes a pair")
    if not on_gpu(queries):
        return reference.pair_scores(queries, items, query_rows, item_rows)
    from . import launch  # imports triton

    with torch.cuda.device(queries.device):
        return launch.pair_scores(queries, items, query_rows.contiguous(), item_rows.contiguous())


@torch.no_grad()
def count_ranks(queries: Tensor, items: Tensor, query_rows: Tensor, scores: Tensor, *,
                workspace_bytes: int = 64 << 20) -> tuple[Tensor, Tensor]:
    """How many items score above and level with given scores, without holding the (Q, N) scores.

    On CUDA devices of compute capability 8.0 and later, products of float16 copies on tensor cores count what is
    surely above, by proven error bounds; pairs too close to tell are then scored exactly. Where there are too many of
    these (many copies of an item, for one), all pairs of that part are scored exactly. The device is waited for once
    for each part of the items and group of targets that the workspace holds.

    Args:
        queries: (Q, D) float32, float16 or bfloat16.
        items: (N, D), likewise; the dtypes may differ.
        query_rows: (T,) int64, a row of ``queries`` for each target; in ascending order memory is read best.
        scores: (T,) float32, of the targets, as from :func:`pair_scores`.
        workspace_bytes: limit for temporary memory on CUDA devices, besides a few numbers for each target and item of
            a part. At least one tile of each side is held.

    Returns:
        (T,) and (T,) int64: items above, items level (an item that is the target itself is one of these). 0.0 and -0.0
        are level. Values that are not finite, and scores beyond float32, are the caller's to rule out: the counts of
        such queries and of all targets against such items are unspecified.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, devices or workspace, rows out of range.

    Example:
        >>> items = torch.eye(4)
        >>> queries = torch.tensor([[0.1, 0.9, 0.2, 0.2]])
        >>> count_ranks(queries, items, torch.tensor([0]), torch.tensor([0.2]))
        (tensor([1]), tensor([2]))
    """
    check_tables(queries, items)
    check_rows("query_rows", query_rows, queries)
    if kind(scores) != torch.float32:
        raise TypeError(f"scores: got {kind(scores)}; a float32 tensor is needed")
    if scores.shape != query_rows.shape or scores.device != queries.device:
        raise ValueError(f"scores: got shape {tuple(scores.shape)} on {scores.device}; {tuple(query_rows.shape)} on "
                         f"{queries.device} is needed")
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int) or workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes: got {workspace_bytes!r}; a positive whole number of bytes is needed")
    if not on_gpu(queries):
        return reference.count_ranks(queries, items, query_rows, scores)
    from . import parts  # imports triton

    with torch.cuda.device(queries.device):
        # Triton has no tensor core products for older cards
        return parts.count_ranks(queries, items, query_rows.contiguous(), scores.contiguous(), workspace_bytes,
                                 filtered=by_triton(queries.device, (8, 0)))


def on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels can serve: by NVIDIA, for whose arithmetic the bounds hold, of 7.5 or later."""
    return by_triton(x.device, (7, 5))


def check_tables(queries: Tensor, items: Tensor) -> None:
    for name, x in (("queries", queries), ("items", items)):
        if kind(x) not in FLOATS:
            raise TypeError(f"{name}: got {kind(x)}; a float32, float16 or bfloat16 tensor is needed")
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; (rows, width) with a width >= 1 is needed")
    if queries.shape[1] != items.shape[1]:
        raise ValueError(f"queries have width {queries.shape[1]} and items {items.shape[1]}; the same is needed")
    if queries.device != items.device:
        raise ValueError(f"queries are on {queries.device} and items on {items.device}; move one of them")


def check_rows(name: str, rows: Tensor, table: Tensor) -> None:
    if kind(rows) != torch.int64:
        raise TypeError(f"{name}: got {kind(rows)}; an int64 tensor is needed")
    if rows.ndim != 1 or rows.device != table.device:
        raise ValueError(f"{name}: got shape {tuple(rows.shape)} on {rows.device}; one dimension on {table.device} is "
                         "needed")
    if len(rows) and not bool(((rows >= 0) & (rows < len(table))).all()):
        raise ValueError(f"{name}: got {int(rows.min())} to {int(rows.max())}; with {len(table)} rows 0 to "
                         f"{len(table) - 1} is needed")


def kind(x: object) -> torch.dtype | str:
    """The dtype of a tensor, the type of anything else."""
    return x.dtype if isinstance(x, Tensor) else type(x).__name__
