"""What parts of a `KarmaModel` learn alone before training, each with as little of the language model as it needs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import log_sampling_probability
from ..data.schema import Sequences, Split
from ..data.windows import training_windows, windows_of_pairs
from ..rates import rate_factor

if TYPE_CHECKING:
    from .karma import KarmaModel

PAIRS = 1024  # of a step of `warm_up_shortcut`
WITHOUT_LANGUAGE_MODEL = ("item_projection", "shortcut", "features", "loss", "query_shortcut")  # what it trains


@torch.enable_grad()
def warm_up_shortcut(model: KarmaModel, sequences: Sequences, split: Split, epochs: float, seed: int = 0,
                     progress: bool = False, learning_rate: float = 1e-3) -> list[float]:
    """Trains W_e and the shortcuts by L_act alone; returns the loss of each step.

    The language model reads nothing, so a pass over the training pairs takes seconds. What the latest items and the
    words of a query alone say about the next one is known afterwards, and the language model's steps go into what it
    adds.
    """
    starts, ends = training_windows(sequences, split, model.config.max_history, model.config.positions)
    if not len(starts):
        return []
    log_q = log_sampling_probability(sequences, split, len(model.features))
    reader = copy.copy(model)
    reader.config = dataclasses.replace(model.config, decode_weight=0.0)  # no texts
    collate = reader.collator(sequences, log_q, seed)
    count = windows_of_pairs(PAIRS, model.config.positions, starts, ends)
    steps = max(1, round(epochs * len(starts) / count))
    trained = {f"{part}.{name}": p for part in WITHOUT_LANGUAGE_MODEL if getattr(model, part) is not None
               for name, p in getattr(model, part).named_parameters()}
    optimiser = _optimiser(trained, learning_rate)
    contrastive = model.loss.contrastive
    gather, contrastive.gather = contrastive.gather, False  # every process does the same
    try:
        losses = torch.zeros(steps, device=model.device)  # read at the end, as the host waits for what it reads
        batches = _bar(_batches(np.arange(len(starts)), count, steps, seed), steps, "warming up items", progress)
        for step, windows in enumerate(batches):
            batch = collate(list(zip(starts[windows].tolist(), ends[windows].tolist(), strict=True))).to(model.device)
            u = F.normalize(torch.cat([model.past_language_model(chunk) for chunk in batch.prompts]), dim=-1)
            loss = model.contrastive_loss(u, batch)
            _step(optimiser, loss, trained.values(), step, steps)
            model.loss.clamp_()
            losses[step] = loss.detach()
    finally:
        contrastive.gather = gather
    return losses.tolist()


@torch.enable_grad()
def warm_up_decoder(model: KarmaModel, steps: int, seed: int = 0, progress: bool = False, batch_size: int = 64,
                    learning_rate: float = 3e-3) -> list[float]:
    """Trains P_rec alone to decode items' texts from their own embeddings; returns the loss of each step.

    An item's embedding says what the text is, which a user's does only roughly, so P_rec learns faster from it.
    """
    with_text = np.flatnonzero(model.prompts.texts.lengths)
    steps = steps if len(with_text) else 0
    trained = dict(model.decode_projection.named_parameters())
    optimiser, losses = _optimiser(trained, learning_rate), torch.zeros(steps, device=model.device)
    model.train()
    batches = _bar(_batches(with_text, batch_size, steps, seed), steps, "warming up the decoder", progress)
    for step, items in enumerate(batches):
        texts = model.prompts.decode_chunk(np.arange(len(items)), items).to(model.device)
        loss = model.reconstruction_loss(model.encode_items(items).to(model.device), texts) / len(items)
        _step(optimiser, loss, trained.values(), step, steps)
        losses[step] = loss.detach()
    model.zero_grad()  # with full tuning the decoder has gradients too
    return losses.tolist()


def _batches(rows: np.ndarray, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """``steps`` batches of rows, each row once before any comes again."""
    random, order = np.random.default_rng(seed), rows[:0]
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, random.permutation(rows)])
        yield order[:size]
        order = order[size:]


def _bar(batches: Iterable[np.ndarray], steps: int, what: str, progress: bool) -> Iterable[np.ndarray]:
    from tqdm.auto import tqdm

    return tqdm(batches, total=steps, desc=what, unit="step", disable=not progress)


def _optimiser(trained: dict[str, nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [p], "peak": learning_rate * rate_factor(name),
                               "weight_decay": 0.01 if p.ndim > 1 else 0.0}
                              for name, p in trained.items() if p.requires_grad])


def _step(optimiser: torch.optim.Optimizer, loss: Tensor, trained: Iterable[nn.Parameter], step: int, steps: int
          ) -> None:
    """One update, after which no gradient is left; the rate rises for five steps and falls over the second half."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * min(1, (step + 1) / 5, (steps - step) / (steps / 2))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimiser.step()
    optimiser.zero_grad()
