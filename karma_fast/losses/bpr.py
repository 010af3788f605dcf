"""Bayesian personalised ranking against the items of the whole batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from karma_kernels.info_nce import check_inputs
from karma_kernels.numerics import compute_dtype

from ..processes import several
from .info_nce import batch_sizes, gather_rows, in_one_dtype
from .scaled import ScaledLoss

BLOCK_BYTES = 64 << 20  # of scores at a time


class BPRLoss(ScaledLoss):
    r"""Each query's positive above every other item of the batch, pair by pair.

    .. math:: \ell_i = \frac{1}{|N_i|} \sum_{j \in N_i} -\ln \sigma(s (q_i \cdot k_i^+ - q_i \cdot k_j))

    N_i are the other items; one that stands there c times, as with several processes, has c keys of weight 1 / c.

    Args:
        scale: first value of s. learnable: whether it is trained. max_scale: its limit, see ``clamp_``.
        gather: also compare with the items of all processes; as in `karma_fast.InfoNCELoss`.

    Reference:
        Rendle et al. 2009, https://arxiv.org/abs/1205.2618. The mean over the batch's items in place of one drawn item
        is ours.

    Requirements:

    +------------+------------------------------------------------------------------------------+
    | input      | needed                                                                       |
    +============+==============================================================================+
    | query      | (B, D) floating                                                              |
    | key        | (N, D) floating; of two dtypes, as under autocast, the wider one counts      |
    | labels     | (B,) integers into ``key``: the positives                                    |
    | key_ids    | (N,) integers; items with the id of a row's positive are not its negatives   |
    +------------+------------------------------------------------------------------------------+

    Returns:
        the mean over the queries, (): float64 for float64 inputs, else float32; half precision is computed in
        float32, and autocast does not change it. A query without a negative counts 0. Labels out of range raise a
        ValueError on a CPU and give NaN on other devices.

    Example:
        >>> loss = BPRLoss(scale=1.0)
        >>> query, key = torch.eye(2), torch.eye(2)
        >>> round(loss(query, key, torch.tensor([0, 1]), torch.tensor([7, 8])).item(), 4)  # -ln sigma(1)
        0.3133
    """

    def __init__(self, scale: float = 1 / 0.07, learnable: bool = True, max_scale: float = 100.0, *,
                 gather: bool = False) -> None:
        super().__init__(scale, learnable, max_scale)
        self.gather = gather

    def forward(self, query: Tensor, key: Tensor, labels: Tensor, key_ids: Tensor) -> Tensor:
        query, key = in_one_dtype(query, key)
        check_inputs(query, key, labels, None, key_ids)
        if key_ids.ndim != 1:
            raise ValueError(f"key_ids: got shape {tuple(key_ids.shape)}; ({len(key)},) is needed")
        bad = ((labels < 0) | (labels >= len(key))).any()  # a wrong label must not become another process's item
        labels = labels.long().clamp(0, max(len(key) - 1, 0))
        total, processes = len(query), 1
        if self.gather and several():
            sizes = batch_sizes(query, key, None, key_ids, None)
            labels = labels + int(sizes[:dist.get_rank(), 1].sum())
            key, key_ids = gather_rows(key, sizes[:, 1]), gather_rows(key_ids, sizes[:, 1])
            total, processes = int(sizes[:, 0].sum()), len(sizes)
        dtype = compute_dtype(query.dtype)
        query, key = query.to(dtype), key.to(dtype)
        ordered = key_ids.sort().values  # `unique` would make the host wait for a GPU
        copies = torch.searchsorted(ordered, key_ids, right=True) - torch.searchsorted(ordered, key_ids)
        weights = copies.to(dtype).reciprocal()
        rows = max(1, BLOCK_BYTES // (dtype.itemsize * max(1, len(key))))
        parts = [checkpoint(self._sum, q, key, label, key_ids, weights, self.scale, use_reentrant=False)
                 for q, label in zip(query.split(rows), labels.split(rows), strict=True)]
        return torch.stack(parts).sum() * (processes / max(total, 1)) * torch.where(bad, torch.nan, 1.0).to(dtype)

    @staticmethod
    def _sum(query: Tensor, key: Tensor, labels: Tensor, key_ids: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            scores = scale * (query @ key.T)
            negative = (key_ids != key_ids[labels][:, None]) * weights
            losses = F.softplus(scores - scores.gather(1, labels[:, None])) * negative
            return (losses.sum(dim=1) / negative.sum(dim=1).clamp_min(1)).sum()

    def extra_repr(self) -> str:
        return f"scale={self.scale.item():.4g}, max_scale={self.max_scale:g}, gather={self.gather}"
