"""What ranks on a GPU: queries and items lie there, hits end up on the host."""

from __future__ import annotations

import functools

import numpy as np
import torch

from .cases import KS, Inputs
from .exact import Found
from .implementations import Implementation, batch_rows, batches, karma, leave_out_seen, recbole_style, torch_topk


def probe_kernels(device: str) -> None:
    """Scores one pair, which compiles a kernel. Without Triton the definition would serve, far too slowly."""
    from karma_kernels.ranks import on_gpu, pair_scores

    one, first = torch.ones(1, 16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    if one.is_cuda and not on_gpu(one):
        raise RuntimeError("its kernels need Triton and an NVIDIA GPU of compute capability 7.5 or later")
    pair_scores(one, one, first, first)


def count_ranks(inputs: Inputs, prepared: object, **options: int) -> Found:
    """The kernels alone, without what `target_ranks` checks beforehand; they leave no item out."""
    from karma_fast.evaluation import Ranks
    from karma_kernels.ranks import count_ranks, pair_scores

    rows = torch.arange(len(inputs.queries), device=inputs.queries.device)
    scores = pair_scores(inputs.queries, inputs.items, rows, inputs.targets)
    greater, equal = (x.cpu().numpy() for x in count_ranks(inputs.queries, inputs.items, rows, scores, **options))
    ranks = Ranks(greater, equal - 1, np.full_like(greater, len(inputs.items)))  # one of the equal is the target
    return Found(ranks.expected[:, None] < np.array(KS), ranks)


def torch_count(inputs: Inputs, prepared: object) -> Found:
    """The batch's scores and how many of them are above and level with the target's."""
    parts, items = [], inputs.items.float()
    for rows in batches(inputs):
        scores = inputs.queries[rows].float() @ items.T
        leave_out_seen(scores, inputs, rows)
        goal = scores.gather(1, inputs.targets[rows, None])
        parts.append((scores > goal).sum(1) + ((scores == goal).sum(1) - 1) / 2)
    return Found((torch.cat(parts)[:, None] < torch.tensor(KS, device=items.device)).cpu().numpy())


def kernels(name: str, **options: int) -> Implementation:
    return Implementation(name, functools.partial(count_ranks, **options), probe=probe_kernels, leaves_out=False)


on_device = functools.partial(batch_rows, device="cuda")

GPU_IMPLEMENTATIONS = (
    Implementation("karma auto", karma, probe=probe_kernels),
    kernels("karma count_ranks"),
    kernels("karma count_ranks, 512 MiB", workspace_bytes=512 << 20),
    Implementation("torch matmul + count", torch_count, batch=on_device),
    Implementation("torch matmul + topk", torch_topk, batch=on_device),
    Implementation("RecBole style", recbole_style, batch=functools.partial(on_device, matrices=2)),
    Implementation("torch matmul + topk, bf16", torch_topk, lambda inputs: inputs.items.bfloat16(), exact=False,
                   batch=on_device),
)
