"""The starting point of training: projections that already rank by similarity to the latest items.

A random item tower needs far more steps than a small machine has. So W_e starts as projections of the frozen features,
and where no shortcut gives u the mean of the latest items' embeddings, W_o as the ridge regression from the untuned
model's states to it. No target is looked at. P_rec starts as the ridge regression from items' embeddings to the mean
token embeddings of K parts of their texts, so that its soft tokens lie among the tokens that the decoder knows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..data.batches import LATEST
from .features import ItemFeatures

# of the inner product of two embeddings at the start; ours
SHARES = {"id": 0.8, "words": 0.5, "text": 0.2, "image": 0.2}
DECAY = 0.7  # weight of an item by age at the start


@torch.no_grad()
def item_projection(features: ItemFeatures, dim: int, sample: int = 20_000) -> Tensor:
    """W_e (dim, width): each kind keeps its inner products, or its leading principal components where it shrinks."""
    kinds = sorted(features.kinds, key=lambda k: features.widths[k])
    weight = torch.zeros(dim, features.width)
    total = sum(SHARES[k] for k in kinds)
    row = 0
    for n, kind in enumerate(kinds):
        width = features.widths[kind]
        room = min(width, (dim - row) // (len(kinds) - n))
        block = features.known(kind, sample).double().cpu()
        if room < width and len(block):
            basis = torch.linalg.eigh(block.T @ block).eigenvectors[:, -room:].T.flip(0)
        else:
            basis = torch.eye(room, width, dtype=torch.float64)
        kept = (block @ basis.T).square().sum(dim=1).mean().sqrt().clamp_min(1e-6) if len(block) else torch.ones(())
        scaled = (SHARES[kind] / total) ** 0.5 / kept * basis
        weight[row:row + room, features.columns(kind)] = scaled.float()
        row += room
    return weight


def latest_mean(embeddings: Tensor) -> Tensor:
    """(T, d) item embeddings, oldest first -> (T, d): at each place the decayed mean of it and the ones before."""
    ages = torch.arange(len(embeddings))[:, None] - torch.arange(len(embeddings))[None]
    weights = torch.where((ages >= 0) & (ages < LATEST), DECAY ** ages.clamp_min(0).double(), 0.0)
    return (weights / weights.sum(dim=1, keepdim=True)).to(embeddings.dtype) @ embeddings


def part_means(token_ids: list[int], parts: int, table: Tensor) -> Tensor:
    """(parts, hidden): mean token embedding of each of ``parts`` stretches of a text; short texts repeat tokens.

    >>> part_means([0, 1, 2], 2, torch.eye(3)).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]
    """
    n = len(token_ids)
    edges = [n * k // parts for k in range(parts + 1)]
    stretches = [token_ids[a:b] or token_ids[min(a, n - 1):min(a, n - 1) + 1] for a, b in pairwise(edges)]
    return torch.stack([table[s].float().mean(dim=0) for s in stretches])


def ridge(states: Tensor, targets: Tensor, weights: Tensor | None = None, strength: float = 1e-2) -> Tensor:
    """(n, h) states, (n, d) targets, (n,) weights of the rows -> (d, h); strength is relative to the states' squares.

    >>> states = torch.randn(50, 3)
    >>> torch.allclose(ridge(states, states @ torch.ones(3, 2), strength=1e-9), torch.ones(2, 3), atol=1e-3)
    True
    """
    x, y = states.double(), targets.double()
    weighted = x if weights is None else x * weights.double()[:, None]
    gram = weighted.T @ x
    gram.diagonal().add_(strength * gram.diagonal().mean())
    return torch.linalg.solve(gram, weighted.T @ y).T.float()
