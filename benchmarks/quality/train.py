"""One row and seed: trains it, a part of an hour at a time if need be, and gives what ranks its requests."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from karma_fast.callbacks import Lines
from karma_fast.checkpoints import last_checkpoint
from karma_fast.config import ConfigError, RunConfig
from karma_fast.data import Dataset
from karma_fast.evaluation import Ranks
from karma_fast.model.storage import write_atomically
from karma_fast.run_setup import fit_to_gpu, training_arguments
from karma_fast.trainer import KarmaTrainer, peak_memory_bytes

from . import controls
from .protocol import Requests
from .rows import Row, recipe_of
from .settings import facts_of
from .synthetic import image_vectors

Score = Callable[[Requests, bool, bool], Ranks]  # (requests, seen items left out, queries read)
FREE = ("output_dir", "chunk_size", "disable_tqdm", "dataloader_num_workers")  # no result hangs on these


@dataclass
class Ready:
    """A row that can rank. facts: what it cost and, where something was chosen on validation, what.

    model: of rows that have a language model.
    """

    score: Score
    facts: dict[str, Any] = field(default_factory=dict)
    model: Any = None


class Deadline(TrainerCallback):
    """Saves a checkpoint and stops once the clock has passed ``end`` (of `time.monotonic`)."""

    def __init__(self, end: float) -> None:
        self.end, self.reached = end, False

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.end and state.global_step < state.max_steps:
            self.reached = control.should_save = control.should_training_stop = True
        return control


def model_class(row: Row) -> type[Any]:
    return getattr(controls, row.control) if row.control else recipe_of(row).model_class()


def build(row: Row, config: RunConfig, data: Dataset, seed: int, device: torch.device, cache: Path | None = None,
          progress: bool = False) -> Any:
    """The model of a row at its start, which is the same for all of a recipe but for what a row adds."""
    items = data.items
    if row.control == "ImageTargets":
        items = dataclasses.replace(items, image_vectors=image_vectors(items))
    return model_class(row).build(config.model, items, data.sequences, data.split, seed=seed, device=device,
                                  cache=cache, progress=progress)


def refuse_fixed(row: Row, changes: dict[str, str]) -> None:
    """ConfigError for a change of what makes the row what it is, which would change nothing."""
    fixed = {f"model.{name}" for name in row.model} | {"training.seed", "training.output_dir"}
    if given := sorted(fixed & set(changes)):
        raise ConfigError(f"--set {', '.join(given)}: row {row.name} has its own; leave it out, or take --seeds, "
                          "--runs or another row")


def config_of(row: Row, base: RunConfig, seed: int, folder: Path) -> RunConfig:
    """``base``, which is of the row's recipe, with the row's settings."""
    model = type(base.model).from_dict(base.model.to_dict() | row.model)
    return RunConfig(base.data, model, base.training | {"seed": seed, "output_dir": str(folder)})


def keep_settings(config: RunConfig, folder: Path) -> None:
    """Writes the run's settings, or refuses to go on with others than it was started with."""
    facts = facts_of(config)
    facts["training"] = {name: value for name, value in facts["training"].items() if name not in FREE}
    path = folder / "settings.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(facts, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for section, values in json.loads(json.dumps(facts)).items():
        for name in sorted({*values, *before[section]}):
            if values.get(name) != before[section].get(name):
                raise ConfigError(f"{section}.{name}: {folder} was started with {before[section].get(name)!r} and "
                                  f"cannot go on with {values.get(name)!r}; set it back, or give another --runs")


def train_karma(row: Row, base: RunConfig, data: Dataset, seed: int, folder: Path, end: float, *,
                cache: Path | None = None, say: Callable[[str], None] = print) -> Ready | None:
    """Trains the row's model, or goes on with it; None if the time was over before the training was.

    folder: of this row and seed. end: of `time.monotonic`. Ctrl-C saves and raises KeyboardInterrupt.
    """
    config = config_of(row, base, seed, folder)
    keep_settings(config, folder)
    args = training_arguments(config, folder)
    config.model = fit_to_gpu(args, config.model, data, say)
    begin_peak(args.device)
    weights = folder / "trained" / "model.safetensors"
    if row.kind == "karma" and (weights.exists() or last_checkpoint(folder)):
        config.model = dataclasses.replace(config.model, decoder_warmup_steps=0, shortcut_warmup_epochs=0.0)  # read
    began = time.perf_counter()
    model = build(row, config, data, seed, args.device, cache, progress=not args.disable_tqdm)
    cost = Cost(folder, args.device, time.perf_counter() - began)
    if not weights.exists():
        deadline = Deadline(end)
        trainer = KarmaTrainer(model, args, data, [deadline, cost, *[Lines()] * args.disable_tqdm])
        trainer.train(resume_from_checkpoint=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        if deadline.reached:
            say(f"  stopped at step {trainer.state.global_step} of {trainer.state.max_steps}")
            return None
        model.save_weights(weights.parent)
        if time.monotonic() > end:
            say("  trained; the ranking is left")
            return None
    else:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights), strict=False)
    model.eval()
    return Ready(score_of(model), cost.facts(), model)


def score_of(model: Any) -> Score:
    """Users are encoded once for each way of reading a request."""
    items, known = model.encode_items(), {}

    def score(requests: Requests, masked: bool, queries: bool) -> Ranks:
        if queries not in known:
            known[queries] = model.encode_users(*requests.read(model.config.max_history, queries))
        return requests.rank(known[queries], items, masked)

    return score


class Cost(TrainerCallback):
    """Seconds of the start and of training over all sittings, the largest peak, and the steps; kept in cost.json.

    Written with every checkpoint, so that of a killed sitting counts what the next one goes on from. built: seconds
    that making the model took; those of the first sitting count, as later ones have no warm-up.
    """

    def __init__(self, folder: Path, device: torch.device, built: float) -> None:
        self.path, self.device, self.built = folder / "cost.json", device, built

    def facts(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.before, self.start = self.facts(), time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.write(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.write(state.global_step)

    def write(self, steps: int) -> None:
        before = self.before
        found = {"start_seconds": before.get("start_seconds", self.built), "steps": steps,
                 "train_seconds": before.get("train_seconds", 0.0) + time.perf_counter() - self.start,
                 "peak_bytes": max(peak_memory_bytes(self.device), before.get("peak_bytes", 0)),
                 "sittings": before.get("sittings", 0) + 1}
        write_atomically(self.path, json.dumps(found, indent=1) + "\n")


def begin_peak(device: torch.device) -> None:
    """Forgets the peaks of the rows before, where the system lets one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
