"""The KARMA loss: retrieval, kept decodable into text (and a picture)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from .info_nce import InfoNCELoss
from .weighted import Terms, WeightedLoss


@dataclass
class LossParts(Terms):
    """The terms before weighting."""

    act: Tensor | None = None
    gen: Tensor | None = None
    rec: Tensor | None = None
    vis: Tensor | None = None


class KarmaLoss(WeightedLoss):
    r"""L = a L_act + lambda (g L_gen + alpha L_rec + beta L_vis).

    L_act is InfoNCE of the interest embeddings against the batch's item embeddings. L_gen and L_rec are text losses
    that the caller computes with its language model (``karma_fast.losses.text_loss``): of the target's text
    given the history, and given nothing but the interest embedding. L_vis is the squared distance between a frozen
    image vector and its prediction from the interest embedding.

    Args:
        act, gen, rec, vis: weights a, g, alpha, beta. decode: lambda. A weight of 0 switches the term off.
        contrastive: the loss behind L_act.

    Reference:
        Sun et al. 2026, KARMA, arXiv 2603.22779. The weights and the scale are ours: the paper's are not public.

    Example:
        >>> import torch
        >>> loss = KarmaLoss(rec=0.0)
        >>> u, e = F.normalize(torch.randn(4, 8), dim=-1), F.normalize(torch.randn(6, 8), dim=-1)
        >>> parts = LossParts(act=loss.contrastive(u, e, None, None, torch.tensor([1, 2, 3, 4, 5, 1])))
        >>> loss(parts).shape
        torch.Size([])
    """

    parts = LossParts

    def __init__(self, act: float = 1.0, gen: float = 1.0, rec: float = 1.0, vis: float = 1.0, decode: float = 0.1,
                 contrastive: InfoNCELoss | None = None) -> None:
        super().__init__({"act": act, "gen": decode * gen, "rec": decode * rec, "vis": decode * vis})
        self.contrastive = InfoNCELoss() if contrastive is None else contrastive

    @property
    def scale(self) -> Tensor:
        return self.contrastive.scale

    def clamp_(self) -> None:
        """The scale's limit; belongs after each step of the optimiser."""
        self.contrastive.clamp_()


def image_distance(predicted: Tensor, image: Tensor, present: Tensor, num_images: float) -> Tensor:
    """Sum of the squared distances (S, d) to (S, d) where ``present`` (S,), over ``num_images``. () float32."""
    distance = F.mse_loss(predicted.float(), image.float(), reduction="none").sum(dim=-1)
    return (distance * present).sum() / num_images
