"""Paths from the latest items and from a query's words to u that do not pass through the language model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import LATEST, Words
from .initialise import DECAY


class HistoryShortcut(nn.Module):
    """g times the mean of norm(W_s z) over a user's latest items, weighted by age; g, W_s and the weights are learned.

    W_s begins as W_e, so that a user begins near the items chosen last, and leaves it in training: what comes after an
    item need not be what is like it. Ours; the sources have no such path.

    >>> shortcut = HistoryShortcut(width=3, dim=2)
    >>> shortcut(torch.randn(4, 3), torch.tensor([[3, 2] + [-1] * 8, [-1] * 10])).shape  # the second user has no items
    torch.Size([2, 2])
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, dim, bias=False)  # W_s
        self.gain = nn.Parameter(torch.ones(()))
        self.age_logits = nn.Parameter(torch.arange(LATEST) * math.log(DECAY))

    def forward(self, features: Tensor, latest: Tensor) -> Tensor:
        """(n, width) items, (P, LATEST) rows of them by age, -1 for none -> (P, dim) float32, 0 without items."""
        if not len(features):
            return self.projection.weight.new_zeros(len(latest), self.projection.out_features)
        weights = (self.age_logits.exp() * (latest >= 0)).float()
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-9)
        rows = F.embedding(latest.clamp_min(0), F.normalize(self.projection(features), dim=-1))
        return self.gain * torch.einsum("pa,pad->pd", weights, rows)


class QueryShortcut(nn.Module):
    """g times norm(W_q w), w the sum of the vectors of a query's words; g and W_q are learned.

    W_q begins as what W_e does with items' word vectors, so that a search begins near the items whose texts have its
    words. Ours; the sources have no such path.

    >>> shortcut, words = QueryShortcut(width=3, dim=2), Words(torch.tensor([4, 0]), torch.tensor([0, 2]))
    >>> shortcut(torch.randn(5, 3), words).shape  # the second query has no word that items have
    torch.Size([2, 2])
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, dim, bias=False)  # W_q
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, vectors: Tensor, words: Words) -> Tensor:
        """(W, width) vectors of words, the words of P queries -> (P, dim) float32, 0 for queries without words."""
        w = F.embedding_bag(words.index, vectors, words.starts, mode="sum")
        return self.gain * F.normalize(self.projection(w), dim=-1)
