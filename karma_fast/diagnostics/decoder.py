"""A fresh soft-prompt decoder: how much of the target's text does the untuned language model read off an embedding?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..config import KarmaConfig
from ..data.batches import Prompts
from ..losses import frozen_decoder_loss, text_loss, text_losses
from ..model.backbone import causal_lm
from ..model.initialise import part_means, ridge
from ..model.reading import decoder_states, logits
from ..model.soft_prompt import SoftPromptProjection
from .entries import entry, mean_entry

if TYPE_CHECKING:
    from ..model.karma import KarmaModel
    from .plain import PlainModel

SOFT_TOKENS, MID_FEATURES = 4, 256
BATCH, LEARNING_RATE, WARMUP = 32, 3e-3, 5
START_ROWS = 1024  # rows that the starting point is fitted to
NAMES = ("decoder_matched", "decoder_shuffled", "decoder_mean", "decoder_own_better")


@dataclass
class FrozenDecoder:
    """A frozen language model and the texts of items, cut to tokens."""

    backbone: nn.Module
    prompts: Prompts

    @classmethod
    def of(cls, model: KarmaModel | PlainModel) -> FrozenDecoder:
        limit = getattr(model.config, "max_text_tokens", KarmaConfig.max_text_tokens)
        config = KarmaConfig(instruction="", num_soft_tokens=SOFT_TOKENS, max_text_tokens=limit)
        return cls(model.backbone, Prompts(config, model.tokenizer, model.items.texts))

    def halves(self, targets: np.ndarray, train: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Rows to train on and to test on, both with texts, and why nothing can be measured, "" if it can."""
        has_text = self.prompts.texts.lengths[targets] > 0
        train, test = np.flatnonzero(train & has_text), np.flatnonzero(~train & has_text)
        few = min(len(train), len(test)) < 2
        return train, test, "left out: 0 steps" if steps < 1 else "too few targets with a text" if few else ""

    @property
    def table(self) -> Tensor:
        return causal_lm(self.backbone).get_input_embeddings().weight.detach()

    def _inputs(self, projection: SoftPromptProjection, x: Tensor, items: np.ndarray):
        chunk = self.prompts.decode_chunk(np.arange(len(items)), items).to(x.device)
        tokens = chunk.tokens
        return projection.insert(tokens.token_ids[None], tokens.slots[None], x, self.table)[0], tokens, chunk.texts

    def _head(self, states: Tensor) -> Tensor:
        return logits(self.backbone, states)

    @property
    def _vocabulary(self) -> int:
        return causal_lm(self.backbone).get_output_embeddings().weight.shape[0]

    def loss(self, projection: SoftPromptProjection, x: Tensor, items: np.ndarray) -> Tensor:
        """() mean over texts of their mean token loss, with gradients for the projection alone."""
        embeds, tokens, texts = self._inputs(projection, x, items)

        def loss_of(embeds: Tensor) -> Tensor:
            states = decoder_states(self.backbone, embeds, tokens)[texts.index]
            return text_loss(self._head, states, texts.labels, texts.weights, self._vocabulary)

        return frozen_decoder_loss(embeds, loss_of) / len(items)

    @torch.no_grad()
    def losses(self, projection: SoftPromptProjection, x: Tensor, items: np.ndarray) -> np.ndarray:
        """(n,) float64: mean token loss of each item's text given its row of x."""
        out = []
        for at in range(0, len(items), 64):
            part = items[at:at + 64]
            embeds, tokens, texts = self._inputs(projection, x[at:at + 64], part)
            states = decoder_states(self.backbone, embeds, tokens)[texts.index]
            out.append(text_losses(self._head, states, texts.labels, texts.weights, texts.rows, len(part),
                                   self._vocabulary))
        return torch.cat(out).double().cpu().numpy() if out else np.zeros(0)


def trained_projection(decoder: FrozenDecoder, x: Tensor, items: np.ndarray, steps: int, seed: int,
                       progress: bool = False) -> SoftPromptProjection:
    """A new projection trained on (n, d) embeddings and the (n,) items whose texts they are to be decoded to."""
    table, random = decoder.table, np.random.default_rng(seed)
    norm = float(table[:: max(1, len(table) // 8192)].float().norm(dim=-1).mean())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projection = SoftPromptProjection(x.shape[1], table.shape[1], SOFT_TOKENS, token_norm=norm,
                                          mid_features=min(x.shape[1], MID_FEATURES))
    projection.to(x.device)
    with torch.no_grad():  # soft tokens that lie among tokens which the model knows
        start = random.choice(len(items), min(START_ROWS, len(items)), replace=False)
        inner = F.gelu(projection.up(projection.norm(x[torch.from_numpy(start).to(x.device)])))
        goals = torch.stack([part_means(decoder.prompts.texts[i], SOFT_TOKENS, table) for i in items[start]])
        projection.down.weight.copy_(ridge(inner, goals.flatten(1)))
    optimiser, order = torch.optim.AdamW(projection.parameters()), np.zeros(0, np.int64)
    for step in tqdm(range(steps), desc="training a fresh decoder", unit="step", disable=not progress):
        while len(order) < min(BATCH, len(items)):
            order = np.concatenate([order, random.permutation(len(items))])
        rows, order = order[:BATCH], order[BATCH:]
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP, (steps - step) / (steps / 2))
        optimiser.zero_grad()
        decoder.loss(projection, x[torch.from_numpy(rows).to(x.device)], items[rows]).backward()
        nn.utils.clip_grad_norm_(projection.parameters(), 1.0)
        optimiser.step()
    return projection


def decoder_entries(model: KarmaModel | PlainModel, u: Tensor, targets: np.ndarray, train: np.ndarray, steps: int,
                    seed: int = 0, progress: bool = False) -> dict[str, dict[str, Any]]:
    """Trains a decoder on one half of the requests and compares text losses on the other.

    Args:
        model: its language model, as it is when this is called, is the frozen decoder; see `Untuned`.
        u: (n, d) frozen embeddings. targets: (n,) catalogue indices. train: (n,) bool. steps: of training; 0: skipped.

    Returns:
        The entries decoder_matched, decoder_shuffled, decoder_mean and decoder_own_better.
    """
    decoder = FrozenDecoder.of(model)
    train, test, why = decoder.halves(targets, train, steps)
    if why:
        return {name: entry(name, math.nan, len(test), why) for name in NAMES}
    # only directions are compared and indexed, so only they may say something
    x = F.normalize(u.float(), dim=-1).to(model.device)
    circle = np.random.default_rng(seed).permutation(len(test))
    others = np.empty_like(circle)
    others[circle] = np.roll(circle, 1)  # nobody keeps their own
    with evaluating(model.backbone):
        projection = trained_projection(decoder, x[torch.from_numpy(train)], targets[train], steps, seed, progress)
        matched, shuffled = (decoder.losses(projection, x[torch.from_numpy(rows)], targets[test])
                             for rows in (test, test[others]))
        middle = F.normalize(x[torch.from_numpy(train)].mean(dim=0, keepdim=True), dim=-1)
        mean = decoder.losses(projection, middle.expand(len(test), -1), targets[test])
    shared = {"steps": steps, "trained_on": len(train)}
    better = np.where(matched == shuffled, 0.5, matched < shuffled)
    return {name: mean_entry(name, values, **shared)
            for name, values in zip(NAMES, (matched, shuffled, mean, better), strict=True)}


@contextlib.contextmanager
def evaluating(backbone: nn.Module) -> Iterator[None]:
    training = backbone.training
    backbone.eval()
    yield
    backbone.train(training)
