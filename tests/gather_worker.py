"""One of several processes that train on parts of a batch; test_gather.py starts them and compares with one process.

    torchrun --nproc-per-node 2 gather_worker.py FOLDER [--accelerate]

Every process writes what it found to FOLDER/RANK.pt.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from karma_fast.losses import info_nce as module
from karma_fast.losses.info_nce import InfoNCELoss, gather_rows
from karma_kernels import info_nce

BATCH, WIDTH, ITEMS = 8, 4, 6


class Case(NamedTuple):
    sizes: tuple[int, ...]  # queries of each process
    hard: int = 1  # hard negatives of each query
    symmetric: bool = False
    extras: tuple[str, ...] = ()  # of "ids", "query_ids", "log_q"
    variant: str = "plain"


def cases(processes: int) -> list[Case]:
    splits = {2: [(4, 4), (3, 5), (8, 0)], 4: [(2, 2, 2, 2), (1, 4, 0, 3), (0, 0, 8, 0)]}[processes]
    everything = ("ids", "query_ids", "log_q")
    chosen = [(), ("ids",), ("log_q",), everything] if processes == 2 else [(), everything]
    found = [Case(sizes, hard, symmetric, extras)
             for sizes in splits for hard in (0, 1, 3) for symmetric in (False, True) for extras in chosen]
    found += [Case(sizes, 1, symmetric, everything, variant)
              for sizes in splits[:2] for symmetric in (False, True)
              for variant in ("twice", "autocast", "frozen keys", "int16 and int32 ids", "two kinds")]
    return found + wrong_cases(processes)


def wrong_cases(processes: int) -> list[Case]:
    """What this loss must not be mistaken for."""
    return [Case((BATCH // processes,) * processes, 0, variant=variant) for variant in ("whole loss", "detached")]


class Batch(NamedTuple):
    query: Tensor
    key: Tensor
    labels: Tensor | None
    query_ids: Tensor
    key_ids: Tensor


def batch_part(hard: int, sizes: tuple[int, ...], rank: int) -> Batch:
    """Rows of the one batch: positives first, then the hard negatives; odd processes shuffle their positives."""
    g = torch.Generator().manual_seed(hard)
    query, positive = torch.randn(2, BATCH, WIDTH, generator=g, dtype=torch.float64)
    negative = torch.randn(BATCH, hard, WIDTH, generator=g, dtype=torch.float64)
    query_ids, ids = torch.randint(ITEMS, (2, BATCH), generator=g)
    negative_ids = torch.randint(ITEMS, (BATCH, hard), generator=g)
    rows = torch.arange(BATCH).split(list(sizes))[rank]
    order = rows.flip(0) if rank % 2 else rows
    return Batch(query[rows], torch.cat([positive[order], negative[rows].flatten(0, 1)]),
                 (order.argsort() if rank % 2 else None), query_ids[rows],
                 torch.cat([ids[order], negative_ids[rows].flatten()]))


class Model(nn.Module):
    """Encoder and loss in one module, as DistributedDataParallel wants it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.tower = nn.Linear(WIDTH, 3, dtype=torch.float64)
        self.loss = InfoNCELoss(scale=4.0, symmetric=case.symmetric, gather=True).double()
        if "log_q" in case.extras:
            self.log_q = nn.Parameter(torch.rand(ITEMS, dtype=torch.float64).log())
        if case.variant == "autocast":
            self.float()

    def forward(self, batch: Batch) -> Tensor:
        extras, variant = self.case.extras, self.case.variant
        dtype = self.tower.weight.dtype
        query, key = self.tower(batch.query.to(dtype)), self.tower(batch.key.to(dtype))
        if variant == "whole loss":
            return whole_loss(query, key if batch.labels is None else key[batch.labels], self.loss.scale)
        arguments = {"query_ids": batch.query_ids if "query_ids" in extras else None,
                     "key_ids": batch.key_ids if "ids" in extras else None,
                     "log_q": self.log_q[batch.key_ids] if "log_q" in extras else None}
        if variant == "int16 and int32 ids":
            arguments["query_ids"] = batch.query_ids.to(torch.int16)
            arguments["key_ids"] = batch.key_ids.to(torch.int32 if batch.labels is None else torch.int16)
        if variant == "two kinds":
            arguments |= {name: torch.stack([arguments[name], -arguments[name] % 4], dim=1)
                          for name in ("query_ids", "key_ids")}
        if variant == "frozen keys":
            key = key.detach()
        loss = self.loss(query, key, batch.labels, **arguments)
        if variant == "twice":
            loss = loss + 0.5 * self.loss(-query, 2 * key.sin(), batch.labels)
        return loss


def whole_loss(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
    """The known mistake: rows of others come without gradient and every process computes the loss of all queries."""
    every = []
    for own in (query, key):
        blocks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(blocks, own.detach())
        blocks[dist.get_rank()] = own
        every.append(torch.cat(blocks))
    return info_nce(*every, scale=scale, normalize=True)


def step(model: nn.Module, case: Case, rank: int, backward=Tensor.backward) -> list[Tensor]:
    """The loss, and the gradients of all parameters after one backward."""
    batch = batch_part(case.hard, case.sizes, rank)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.variant == "autocast"):
        loss = model(batch)
    backward(loss)
    return [loss.detach(), *(p.grad for p in model.parameters())]


def averaged_step(case: Case) -> list[Tensor]:
    """Means over the processes: by DistributedDataParallel for two, by the last lines for four."""
    by_hand = dist.get_world_size() == 4
    model, gather = Model(case), gather_rows
    if not by_hand:
        model = DistributedDataParallel(model)
    if case.variant == "detached":
        def gather(x, sizes):
            return gather_rows(x.detach(), sizes)
    with mock.patch.object(module, "gather_rows", gather):
        loss, *grads = step(model, case, dist.get_rank())
    for x in (loss, *grads) if by_hand else (loss,):
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return [loss, *grads]


DTYPES = {"bfloat16": (torch.bfloat16,) * 2, "float16": (torch.float16,) * 2, "float32": (torch.float32,) * 2,
          "mixed": (torch.bfloat16, torch.float32)}  # of queries and keys


def inputs_in(dtypes: tuple[torch.dtype, torch.dtype], rank: int, processes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The loss under autocast of inputs that are leaves, and their gradients."""
    batch = batch_part(1, (BATCH // processes,) * processes, rank)
    query, key = (x.to(dtype).requires_grad_() for x, dtype in zip((batch.query, batch.key), dtypes, strict=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=processes > 1):
        loss = InfoNCELoss(scale=20.0, symmetric=True, gather=True)(query, key, batch.labels, key_ids=batch.key_ids)
    loss.backward()
    return loss.detach(), query.grad, key.grad


def gathered_rows(rank: int, processes: int) -> dict[str, Tensor]:
    """gather_rows alone: 256 + 1 + 1 + 1 in bfloat16 is 256 if each addition is rounded, 260 if the sum is."""
    sizes = torch.arange(processes)  # the first gives none
    columns = torch.full((2, rank), float(rank), dtype=torch.bfloat16).requires_grad_()
    rows = gather_rows(columns.T, sizes)  # not contiguous
    rows.backward(torch.full_like(rows, 256.0 if rank == 0 else 1.0))
    with torch.no_grad():
        silent = gather_rows(columns.T, sizes)
    # of one size and in float32 nothing is copied on the way
    same = torch.full((3,), float(rank)).requires_grad_()
    upstream = torch.arange(3.0 * processes)
    gather_rows(same, torch.full((processes,), 3)).backward(upstream)
    return {"rows": rows.detach(), "grad": columns.grad, "same grad": same.grad, "upstream": upstream,
            "silent": torch.tensor(not silent.requires_grad and torch.equal(silent, rows))}


def nothing_at_all() -> list[Tensor]:
    """No process has a query."""
    query, key = (torch.zeros(0, 3, requires_grad=True) for _ in range(2))
    loss_fn = InfoNCELoss(symmetric=True, gather=True)
    loss = loss_fn(query, key, key_ids=torch.zeros(0, dtype=torch.long))
    loss.backward()
    return [loss.detach(), query.grad, key.grad, loss_fn.log_scale.grad]


def refusals(rank: int) -> dict[str, str]:
    """What different or wrong inputs of the first process are answered with, by name, on this process."""
    first = {"ids": {"key_ids": torch.arange(2)}, "width": {"key": torch.randn(2, 5), "query": torch.randn(2, 5)},
             "dtype": {"key": torch.randn(2, 3).bfloat16(), "query": torch.randn(2, 3).bfloat16()},
             "grad": {"key": torch.randn(2, 3, requires_grad=True)}}
    trials = {name: change if rank == 0 else {} for name, change in first.items()}
    trials["kinds"] = {"key_ids": torch.zeros((2, 2) if rank == 0 else 2, dtype=torch.int64)}
    trials["label"] = {"labels": torch.tensor([0, 2])}  # the first key of the next process
    found = {}
    for name, change in trials.items():
        try:
            InfoNCELoss(gather=True)(**({"query": torch.randn(2, 3), "key": torch.randn(2, 3)} | change))
        except ValueError as error:
            found[name] = str(error)
    return found


def under_torchrun(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # a mistake must not wait for long
    rank, processes = dist.get_rank(), dist.get_world_size()
    found = {"steps": [averaged_step(case) for case in cases(processes)], "nothing": nothing_at_all(),
             "rows": gathered_rows(rank, processes), "refusals": refusals(rank),
             "dtypes": {name: inputs_in(dtypes, rank, processes) for name, dtypes in DTYPES.items()}}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def under_accelerate(folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    rank, found = accelerator.process_index, []
    for case in accelerate_cases():
        loss, *grads = step(accelerator.prepare(Model(case)), case, rank, accelerator.backward)
        found.append([accelerator.reduce(loss, "mean"), *grads])
    torch.save(found, folder / f"{rank}.pt")
    accelerator.end_training()


def accelerate_cases() -> list[Case]:
    return [case for case in cases(2) if case.hard == 1 and "query_ids" in case.extras and case.variant == "plain"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    (under_accelerate if "--accelerate" in sys.argv else under_torchrun)(Path(sys.argv[1]))
