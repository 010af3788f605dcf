"""`karma-fast plan`: what a training run will need of a GPU's memory, and the settings that fit one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from typing import TYPE_CHECKING

from ..config import ConfigError, RunConfig
from .common import load_config, set_up_process

if TYPE_CHECKING:
    from ..data import Dataset
    from ..planning import MemoryPlan

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
         "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    if config.model.recipe != "karma":
        raise ConfigError(f"recipe: got {config.model.recipe}; plan knows the steps of karma alone")
    if args.model:
        config.model = dataclasses.replace(config.model, backbone=args.model)
    budget = gpu_memory(args.gpu_memory)
    set_up_process()
    from ..model.backbone import default_device
    from ..planning import Unpredicted, capability_of, plan_memory, propose
    from ..run_setup import UNPLANNED_CHUNK

    given = {"batch_size": args.batch_size, "chunk_size": args.chunk_size}
    config.training |= {name: value for name, value in given.items() if value is not None}
    data = None
    if config.data.interactions or config.data.name:
        from ..data import load_dataset

        data = load_dataset(config.data)
    batch_size, chunk_size, optimiser = step_settings(config, data)
    known = {"data": data, "optimiser": optimiser}
    if args.gpu_memory is None:  # this machine's GPU is meant
        known["capability"] = capability_of(default_device())
    try:
        if chunk_size == "auto" and budget is not None:
            plan = propose(config.model, budget, batch_size, **known)
        else:
            plan = plan_memory(config.model, batch_size=batch_size,
                               chunk_size=None if chunk_size == "auto" else chunk_size, **known)
    except Unpredicted as error:
        raise ConfigError(f"{error}; another model.quantization or model.attention may be known, and training reads "
                          f"{UNPLANNED_CHUNK} windows at once unless training.chunk_size is set") from error
    fits = None if budget is None else plan.fits(budget)
    if args.json:
        print(json.dumps(plan.to_dict() | {"budget_bytes": budget, "fits": fits}, indent=1))
    else:
        print(to_text(plan, config, budget))
    return 1 if fits is False else 0


def step_settings(config: RunConfig, data: Dataset | None) -> tuple[int, int | str | None, str]:
    """(windows of a step on one device, windows at once, optimiser) of the training section on a GPU.

    Windows at once: a number, "auto", or None for all of the step. Without data every window is taken to be as long
    as it may be.
    """
    from ..data.windows import training_windows, windows_of_pairs
    from ..run_setup import gpu_defaults, training_settings
    from ..training_arguments import KarmaTrainingArguments

    defaults = {field.name: field.default for field in dataclasses.fields(KarmaTrainingArguments)}
    settings = defaults | gpu_defaults() | training_settings(config.training)
    windows = settings["per_device_train_batch_size"]
    model = config.model
    if settings.get("batch_size") and data is not None:
        windows = windows_of_pairs(settings["batch_size"], model.positions, *training_windows(
            data.sequences, data.split, model.max_history, model.positions))
    elif settings.get("batch_size"):
        windows = -(-settings["batch_size"] // (model.max_history if model.positions == "all" else 1))
    return windows, settings["chunk_size"], str(getattr(settings["optim"], "value", settings["optim"]))


def gpu_memory(text: str | None) -> int | None:
    """Bytes of a given size, else of this machine's first GPU, else None.

    >>> gpu_memory("12GB"), gpu_memory("8 GiB"), gpu_memory("24g")
    (12000000000, 8589934592, 24000000000)
    """
    if text is None:
        import torch

        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ConfigError(f"--gpu-memory: got {text!r}; a size such as 12GB (10^9 bytes each) or 12GiB is needed")
    return int(float(found[1]) * UNITS[(found[2] or "").upper()])


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def to_text(plan: MemoryPlan, config: RunConfig, budget: int | None) -> str:
    model = config.model
    fits = "" if budget is None else f" of {gigabytes(budget)}: " + ("it fits" if plan.fits(budget)
                                                                     else "it does not fit")
    lines = [f"{plan.backbone} ({model.quantization}, {model.tuning}) on a GPU",
             f"  peak             {gigabytes(plan.peak):>9}{fits}",
             *(f"    {name:<15}{gigabytes(size):>9}" for name, size in plan.parts.items()), "",
             *([f"  training.batch_size                   {config.training['batch_size']}"]
               if config.training.get("batch_size") else []),
             f"  training.per_device_train_batch_size  {plan.batch_size}",
             f"  training.chunk_size                   {plan.chunk_size}",
             f"  model.gradient_checkpointing          {str(plan.gradient_checkpointing).lower()}",
             f"  model.max_history                     {model.max_history}",
             f"  each query sees up to {plan.negatives:,} negatives"]
    if plan.changes:
        lines += ["", "  nothing fits; each of these alone would need"]
        lines += [f"    {gigabytes(change['peak_bytes']):>9}  {change['setting']} {change['value']}"
                  + (" fits" if change["peak_bytes"] <= budget else "") for change in plan.changes]
    return "\n".join([*lines, "", "  assumed:", *(f"    {text}" for text in plan.assumed)])
