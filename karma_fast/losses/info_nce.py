"""InfoNCE as a module: learnable scale, negatives from all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from karma_kernels import info_nce
from karma_kernels.info_nce import FLOATS, check_inputs
from karma_kernels.numerics import compute_dtype

from ..processes import several
from .scaled import ScaledLoss


class InfoNCELoss(ScaledLoss):
    r"""Softmax cross-entropy of each query against the keys of the whole batch (in-batch negatives).

    .. math:: \ell_i = -\log \frac{\exp(s \, q_i \cdot k_{y_i} - \log Q_{y_i})}
              {\sum_{j \notin M_i} \exp(s \, q_i \cdot k_j - \log Q_j)}

    M_i are the keys that carry the id of row i's positive (of two kinds: either id) without being it. The scale s is
    ``exp(log_scale)``.

    Args:
        scale: first value of s.
        learnable: whether ``log_scale`` is trained; else it is a buffer.
        max_scale: limit for s. ``clamp_()`` applies it and belongs after each step of the optimiser: a clamp in the
            forward would leave a scale at the limit without a gradient.
        symmetric: add the direction key -> queries and halve (see :func:`karma_kernels.info_nce`).
        normalize: L2-normalise queries and keys, so that s multiplies a cosine.
        gather: use the keys (and ids, and log_q) of all processes of the default process group as negatives. Batches
            may differ in size. Without a process group this changes nothing. See below.
        backend: implementation, see :func:`karma_kernels.info_nce`.

    With ``gather=True`` each process computes the losses of its own queries only. It returns their sum times
    ``processes / queries of all processes``. The average over the processes of the returned losses, and of their
    gradients, which is what DistributedDataParallel makes, is then exactly the mean over all queries, and its
    gradient, as one process with the whole batch would compute it, also where batches differ in size. (With equal
    sizes the returned loss is simply the mean over the own queries.) ``log_scale`` counts as a parameter like the
    others: wrap the loss together with the model, or average its gradient over the processes yourself.

    What gathering costs a process, with n keys in the largest batch and P processes: it receives P n keys in their own
    dtype, and as many numbers of 4 bytes (float64: 8) in the backward, where the gradients of the gathered keys are
    summed (a reduce-scatter); with ``symmetric`` the queries too. All batches are padded to the largest on the way.
    Each call first exchanges the sizes. With NCCL alone the host waits for the GPU there; a group that has a CPU
    backend too, as ``init_process_group("cpu:gloo,cuda:nccl")`` makes, exchanges them on the host and nothing waits.

    References:
        van den Oord et al. 2018, https://arxiv.org/abs/1807.03748; learnable scale and symmetric form: Radford et al.
        2021, https://arxiv.org/abs/2103.00020; logQ correction: Yi et al. 2019,
        https://doi.org/10.1145/3298689.3346996

    Requirements:

    +------------+-----------------------------------------------------------------------------------------+
    | input      | needed                                                                                  |
    +============+=========================================================================================+
    | query      | (B, D) floating                                                                         |
    | key        | (N, D) floating: positives, and any number of further negatives. Of two dtypes, as      |
    |            | under autocast, the wider one counts (:func:`karma_kernels.info_nce` wants one)         |
    | labels     | (B,) integers into this process's ``key``; None: key i belongs to query i               |
    | query_ids  | (B,) or (B, 2) integers, id of the item asked for; None: ``key_ids[labels]``            |
    | key_ids    | (N,) or (N, 2) integers, id of the item behind a key, and a second one such as that of  |
    |            | the user whose target it is; None: nothing is masked                                    |
    | log_q      | (N,) floating, log of the sampling probability of a key; None: no correction            |
    +------------+-----------------------------------------------------------------------------------------+

    Inputs:
        see the table; the module is called with them in that order. With ``gather=True`` all processes must call it
        together, and the same inputs must be given, be of the same dtype and need a gradient on all of them: a process
        without samples gives tensors of no rows that went through its model. Else all raise a ValueError.

    Returns:
        the loss, one element.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> loss_fn = InfoNCELoss(scale=10.0)
        >>> users, items = torch.randn(4, 16, requires_grad=True), torch.randn(6, 16)
        >>> loss = loss_fn(users, items, key_ids=torch.tensor([1, 2, 3, 4, 1, 5]))
        >>> loss.backward()
        >>> users.grad.shape, loss_fn.log_scale.grad is not None
        (torch.Size([4, 16]), True)
        >>> loss_fn.clamp_()  # after optimizer.step()
        >>> round(loss_fn.scale.item(), 4)
        10.0
    """

    def __init__(self, scale: float = 1 / 0.07, learnable: bool = True, max_scale: float = 100.0, *,
                 symmetric: bool = False, normalize: bool = True, gather: bool = False, backend: str = "auto") -> None:
        super().__init__(scale, learnable, max_scale)
        self.symmetric, self.normalize, self.gather, self.backend = symmetric, normalize, gather, backend

    def forward(self, query: Tensor, key: Tensor, labels: Tensor | None = None, query_ids: Tensor | None = None,
                key_ids: Tensor | None = None, log_q: Tensor | None = None) -> Tensor:
        query, key = in_one_dtype(query, key)
        options = {"scale": self.scale, "normalize": self.normalize, "backend": self.backend}
        if not (self.gather and several()):
            return info_nce(query, key, labels, query_ids=query_ids, key_ids=key_ids, log_q=log_q,
                            symmetric=self.symmetric, **options)

        check_inputs(query, key, labels, query_ids, key_ids, log_q, self.symmetric)
        if labels is None:
            labels = torch.arange(query.shape[0], device=query.device)
        labels, bad = labels.long().clamp(0, max(key.shape[0] - 1, 0)), (labels < 0) | (labels >= key.shape[0])
        if self.symmetric:  # not looked at by the two one-way losses below
            bad = bad | (labels.sort().values.diff() == 0).any()
        # one dtype whatever the processes were given, and one that every back-end exchanges
        if key_ids is not None:
            key_ids = key_ids.long()
            query_ids = key_ids[labels] if query_ids is None else query_ids.long()
        if log_q is not None:
            log_q = log_q.to(compute_dtype(query.dtype))
        sizes = batch_sizes(query, key, query_ids, key_ids, log_q)  # (processes, 2): queries, keys
        (queries_before, keys_before), total = sizes[:dist.get_rank()].sum(0).tolist(), int(sizes[:, 0].sum())
        all_keys = gather_rows(key, sizes[:, 1])
        all_key_ids = None if key_ids is None else gather_rows(key_ids, sizes[:, 1])
        all_log_q = None if log_q is None else gather_rows(log_q, sizes[:, 1])
        # a wrong label must not become the key of another process: -1 gives NaN
        all_labels = (labels + keys_before).masked_fill(bad, -1)
        loss = info_nce(query, all_keys, all_labels, query_ids=query_ids, key_ids=all_key_ids, log_q=all_log_q,
                        reduction="sum", **options)
        if self.symmetric:  # from each own positive to the queries of all processes
            all_queries = gather_rows(query, sizes[:, 0])
            all_query_ids = None if key_ids is None else gather_rows(query_ids, sizes[:, 0])
            own = torch.arange(query.shape[0], device=query.device) + queries_before
            back = info_nce(key[labels], all_queries, own, query_ids=None if key_ids is None else key_ids[labels],
                            key_ids=all_query_ids, reduction="sum", **options)
            loss = (loss + back) / 2
        return loss * (len(sizes) / max(total, 1))

    def extra_repr(self) -> str:
        return (f"scale={self.scale.item():.4g}, learnable={self.learnable}, max_scale={self.max_scale:g}, "
                f"symmetric={self.symmetric}, normalize={self.normalize}, gather={self.gather}, "
                f"backend={self.backend!r}")


def in_one_dtype(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their floating dtypes: under autocast one of two towers may end in half precision.

    What is no floating tensor stays as it is, for the checks to name.
    """
    if not (isinstance(query, Tensor) and isinstance(key, Tensor)) or query.dtype == key.dtype \
            or query.dtype not in FLOATS or key.dtype not in FLOATS:
        return query, key
    wider = torch.promote_types(query.dtype, key.dtype)
    return query.to(wider), key.to(wider)


def batch_sizes(query: Tensor, key: Tensor, query_ids: Tensor | None, key_ids: Tensor | None,
                log_q: Tensor | None) -> Tensor:
    """(processes, 2) queries and keys of every process, on the CPU.

    Raises ValueError on every process if the inputs are not of the same kinds on all of them; else a later collective
    would wait forever, or mix up two of them.
    """
    inputs = {"query": query, "key": key, "query_ids": query_ids, "key_ids": key_ids, "log_q": log_q}
    given = [*(x is not None for x in inputs.values()), key_ids is not None and key_ids.ndim > 1]
    trained = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs.values()]
    # on the CPU, where the group can do that, the host does not have to wait for the GPU
    device = torch.device("cpu") if "cpu:" in dist.get_backend_config() else query.device
    own = torch.tensor([[len(query), len(key), key.shape[1], FLOATS.index(key.dtype), *given, *trained]],
                       device=device)
    table = own.new_empty(dist.get_world_size(), own.shape[1])
    all_gather(table, own)
    table = table.cpu()
    if (table[:, 2:] != table[0, 2:]).any():
        kinds: dict[str, list[int]] = {}
        for rank, (width, dtype, *flags) in enumerate(table[:, 2:].tolist()):
            there = [name for name, flag in zip([*inputs, "ids of two kinds"], flags[:6], strict=True) if flag]
            with_grad = [name for name, flag in zip(inputs, flags[6:], strict=True) if flag]
            kind = (f"{', '.join(there)} of width {width} and {FLOATS[dtype]}, with a gradient needed for "
                    f"{', '.join(with_grad) or 'none'}")
            kinds.setdefault(kind, []).append(rank)
        raise ValueError("the inputs differ between the processes; all must be given the same ones, with the same "
                         "width, dtype and requires_grad: "
                         + "; ".join(f"{kind} on {ranks}" for kind, ranks in kinds.items()))
    return table[:, :2]


def gather_rows(x: Tensor, sizes: Tensor) -> Tensor:
    """(n_r, ...) on process r -> (sum n_r, ...) on every process, in the order of the processes, differentiable.

    Args:
        x: rows of this process.
        sizes: (processes,) number of rows of each of them.
    """
    return _GatherRows.apply(x, sizes.tolist())


class _GatherRows(torch.autograd.Function):
    """Blocks of one size travel, padded where needed: not every back-end exchanges blocks of different sizes."""

    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes, largest = sizes, max(sizes)
        block = x.contiguous()
        if len(x) < largest:
            block = x.new_zeros(largest, *x.shape[1:])
            block[:len(x)] = x
        gathered = x.new_empty(len(sizes) * largest, *x.shape[1:])
        if largest:
            all_gather(gathered, block)
        if min(sizes) == largest:
            return gathered
        return torch.cat([b[:n] for b, n in zip(gathered.split(largest), sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        # every process's loss depends on these rows: their gradient is the sum over the processes, taken in float32
        sizes, largest = ctx.sizes, max(ctx.sizes)
        blocks = grad.to(compute_dtype(grad.dtype)).contiguous()
        if min(sizes) < largest:
            rows, blocks = blocks.split(sizes), blocks.new_zeros(len(sizes), largest, *grad.shape[1:])
            for block, own in zip(blocks, rows, strict=True):
                block[:len(own)] = own
        summed = blocks.new_empty(largest, *grad.shape[1:])
        if largest:
            reduce_scatter(summed, blocks.view(-1, *grad.shape[1:]))
        return summed[:sizes[dist.get_rank()]].to(grad.dtype), None


def all_gather(out: Tensor, own: Tensor) -> None:
    """``torch.distributed.all_gather_single``, which torch before 2.13 calls differently."""
    (dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor)(out, own)


def reduce_scatter(out: Tensor, blocks: Tensor) -> None:
    """``torch.distributed.reduce_scatter_single``, which torch before 2.13 calls differently."""
    (dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor)(out, blocks)
