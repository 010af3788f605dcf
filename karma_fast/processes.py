"""Training with several processes, each with the whole model and a share of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def group_of_hosts(timeout: timedelta) -> dist.ProcessGroup | None:
    """All processes, for tensors on the CPU whatever they train on; None for one process. Each must call it."""
    return dist.new_group(backend="gloo", timeout=timeout) if several() else None


def on_any(flag: bool, hosts: dist.ProcessGroup | None) -> bool:
    """Whether the flag is set on one of the processes, the same answer on each; no GPU is waited for.

    >>> on_any(True, None)
    True
    """
    if hosts is None:
        return flag
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=hosts)
    return bool(found)


def average_gradients(weights: Sequence[Tensor], bucket: int = 1 << 23) -> None:
    """Replaces the gradients of trained weights by their mean over the processes, about ``bucket`` numbers at a time.

    A weight that had no gradient has zeros afterwards, with one process too, so that training does not depend on how
    many there are.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> average_gradients([weight])
    >>> weight.grad
    tensor([0., 0.])
    """
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    if not several():
        return
    part: list[Tensor] = []
    for at, weight in enumerate(weights):
        part.append(weight.grad)
        if at + 1 == len(weights) or sum(g.numel() for g in part) >= bucket:
            flat = torch.cat([g.flatten().float() for g in part]).div_(dist.get_world_size())
            dist.all_reduce(flat)
            for g, mean in zip(part, flat.split([g.numel() for g in part]), strict=True):
                g.copy_(mean.view_as(g))
            part = []
