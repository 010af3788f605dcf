"""The RA-Rec loss: ranking, and injected vectors that stay near the states of the text they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...losses import Terms, WeightedLoss
from ...losses.bpr import BPRLoss
from ...losses.info_nce import InfoNCELoss, all_gather, gather_rows


@dataclass
class RaRecParts(Terms):
    """The terms before weighting."""

    act: Tensor | None = None
    user: Tensor | None = None
    item: Tensor | None = None


class RaRecLoss(WeightedLoss):
    r"""L = L_p + lambda (L_ua + L_ia).

    L_p is BPR of requests and items. L_ua and L_ia are InfoNCE, the mean over the injected layers: within the batch,
    the mean of what a request (an item) has injected into a layer belongs to the mean state of its own text there, in
    a pass without any injection.

    Args:
        act, align: weights of L_p and lambda. align_scale: 1 / tau. ranking: the loss behind L_p; if it compares with
            all processes, so do the others.

    Reference:
        Yu et al. 2024, RA-Rec, arXiv 2402.04527. The weights, the pooling and the scales are ours.
    """

    parts = RaRecParts

    def __init__(self, act: float = 1.0, align: float = 0.1, align_scale: float = 1 / 0.07,
                 ranking: BPRLoss | None = None) -> None:
        super().__init__({"act": act, "user": align, "item": align})
        self.ranking = BPRLoss() if ranking is None else ranking
        self.alignment = InfoNCELoss(align_scale, learnable=False, max_scale=max(100.0, align_scale),
                                     gather=self.ranking.gather)

    @property
    def scale(self) -> Tensor:
        return self.ranking.scale

    def clamp_(self) -> None:
        """The scale's limit; belongs after each step of the optimiser."""
        self.ranking.clamp_()


def first_here(ids: Tensor) -> Tensor:
    """(n,) distinct ids of this process -> (n,) bool: no process before it has the id. All must call it together."""
    sizes = ids.new_empty(dist.get_world_size())
    all_gather(sizes, ids.new_tensor([len(ids)]))
    before = int(sizes[:dist.get_rank()].sum())
    return ~torch.isin(ids, gather_rows(ids, sizes)[:before])
