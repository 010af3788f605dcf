"""Does an interest embedding say what comes next? Text losses of the right embeddings beside those of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from ..model.karma import KarmaModel

CHUNK = 64  # texts at a time


@torch.no_grad()
def text_losses(model: KarmaModel, u: Tensor, targets: np.ndarray) -> Tensor:
    """(n,) float32 on the CPU: mean token loss of each target's text given its row of u, (n, d_e), alone.
    """
    device, training = model.device, model.training
    model.eval()
    losses = []
    for at in range(0, len(targets), CHUNK):
        part = targets[at:at + CHUNK]
        chunk = model.prompts.decode_chunk(np.arange(len(part)), part).to(device)
        losses.append(model.reconstruction_losses(u[at:at + CHUNK].to(device), chunk))
    model.train(training)
    return torch.cat(losses).cpu()


def decoding_check(model: KarmaModel, u: Tensor, targets: np.ndarray) -> dict[str, float] | None:
    """Compares held-out users' embeddings with each other's: whose next item does an embedding describe?

    Args:
        u: (n, d_e) interest embeddings of held-out requests of n >= 2 different users.
        targets: (n,) catalogue indices of their true next items. Those without a text are left out.

    Returns:
        matched_loss: mean over requests of the target's text loss (nats per token) given its own user's embedding.
        shuffled_loss: given another user's, the rows of u moved on by one. mean_loss: given one vector for all, the
        mean of u at the mean of their lengths, which tells what texts are like here but not whose. share_better:
        share of the requests whose matched loss is lower than the shuffled one; 0.5 is chance. users: number of
        requests compared. None if the model has no L_rec, or fewer than two targets have a text.
    """
    if model.decode_projection is None:
        return None
    targets = np.asarray(targets, dtype=np.int64)
    keep = model.prompts.texts.lengths[targets] > 0
    if keep.sum() < 2:
        return None
    u, targets = u[torch.from_numpy(keep)], targets[keep]
    middle = F.normalize(u.mean(dim=0), dim=0) * u.norm(dim=-1).mean()
    matched, shuffled, mean = (text_losses(model, x, targets)
                               for x in (u, u.roll(1, dims=0), middle.expand_as(u)))
    return {"matched_loss": float(matched.mean()), "shuffled_loss": float(shuffled.mean()),
            "mean_loss": float(mean.mean()), "users": len(targets),
            "share_better": float((matched < shuffled).float().mean())}
