"""Vectors that take reserved places of a prompt at the input of every decoder layer.

A layer's attention then sees their keys and values, made by its own weights, as with a prefix; nothing is asked of the
model but a list of decoder layers, so it works for any architecture, and with activation checkpointing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerVectors(nn.Module):
    """ID vectors (S, width) -> (layers, S, tokens + 1, hidden): learned context tokens, then the projected vector.

    Each layer has weights of its own: context c and projection W v + b. They are kept relative to where they start, in
    units of the spread of that layer's states, as states of deep layers are many times longer than those of early ones
    and an optimiser's steps are not. A NaN row, which has no vector, gets a learned one. Source: Yu et al. 2024, arXiv
    2402.04527; the units are ours.

    >>> LayerVectors(width=4, layers=3, tokens=2, hidden=8)(torch.randn(5, 4)).shape
    torch.Size([3, 5, 3, 8])
    """

    def __init__(self, width: int, layers: int, tokens: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(layers, hidden, width) / hidden**0.5)
        self.bias = nn.Parameter(torch.zeros(layers, hidden))
        self.context = nn.Parameter(torch.zeros(layers, tokens, hidden))
        self.missing = nn.Parameter(torch.zeros(width))
        self.register_buffer("start", torch.zeros(layers, tokens + 1, hidden))
        self.register_buffer("spread", torch.ones(layers))

    def forward(self, vectors: Tensor) -> Tensor:
        vectors = torch.where(vectors.isnan(), self.missing, vectors)
        projected = torch.einsum("lhd,sd->lsh", self.weight, vectors) + self.bias[:, None]
        context = self.context[:, None].expand(-1, len(vectors), -1, -1)
        learned = torch.cat([context, projected[:, :, None]], dim=2)
        return self.start[:, None] + self.spread[:, None, None, None] * learned

    def means(self, vectors: Tensor) -> Iterator[Tensor]:
        """Layer after layer, (S, hidden): the mean over the tokens of what ``forward`` gives."""
        vectors = torch.where(vectors.isnan(), self.missing, vectors)
        tokens = self.context.shape[1] + 1
        for weight, bias, context, start, spread in zip(self.weight, self.bias, self.context, self.start, self.spread,
                                                        strict=True):
            yield start.mean(dim=0) + spread * (F.linear(vectors, weight, bias) + context.sum(dim=0)) / tokens

    @torch.no_grad()
    def start_at(self, states: Tensor, spread: Tensor) -> None:
        """Begins in the range of real states: (layers, tokens + 1, hidden) and (layers,) their distance from the last.

        ``states``: of text at the layers' inputs, for the context and, last, for the mean of all projected vectors.
        """
        self.start.copy_(states)
        self.spread.copy_(spread)


class Given:
    """What the layers of one pass are to write and to collect."""

    def __init__(self) -> None:
        self.values: Tensor | None = None  # (layers, n, hidden) for n places
        self.places: Tensor | None = None  # (n,) of a layer's input, its sequences one after the other
        self.means: list[Tensor] | None = None
        self.owner: Tensor | None = None  # (tokens of the input,) the sequence of each
        self.sizes: Tensor | None = None  # (sequences + 1,) how many tokens each has, at least 1; last, the padding

    @contextlib.contextmanager
    def writing(self, values: Tensor, places: Tensor) -> Iterator[None]:
        self.values, self.places = values, places
        try:
            yield
        finally:
            self.values = self.places = None

    @contextlib.contextmanager
    def collecting(self, owner: Tensor, count: int) -> Iterator[list[Tensor]]:
        """Gives a list that fills with the (count, hidden) mean states of sequences at each layer's input.

        owner: (tokens of the input,) the sequence of each, ``count`` for padding.
        """
        # once for all layers, and not by bincount, for which the host waits on a GPU
        sizes = owner.new_zeros(count + 1).index_add_(0, owner, torch.ones_like(owner)).clamp_min(1)
        self.means, self.owner, self.sizes = [], owner, sizes
        try:
            yield self.means
        finally:
            self.means = self.owner = self.sizes = None

    def at(self, layer: int, hidden: Tensor) -> Tensor:
        if self.means is not None:
            self.means.append(means_of(hidden.flatten(0, -2), self.owner, self.sizes))
        if self.values is None or layer >= len(self.values):
            return hidden
        written = hidden.flatten(0, -2).index_copy(0, self.places, self.values[layer].to(hidden.dtype))
        return written.view_as(hidden)


def means_of(states: Tensor, owner: Tensor, sizes: Tensor) -> Tensor:
    """(n, hidden), (n,) owners 0..count, (count + 1,) sizes -> (count, hidden) float32 means; the last is left out.

    >>> means_of(torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([0, 0, 1]), torch.tensor([2, 1]))
    tensor([[2.]])
    """
    sums = states.new_zeros(len(sizes), states.shape[1], dtype=torch.float32).index_add_(0, owner, states.float())
    return (sums / sizes[:, None])[:-1]


class Injected(nn.Module):
    """A decoder layer that first writes what is given. Everything else is asked of the layer itself."""

    def __init__(self, layer: nn.Module, number: int, given: Given) -> None:
        super().__init__()
        self.layer, self.number, self.given = layer, number, given

    # outside of the layer's own call, which activation checkpointing repeats in the backward
    def forward(self, hidden_states: Tensor, *args, **kwargs):
        return self.layer(self.given.at(self.number, hidden_states), *args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def inject_into(layers: nn.ModuleList) -> Given:
    """Wraps each layer; what is returned says what they write."""
    given = Given()
    for number, layer in enumerate(layers):
        layers[number] = Injected(layer, number, given)
    return given
