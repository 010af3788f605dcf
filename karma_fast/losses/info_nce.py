"""InfoNCE as a module: learnable scale, negatives from all processes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from karma_kernels import info_nce
from karma_kernels.info_nce import check_inputs


class InfoNCELoss(nn.Module):
    r"""Softmax cross-entropy of each query against the keys of the whole batch (in-batch negatives).

    .. math:: \ell_i = -\log \frac{\exp(s \, q_i \cdot k_{y_i} - \log Q_{y_i})}
              {\sum_{j \notin M_i} \exp(s \, q_i \cdot k_j - \log Q_j)}

    M_i are the keys that carry the id of row i's positive without being it. The scale s is ``exp(log_scale)``.

    Args:
        scale: first value of s.
        learnable: whether ``log_scale`` is trained; else it is a buffer.
        max_scale: limit for s. ``clamp_()`` applies it and belongs after each step of the optimiser: a clamp in the
            forward would leave a scale at the limit without a gradient.
        symmetric: add the direction key -> queries and halve (see :func:`karma_kernels.info_nce`).
        normalize: L2-normalise queries and keys, so that s multiplies a cosine.
        gather: use the keys (and ids, and log_q) of all processes of the default process group as negatives. Batches
            may differ in size. Without a process group this changes nothing.
        backend: implementation, see :func:`karma_kernels.info_nce`.

    With ``gather=True`` each process computes the losses of its own queries only. It returns their sum times
    ``processes / queries of all processes``. The average over the processes of the returned losses, and of their
    gradients, which is what DistributedDataParallel makes, is then exactly the mean over all queries, and its
    gradient, as one process with the whole batch would compute it, also where batches differ in size. (With equal
    sizes the returned loss is simply the mean over the own queries.) ``log_scale`` counts as a parameter like the
    others: wrap the loss together with the model, or average its gradient over the processes yourself.

    References:
        van den Oord et al. 2018, https://arxiv.org/abs/1807.03748; learnable scale and symmetric form: Radford et al.
        2021, https://arxiv.org/abs/2103.00020; logQ correction: Yi et al. 2019,
        https://doi.org/10.1145/3298689.3346996

    Requirements:

    +------------+-----------------------------------------------------------------------------------------+
    | input      | needed                                                                                  |
    +============+=========================================================================================+
    | query      | (B, D) floating                                                                         |
    | key        | (N, D), same dtype: positives, and any number of further negatives                      |
    | labels     | (B,) integers into this process's ``key``; None: key i belongs to query i               |
    | query_ids  | (B,) integers, id of the item asked for; None: ``key_ids[labels]``                      |
    | key_ids    | (N,) integers, id of the item behind a key; None: nothing is masked                     |
    | log_q      | (N,) floating, log of the sampling probability of a key; None: no correction            |
    +------------+-----------------------------------------------------------------------------------------+

    Inputs:
        see the table; the module is called with them in that order. With ``gather=True`` all processes must call it
        together and give the same kinds of inputs.

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
        super().__init__()
        if not 0 < scale <= max_scale < math.inf:
            raise ValueError(f"scale: got {scale} with max_scale {max_scale}; 0 < scale <= max_scale is needed")
        self.learnable, self.max_scale = learnable, max_scale
        self.symmetric, self.normalize, self.gather, self.backend = symmetric, normalize, gather, backend
        log_scale = torch.tensor(math.log(scale))
        if learnable:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """s, one element, differentiable."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Brings s back to ``max_scale`` if a step took it above."""
        self.log_scale.clamp_(max=math.log(self.max_scale))

    def forward(self, query: Tensor, key: Tensor, labels: Tensor | None = None, query_ids: Tensor | None = None,
                key_ids: Tensor | None = None, log_q: Tensor | None = None) -> Tensor:
        options = {"scale": self.scale, "normalize": self.normalize, "backend": self.backend}
        if not (self.gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return info_nce(query, key, labels, query_ids=query_ids, key_ids=key_ids, log_q=log_q,
                            symmetric=self.symmetric, **options)

        check_inputs(query, key, labels, query_ids, key_ids, log_q, self.symmetric)
        if labels is None:
            labels = torch.arange(query.shape[0], device=query.device)
        labels, bad = labels.long().clamp(0, max(key.shape[0] - 1, 0)), (labels < 0) | (labels >= key.shape[0])
        if self.symmetric:  # not looked at by the two one-way losses below
            bad = bad | (labels.sort().values.diff() == 0).any()
        if key_ids is not None and query_ids is None:
            query_ids = key_ids[labels]
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


def batch_sizes(query: Tensor, key: Tensor, *optional: Tensor | None) -> Tensor:
    """(processes, 2) queries and keys of every process, on the CPU.

    Raises ValueError on every process if they were not given the same kinds of inputs; else a later collective
    would wait forever.
    """
    kinds = sum(1 << i for i, x in enumerate(optional) if x is not None)
    own = torch.tensor([query.shape[0], key.shape[0], key.shape[1], kinds], device=query.device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    table = torch.stack(found).cpu()
    if (table[:, 2:] != table[0, 2:]).any():
        raise ValueError(f"width of the keys {table[:, 2].tolist()}, set of optional inputs {table[:, 3].tolist()}: "
                         "these differ between the processes; give all of them the same")
    return table[:, :2]


def gather_rows(x: Tensor, sizes: Tensor) -> Tensor:
    """(n_r, ...) on process r -> (sum n_r, ...) on every process, in the order of the processes, differentiable.

    Args:
        x: rows of this process.
        sizes: (processes,) number of rows of each of them.
    """
    return _GatherRows.apply(x, sizes.tolist())


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # one size for all, as not every back-end exchanges blocks of different sizes
        block = x.new_zeros(max(sizes), *x.shape[1:])
        block[:x.shape[0]] = x
        blocks = [torch.empty_like(block) for _ in sizes]
        dist.all_gather(blocks, block)
        return torch.cat([b[:n] for b, n in zip(blocks, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        # every process's loss depends on these rows: their gradient is the sum over the processes, taken in float32
        wide = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32, copy=True,
                       memory_format=torch.contiguous_format)
        dist.all_reduce(wide)
        start = sum(ctx.sizes[:dist.get_rank()])
        return wide[start:start + ctx.sizes[dist.get_rank()]].to(grad.dtype), None
