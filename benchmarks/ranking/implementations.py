"""Every way to find HR@1, 10 and 200 over the whole catalogue, seen items left out: a function from inputs to hits.

All use torch's number of threads. Whoever holds scores holds at most SCORE_BYTES of them at a time. Other libraries
are imported only when asked for. Those for a GPU are in ``gpu.py``; plain torch is the same for both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..implementations import importing, why_not
from .cases import KS, Case, Inputs
from .exact import Found

SCORE_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}
PATHS = ("avx512_vnni", "amx_bf16", "avx512_bf16", "avx512", "avx2", "portable", "torch")
IMPLICIT_BATCH = 100  # fixed inside implicit


@dataclass(frozen=True)
class Implementation:
    name: str
    find: Callable[[Inputs, object], Found]
    prepare: Callable[[Inputs], object] | None = None  # timed apart; those with the same function share what it gives
    probe: Callable[[str], object] = lambda device: None  # raises where it cannot run
    plan: Callable[[Inputs], Callable[[Inputs], object]] | None = None  # what to prepare for these inputs, not timed
    exact: bool = True  # as far as float32 is
    batch: Callable[[int], int | None] = lambda items: None  # queries at a time; None: all
    most_flops: float = float("inf")  # of a case; above, it takes minutes
    holds: float = 0.0  # what it prepares, in the call or before, over the bytes of the items; roughly
    leaves_out: bool = True  # it can leave out seen items


def absent(implementation: Implementation, case: Case, device: str = "cpu") -> str | None:
    """Why it is not measured on this case, or None."""
    if case.flops > implementation.most_flops:
        return f"too slow for this size: more than {implementation.most_flops:.0e} operations"
    if case.seen and not implementation.leaves_out:
        return "ranks all items: measured where none is left out"
    return why_not(implementation.probe, device)


# ------------------------------------------------------------------------------------------------ ours

def catalogue(inputs: Inputs, path: str = "auto", also: tuple[str, ...] = ()) -> object:
    from karma_fast.evaluation import Catalogue

    packed = Catalogue(inputs.items, path=path)
    for name in also:
        packed.pack(name)
    return packed


@functools.cache
def packing(path: str = "auto", also: tuple[str, ...] = ()) -> functools.partial:
    """The function that packs for these paths, always the same one."""
    return functools.partial(catalogue, path=path, also=also)


def plan_packing(inputs: Inputs, find: Callable) -> functools.partial:
    """By itself "auto" packs in its first call, which ranks too: finds out for which paths."""
    from karma_fast.evaluation import paths

    packed = catalogue(inputs)
    find(inputs, packed)
    return packing(also=tuple(name for name in paths() if packed.holds(name)))


def karma(inputs: Inputs, prepared: object, **options: object) -> Found:
    from karma_fast.evaluation import target_ranks

    items = inputs.items if prepared is None else prepared
    ranks = target_ranks(inputs.queries, items, inputs.targets, seen=inputs.seen, **options)
    return Found(ranks.expected[:, None] < np.array(KS), ranks, options.get("largest_k"))


def karma_top_k(inputs: Inputs, prepared: object) -> Found:
    from karma_fast.evaluation import top_k

    _, lists = top_k(inputs.queries, prepared, KS[-1], seen=inputs.seen)
    return Found(hits_in(torch.from_numpy(lists), inputs.targets))


def probe_path(device: str, **options: object) -> None:
    """Packs one item: says whether the path exists on this machine."""
    from karma_fast.evaluation import Catalogue

    Catalogue(torch.ones(1, 16), **options)


def ours(name: str, find: Callable = karma, holds: float = 1.0, **more: object) -> Implementation:
    return Implementation(name, find, packing(), probe_path, functools.partial(plan_packing, find=find), holds=holds,
                          **more)


def ours_by(path: str) -> Implementation:
    holds = 0.25 if path == "avx512_vnni" else 0.5 if path.endswith("bf16") else 1.0
    slow = path in ("portable", "torch")
    return Implementation(f"karma {path}", functools.partial(karma, path=path), packing(path),
                          functools.partial(probe_path, path=path), holds=holds,
                          most_flops=5e9 if slow else float("inf"))


# ------------------------------------------------------------------------------------------------ plain torch

def batch_rows(items: int, matrices: int = 1, device: str = "cpu") -> int:
    """Queries at a time, with so many 4-byte matrices of scores."""
    return max(1, SCORE_BYTES[device] // (4 * items * matrices))


def batches(inputs: Inputs, matrices: int = 1) -> Iterator[slice]:
    size = batch_rows(len(inputs.items), matrices, inputs.items.device.type)
    for start in range(0, len(inputs.queries), size):
        yield slice(start, min(start + size, len(inputs.queries)))


def hits_in(lists: Tensor, targets: Tensor) -> np.ndarray:
    """(Q, L) item numbers, best first, and the targets -> (Q, len(KS)) bool."""
    found = lists == targets[:, None]
    return torch.stack([found[:, :k].any(1) for k in KS], 1).cpu().numpy()


def leave_out_seen(scores: Tensor, inputs: Inputs, rows: slice) -> None:
    indptr, indices = inputs.seen
    lengths = np.diff(indptr[rows.start:rows.stop + 1])
    row = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(scores.device)
    column = torch.from_numpy(indices[indptr[rows.start]:indptr[rows.stop]]).to(scores.device)
    scores[row, column] = -torch.inf


def top_lists(inputs: Inputs, items: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and numbers of the first items: product and `topk`, batch by batch."""
    parts = []
    for rows in batches(inputs):
        scores = inputs.queries[rows].to(items.dtype) @ items.T
        leave_out_seen(scores, inputs, rows)
        parts.append(scores.topk(min(KS[-1], len(items))))
    values, indices = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(indices)


def torch_topk(inputs: Inputs, prepared: object) -> Found:
    items = inputs.items.float() if prepared is None else prepared
    return Found(hits_in(top_lists(inputs, items)[1], inputs.targets))


def recbole_style(inputs: Inputs, prepared: object) -> Found:
    """As RecBole's collector does it: the batch's scores, `topk`, a matrix of the same size with a 1 at each target,
    and a gather of that matrix."""
    parts, items = [], inputs.items.float()
    for rows in batches(inputs, 2):
        scores = inputs.queries[rows].float() @ items.T
        leave_out_seen(scores, inputs, rows)
        first = scores.topk(min(KS[-1], len(items))).indices
        wanted = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
        wanted[torch.arange(len(scores)), inputs.targets[rows]] = 1
        found = wanted.gather(1, first)
        parts.append(torch.stack([found[:, :k].amax(1) > 0 for k in KS], 1))
    return Found(torch.cat(parts).cpu().numpy())


# ------------------------------------------------------------------------------------------------ other libraries

def faiss_index(inputs: Inputs) -> object:
    import faiss

    index = faiss.IndexFlatIP(inputs.items.shape[1])
    index.add(inputs.items.float().numpy())
    return index


def faiss_search(inputs: Inputs, index: object) -> Found:
    """It cannot leave out items by query, so as many more are asked for as a query has seen, then filtered."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    indptr, seen = inputs.seen
    lengths = np.diff(indptr)
    size = len(inputs.items)
    _, lists = index.search(inputs.queries.float().numpy(), min(KS[-1] + int(lengths.max(initial=0)), size))
    row = np.arange(len(lists))
    keep = ~np.isin(lists + row[:, None] * size, seen + np.repeat(row, lengths) * size)
    target = keep & (lists == inputs.targets.numpy()[:, None])
    place = keep.cumsum(1)  # from 1, without what was seen
    return Found(np.stack([(target & (place <= k)).any(1) for k in KS], 1))


def implicit_filter(inputs: Inputs) -> object:
    from scipy.sparse import csr_matrix

    indptr, seen = inputs.seen
    return csr_matrix((np.ones(len(seen), np.float32), seen, indptr), shape=(len(indptr) - 1, len(inputs.items)))


def implicit_topk(inputs: Inputs, seen: object) -> Found:
    from implicit.cpu.topk import topk
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    # its own threads take a batch each; it asks for a matrix library of one thread beside them
    inner = 1 if len(inputs.queries) > IMPLICIT_BATCH else threads
    with threadpool_limits(inner, "blas"):
        lists, _ = topk(inputs.items.float().numpy(), inputs.queries.float().numpy(),
                        min(KS[-1], len(inputs.items)), filter_query_items=seen, num_threads=threads)
    return Found(hits_in(torch.from_numpy(lists), inputs.targets))


def torch_and_ranx(inputs: Inputs, prepared: object) -> Found:
    """Lists from torch, hits from ranx, both as its arrays of (item, score)."""
    from ranx import evaluate

    values, lists = top_lists(inputs, inputs.items.float())
    run = torch.stack([lists.double(), values.double()], 2).numpy()
    wanted = torch.stack([inputs.targets.double(), torch.ones(len(run), dtype=torch.double)], 1)[:, None].numpy()
    names = [f"hit_rate@{k}" for k in KS]
    found = evaluate(wanted, run, names, return_mean=False, threads=torch.get_num_threads(),
                     save_results_in_run=False)
    return Found(np.stack([found[name] > 0 for name in names], 1))


IMPLEMENTATIONS = (
    ours("karma auto"), ours("karma auto, early stop", functools.partial(karma, largest_k=KS[-1])),
    ours("karma top_k", karma_top_k, holds=0.25),
    Implementation("faiss IndexFlatIP", faiss_search, faiss_index, importing("faiss"), holds=1.0),
    Implementation("torch matmul + topk", torch_topk, batch=batch_rows),
    Implementation("RecBole style", recbole_style, batch=functools.partial(batch_rows, matrices=2)),
    Implementation("torch matmul + topk, bf16", torch_topk, lambda inputs: inputs.items.bfloat16(), exact=False,
                   batch=batch_rows, holds=0.5),
    Implementation("karma auto, packing included", karma, holds=1.0),
    Implementation("implicit", implicit_topk, implicit_filter,
                   importing("implicit.cpu.topk", "scipy.sparse", "threadpoolctl"),
                   batch=lambda items: IMPLICIT_BATCH),
    Implementation("torch + ranx", torch_and_ranx, probe=importing("ranx"), batch=batch_rows, most_flops=1e10),
    *map(ours_by, PATHS),
)
