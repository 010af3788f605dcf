"""The KARMA loss: retrieval, kept decodable into text (and a picture)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .info_nce import InfoNCELoss


@dataclass
class LossParts:
    """The terms before weighting, () float32 each; None where a term is switched off or has no data."""

    act: Tensor | None = None
    gen: Tensor | None = None
    rec: Tensor | None = None
    vis: Tensor | None = None

    def present(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}


class KarmaLoss(nn.Module):
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
        >>> loss = KarmaLoss(rec=0.0)
        >>> u, e = F.normalize(torch.randn(4, 8), dim=-1), F.normalize(torch.randn(6, 8), dim=-1)
        >>> parts = LossParts(act=loss.contrastive(u, e, None, None, torch.tensor([1, 2, 3, 4, 5, 1])))
        >>> loss(parts).shape
        torch.Size([])
    """

    def __init__(self, act: float = 1.0, gen: float = 1.0, rec: float = 1.0, vis: float = 1.0, decode: float = 0.1,
                 contrastive: InfoNCELoss | None = None) -> None:
        super().__init__()
        self.weights = {"act": act, "gen": decode * gen, "rec": decode * rec, "vis": decode * vis}
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"{name}: its weight is {weight}; 0 or more is needed")
        self.contrastive = InfoNCELoss() if contrastive is None else contrastive

    def wants(self, term: str) -> bool:
        return self.weights[term] > 0

    def weighted(self, parts: LossParts) -> dict[str, Tensor]:
        return {name: self.weights[name] * value for name, value in parts.present().items()}

    def forward(self, parts: LossParts) -> Tensor:
        """The total, () float32."""
        terms = list(self.weighted(parts).values())
        if not terms:
            raise ValueError("no term of the loss is present; give at least one with a weight above 0")
        return torch.stack([t.float() for t in terms]).sum()


def image_distance(predicted: Tensor, image: Tensor, present: Tensor, num_images: float) -> Tensor:
    """Sum of the squared distances (S, d) to (S, d) where ``present`` (S,), over ``num_images``. () float32."""
    distance = F.mse_loss(predicted.float(), image.float(), reduction="none").sum(dim=-1)
    return (distance * present).sum() / num_images
