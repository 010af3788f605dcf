"""Both sides of a case, from the same data and the same weights, each with its trainer."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from karma_fast import KarmaTrainer, KarmaTrainingArguments
from karma_fast.config import KarmaConfig, RunConfig
from karma_fast.data import load_dataset, training_windows
from karma_fast.data.batches import KarmaCollator, log_sampling_probability
from karma_fast.data.schema import Dataset
from karma_fast.model.backbone import compute_dtype, load_backbone, resolve_backbone
from karma_fast.model.features import ItemFeatures
from karma_fast.model.karma import KarmaModel

from .. import ROOT
from .cases import DEMO, SHAPES, Case, Side, usual
from .synthetic import make_data, write_model
from .training import Loss, loss_of
from .usual import Collator, UsualModel, load_language_model, make_trainer

Window = tuple[int, int]
CHECKED = 8  # windows on which the sides are compared
# nothing but steps: no log, no checkpoint, no progress bar, one learning rate
SETTINGS = {"logging_steps": 10**9, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "lr_scheduler_type": "constant", "warmup_steps": 0, "seed": 0}


@dataclasses.dataclass
class Inputs:
    """What the sides of a case share. make: our model with untrained adapters, the same one each time."""

    case: Case
    data: Dataset
    config: KarmaConfig
    windows: list[Window]
    make: Callable[[KarmaConfig], KarmaModel]

    @functools.cached_property
    def start(self) -> Start:
        """From our model, which is then let go: on a GPU there would be no room for both."""
        model = self.make(self.config)
        return Start(trained_state(model), copy.deepcopy(model.features).cpu(), self.collator(model), model.device)

    @functools.cached_property
    def expected(self) -> Loss:
        """What the usual side makes of the windows that are checked."""
        model, collate = make_side(self, usual())
        return loss_of(model, collate(self.checked))

    @property
    def checked(self) -> list[Window]:
        """A few windows, first those whose texts are read."""
        return sorted(self.windows, key=lambda window: self.start.collate._random(*window).random())[:CHECKED]

    def collator(self, model: KarmaModel) -> KarmaCollator:
        log_q = log_sampling_probability(self.data.sequences, self.data.split, len(self.data.items))
        return model.collator(self.data.sequences, log_q, seed=SETTINGS["seed"])


class Start(NamedTuple):
    """What the usual model takes over from ours."""

    state: dict[str, Tensor]
    features: ItemFeatures
    collate: KarmaCollator
    device: torch.device


def make_inputs(case: Case, device: str, folder: Path) -> Inputs:
    """Reads or draws the data; a random language model is written into ``folder`` unless it is there."""
    if case.shape == DEMO:
        data, config = load_dataset(RunConfig.load(ROOT / "karma_fast" / "demo.yaml").data), case.config

        def make(config: KarmaConfig) -> KarmaModel:
            return KarmaModel.build(config, data.items, data.sequences, data.split, device=device)
    else:
        shape, backbone = SHAPES[case.shape], folder / case.shape
        if not (backbone / "config.json").exists():
            write_model(shape, backbone, device, compute_dtype(torch.device(device)))
        data, vectors = make_data(shape, case.windows)
        config = dataclasses.replace(case.config, backbone=str(backbone))

        def make(config: KarmaConfig) -> KarmaModel:
            torch.manual_seed(0)
            model, tokenizer = load_backbone(config, device)
            return KarmaModel(config, model, tokenizer, data.items, ItemFeatures({"text": vectors}))
    return Inputs(case, data, config, choose_windows(data, config, case.windows), make)


def choose_windows(data: Dataset, config: KarmaConfig, count: int) -> list[Window]:
    """So many of the training windows with a full history, or of all if there are too few."""
    starts, ends = training_windows(data.sequences, data.split, config.max_history, config.positions)
    full = np.flatnonzero(ends - starts == config.max_history + 1)
    full = full if len(full) >= count else np.arange(len(ends))
    chosen = np.sort(np.random.default_rng(0).choice(full, count, replace=False))
    return list(zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True))


def pairs_of(config: KarmaConfig, windows: Sequence[Window]) -> int:
    return sum(end - start - 1 for start, end in windows) if config.positions == "all" else len(windows)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of all weights but the frozen ones of the language model."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name.removeprefix("loss.contrastive."): value.detach().cpu().clone()
            for name, value in model.state_dict().items() if name in trained or not name.startswith("backbone.")}


def load_trained(model: UsualModel, state: dict[str, Tensor]) -> None:
    """Puts a `KarmaModel`'s trained weights into the usual model; ValueError unless they are the same ones."""
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    missing, unknown = sorted(own - set(state)), sorted(set(state) - set(model.state_dict()))
    if missing or unknown:
        raise ValueError(f"the two models do not have the same trained weights: missing {missing[:5]}, unknown "
                         f"{unknown[:5]}")
    model.load_state_dict(state, strict=False)


def make_side(inputs: Inputs, side: Side) -> tuple[nn.Module, Callable]:
    """The model, ready to train, and its collator."""
    config = dataclasses.replace(inputs.config, gradient_checkpointing=side.checkpointing)
    if not side.usual:
        model = inputs.make(config)
        return model.train(), inputs.collator(model)
    start = inputs.start
    dtype = compute_dtype(start.device)
    backbone = load_language_model(config, start.device, dtype, resolve_backbone(config.backbone),
                                   side.attention)
    model = UsualModel(config, backbone, copy.deepcopy(start.features), dtype)
    load_trained(model, start.state)
    return model.train(), Collator(start.collate)


def trainer_of(inputs: Inputs, side: Side, model: nn.Module, collate: Callable, windows: list[Window],
               folder: str) -> Trainer:
    """A trainer whose every step takes all the windows."""
    settings = SETTINGS | {"per_device_train_batch_size": len(windows),
                           "use_cpu": next(model.parameters()).device.type == "cpu"}
    if side.usual:
        trainer = make_trainer(model, windows, collate, folder, **settings)
        trainer.remove_callback(PrinterCallback)
        return trainer
    if side.chunk is not None:
        settings["chunk_size"] = side.chunk
    trainer = KarmaTrainer(model, KarmaTrainingArguments(folder, **settings), inputs.data)
    trainer.train_dataset = windows
    return trainer
