"""Steps of a trainer: how long each takes, what is held meanwhile, and the work that no step can save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .. import measure
from .usual import UsualModel

PASSES = 2  # over a frozen weight: forward, and the gradient of its input
FIRST = 1  # step of each run that is not counted: it warms up, and ours measures gradient shares in it


class Clock(TrainerCallback):
    """Of each step, forward, backward, clipping and optimiser, but not collation: milliseconds and, on a GPU, the most
    bytes that torch held. With ``profiles``, instead of times that are worth something, the most bytes beyond those
    before the step on a CPU."""

    def __init__(self, device: str, profiles: bool = False) -> None:
        self.device, self.profiles = device, profiles
        self.milliseconds: list[float] = []
        self.peaks: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif self.profiles:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                                  profile_memory=True)
            self.profile.start()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.milliseconds.append(1e3 * (time.perf_counter() - self.start))
        if self.device == "cuda":
            self.peaks.append(torch.cuda.max_memory_allocated())
        elif self.profiles:
            self.profile.stop()
            self.peaks.append(max(measure.held_bytes(self.profile)))


def run_steps(trainer: Trainer, count: int, clock: Clock | None = None) -> float:
    """So many steps; returns their mean loss."""
    trainer.args.max_steps = count
    if clock is not None:
        trainer.add_callback(clock)
    try:
        return trainer.train().training_loss
    finally:
        if clock is not None:
            trainer.remove_callback(clock)


def timed_steps(trainer: Trainer, count: int, device: str) -> Clock:
    """The clock of ``count`` steps after the first."""
    clock = Clock(device)
    run_steps(trainer, FIRST + count, clock)
    clock.milliseconds, clock.peaks = clock.milliseconds[FIRST:], clock.peaks[FIRST:]
    return clock


def step_memory(trainer: Trainer) -> int:
    """On a CPU: the most bytes that a step after the first held beyond weights and optimiser states."""
    clock = Clock("cpu", profiles=True)
    run_steps(trainer, FIRST + 1, clock)
    return clock.peaks[-1]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def held_bytes(trainer: Trainer) -> int:
    """Weights, what 4-bit ones are unpacked with, and optimiser states."""
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    for parameter in trainer.model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors += [t for t in vars(part).values() if isinstance(t, Tensor)] if part is not None else []
    for state in trainer.optimizer.state.values():
        tensors += [t for t in state.values() if isinstance(t, Tensor)]
    return bytes_of(tensors)


def collation_ms(collate: Callable, windows: list, repeats: int = 3) -> float:
    """Milliseconds, the least of some calls: it runs on the host, in a worker process if wanted."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        collate(windows)
        found.append(1e3 * (time.perf_counter() - start))
    return min(found)


def linear_weights(language_model: nn.Module) -> tuple[int, int]:
    """Numbers in the frozen matrices of the layers, and in the head."""
    layers = head = 0
    for name, module in language_model.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            size = module.in_features * module.out_features
            if "lm_head" in name:
                head += size
            else:
                layers += size
    return layers, head


def least_flops(model: nn.Module, batch: dict) -> dict[str, int]:
    """Tokens of a batch of the usual collator without padding, and the operations of the frozen matrices on them.

    The layers see every token of a prompt and, in L_rec, soft tokens and text; the head sees only the positions that
    predict a token of a text. Attention scores, adapters and projections come on top and are small here.
    """
    config = model.config
    gen = sum(len(text) for text in batch["texts"])
    rec = sum(len(text) for text in batch["decode_texts"]) if config.weight("rec") > 0 else 0
    soft = config.num_soft_tokens * len(batch["decode_texts"]) if rec else 0
    prompts = sum(len(head) + len(items) + 1 for head, items in zip(batch["heads"], batch["histories"], strict=True))
    layers, head = linear_weights(model.backbone)
    tokens = prompts + gen + rec + soft
    return {"tokens": tokens, "flops": 2 * PASSES * (layers * tokens + head * (gen + rec))}


class Loss(NamedTuple):
    """The terms of a loss, and its gradient on the CPU for each trained weight that it reaches."""

    terms: dict[str, float]
    gradient: dict[str, Tensor]


def loss_of(model: nn.Module, batch) -> Loss:
    """Of one batch in training mode, forward and backward at once; leaves no gradient behind."""
    device = next(model.parameters()).device
    if isinstance(model, UsualModel):
        terms = model(**to_device(batch, device))
        loss = terms.pop("loss")
    else:
        output = model(batch.to(device))
        loss, terms = output.loss, output.parts.present()
    loss.backward()
    gradient = {name.removeprefix("loss.contrastive."): p.grad.float().cpu()
                for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Loss({name: float(value.detach()) for name, value in terms.items()}, gradient)


def relative(found: dict[str, float], expected: dict[str, float]) -> dict[str, float]:
    """Error of each term; infinite where only one side has it.

    >>> relative({"act": 2.2, "gen": 0.0, "vis": 1.0}, {"act": 2.0, "gen": 0.0})
    {'act': 0.1, 'gen': 0.0, 'vis': inf}
    """
    pairs = {name: (found.get(name, math.inf), expected.get(name, 0.0)) for name in sorted({*found, *expected})}
    return {name: 0.0 if a == b else abs(a - b) / abs(b) if b else math.inf for name, (a, b) in pairs.items()}


def errors_of(found: Loss, expected: Loss) -> dict[str, float]:
    """Relative errors of the terms, and of the gradients of adapters and of all else: norm of the difference."""
    errors = relative(found.terms, expected.terms)
    for group, adapters in (("gradient of adapters", True), ("gradient of projections", False)):
        names = {n for n in {*found.gradient, *expected.gradient} if ("lora_" in n) == adapters}
        if names - found.gradient.keys() or names - expected.gradient.keys():
            errors[group] = float("inf")
            continue
        far = sum(float((found.gradient[n] - expected.gradient[n]).square().sum()) for n in names)
        errors[group] = math.sqrt(far / sum(float(expected.gradient[n].square().sum()) for n in names))
    return errors


def to_device(batch, device: torch.device):
    """What Trainer does with a batch of the usual collator."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, list):
        return [to_device(value, device) for value in batch]
    return batch.to(device) if isinstance(batch, Tensor) else batch
