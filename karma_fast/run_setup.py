"""What stands at the start of a run: training settings, the run's folder, the lines that say what will happen."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import __version__
from .checkpoints import checkpoints, last_checkpoint, remove_stale
from .commands.common import device_name
from .config import ConfigError, DataConfig, ModelConfig, RunConfig, convert, unknown_key
from .data.catalogue import vector_file
from .data.schema import Dataset
from .data.windows import negatives_of, training_windows
from .model.backbone import causal_lm, compute_dtype
from .model.storage import remove_if_empty, remove_model, write_atomically
from .step import OutOfMemory
from .trainer import KarmaTrainer, windows_of_a_step
from .training_arguments import KarmaTrainingArguments

if TYPE_CHECKING:
    from .model.recommender import Recommender

MEMORY_ONLY = ("gradient_checkpointing", "attention")  # what may change when a run goes on: no result hangs on it
# what a checkpoint's states belong to: changed, these would have no effect, break it, or mix two runs
OF_THE_START = ("seed", "data_seed", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
                "lr_scheduler_type", "metric_for_best_model", "greater_is_better")
RATES = ("learning_rate", "projection_learning_rate")
BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that make each rate of the one before
DDP_TIMEOUT = 4 * 3600  # seconds; process 0 ranks test requests before the first step, for which the others wait
RESULTS = ("metrics.json", "examples.json", "attention.json", "report.html", "report.md", "log.jsonl")


def training_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The training section with names and types checked against `KarmaTrainingArguments`.

    >>> training_settings({"max_steps": "20", "eval_strategy": False, "learning_rate": "1e-4"})
    {'max_steps': 20, 'eval_strategy': 'no', 'learning_rate': 0.0001}
    >>> training_settings({"learnin_rate": 1})
    Traceback (most recent call last):
        ...
    karma_fast.config.ConfigError: training.learnin_rate: no such setting; did you mean learning_rate?
    """
    names = {field.name for field in dataclasses.fields(KarmaTrainingArguments) if field.init}
    hints, out = typing.get_type_hints(KarmaTrainingArguments), {}
    for key, value in values.items():
        if key not in names:
            raise unknown_key("training", key, names)
        kinds = {hints[key], *typing.get_args(hints[key])}
        choices = any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds) or key.endswith("_strategy")
        if choices and value is False:
            value = "no"  # which is what YAML reads as false
        out[key] = convert(f"training.{key}", value, str if choices else hints[key])
        if key == "report_to" and out[key] is None:
            out[key] = "none"
    return out


def training_arguments(config: RunConfig, folder: Path) -> KarmaTrainingArguments:
    """The arguments of a run into ``folder``; sets ``config.training`` to the checked settings."""
    config.training = training_settings(config.training) | {"output_dir": str(folder)}
    try:
        args = KarmaTrainingArguments(**(run_defaults() | config.training))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"training: {error}") from error
    config.training["optim"] = args.optim.value  # its default depends on the machine, and its states are kept
    return args


def run_defaults() -> dict[str, Any]:
    """Training settings of a run whose defaults are not those of `KarmaTrainingArguments`."""
    return {"report_to": "tensorboard" if importlib.util.find_spec("tensorboard") else "none",
            "disable_tqdm": not sys.stderr.isatty(), "dataloader_pin_memory": torch.cuda.is_available(),
            "ddp_timeout": DDP_TIMEOUT} | (gpu_defaults() if torch.cuda.is_available() else {})


def gpu_defaults() -> dict[str, Any]:
    """Training settings that a GPU changes, for runs and for what `karma-fast plan` says of them.

    The next batch is made while the card works, and the chunk is what fits. Where bitsandbytes is there, the
    optimiser's states take a byte a number and may leave the card.
    """
    optim = {"optim": "paged_adamw_8bit"} if importlib.util.find_spec("bitsandbytes") else {}
    return {"dataloader_num_workers": 1, "chunk_size": "auto"} | optim


def fit_to_gpu(args: KarmaTrainingArguments, config: ModelConfig, data: Dataset, say: Callable[[str], None],
               budget: int | None = None) -> ModelConfig:
    """Resolves ``chunk_size: auto``: the largest chunk predicted to fit, and checkpointing if it must be.

    budget: bytes; default what is free on the GPU. Without a GPU, all of a batch is read at once. Where the memory
    cannot be predicted, ``UNPLANNED_CHUNK`` windows are.
    """
    from .planning import Unpredicted, capability_of, propose
    from .planning.plan import CUDA_CONTEXT

    if args.chunk_size != "auto":
        return config
    args.chunk_size = None
    if args.device.type != "cuda" and budget is None:
        return config
    if config.recipe != "karma":  # its step is not simulated
        args.chunk_size = UNPLANNED_CHUNK
        return config
    if budget is None:
        free, total = torch.cuda.mem_get_info(args.device)
        budget = min(total, free + CUDA_CONTEXT)  # asking has made the context, which a plan counts too
    starts, ends = training_windows(data.sequences, data.split, config.max_history, config.positions)
    windows = windows_of_a_step(args, config.positions, starts, ends)
    try:
        plan = propose(config, budget, windows, data=data, optimiser=args.optim.value,
                       capability=capability_of(args.device))
    except Unpredicted as error:
        args.chunk_size = UNPLANNED_CHUNK
        say(f"{error}; {UNPLANNED_CHUNK} windows are read at once, and if they do not fit, set training.chunk_size "
            "lower")
        return config
    args.chunk_size = plan.chunk_size
    if not plan.fits(budget):
        better = [f"{change['setting']} {change['value']} ({change['peak_bytes'] / 1e9:.1f} GB)"
                  for change in plan.changes]
        say(f"this will hardly fit: {plan.peak / 1e9:.1f} GB predicted, {budget / 1e9:.1f} GB free; each of these "
            f"alone would need less: {', '.join(better)}")
    return dataclasses.replace(config, gradient_checkpointing=plan.gradient_checkpointing)


def prepare_folder(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Makes the folder and writes config.yaml; ConfigError if it holds a run that must not be touched."""
    import yaml

    def refuse(name: str, before: Any, now: Any) -> None:
        raise ConfigError(f"{name}: {folder} was started with {before!r} and cannot go on with {now!r}; set it back, "
                          "or start anew with --overwrite")

    exists = (folder / "metrics.json").exists() or bool(checkpoints(folder))
    if exists and not (resume or overwrite):
        raise ConfigError(f"{folder}: holds a run already; --resume goes on with it, --overwrite replaces it, and "
                          "--output_dir FOLDER writes elsewhere")
    keep_paths(config.data)
    if exists and resume and (folder / "config.yaml").exists():
        before, now = RunConfig.load(folder / "config.yaml").to_dict(), config.to_dict()
        if before["recipe"] != now["recipe"]:
            refuse("recipe", before["recipe"], now["recipe"])
        for section in ("data", "model"):
            for key, value in now[section].items():
                if before[section][key] != value and key not in MEMORY_ONLY:
                    refuse(f"{section}.{key}", before[section][key], value)
        was, settings = (run_defaults() | training_settings(part["training"]) for part in (before, now))
        schedule = settings.get("lr_scheduler_type")
        for key in (*OF_THE_START, *(RATES if schedule in BY_METRIC else ())):
            default = getattr(KarmaTrainingArguments, key)
            if was.get(key, default) != settings.get(key, default):
                refuse(f"training.{key}", was.get(key, default), settings.get(key, default))
    if exists and not resume:  # what the earlier run wrote, and nothing else
        for name in RESULTS:
            (folder / name).unlink(missing_ok=True)
        remove_stale(folder, None, overwrite=True)
        remove_model(folder / "model")
        remove_events(folder / "runs")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))


def keep_paths(data: DataConfig) -> None:
    """Makes the paths of the data absolute, so that config.yaml can be used from any folder."""
    for name in ("image_column", "id_vector_column"):
        value = getattr(data, name)
        if value and value.endswith(".npy"):  # else a column
            path = vector_file(value, Path(data.items).expanduser())
            if path.exists():
                setattr(data, name, str(path.resolve()))
    for name in ("interactions", "items"):
        value = getattr(data, name)
        setattr(data, name, str(Path(value).expanduser().resolve()) if value else "")


def remove_events(folder: Path) -> None:
    """Removes the files of TensorBoard in the folders of ``folder``, one a start, and what is empty without them."""
    found = list(folder.glob("*/events.out.tfevents.*"))
    for file in found:
        file.unlink()
    for path in [*{file.parent for file in found}, folder]:
        remove_if_empty(path)


@contextlib.contextmanager
def explain_memory(args: KarmaTrainingArguments, config: ModelConfig, folder: Path) -> Iterator[None]:
    """Adds to a report of running out of memory which setting to lower, and to what."""
    try:
        yield
    except OutOfMemory as error:
        saved, (what, may_go_on) = last_checkpoint(folder), advice(error.part, args, config)
        resume = ""
        if saved and may_go_on:
            resume = f"; {saved} holds the last complete step, and --resume goes on from it"
        elif not may_go_on:
            resume = "; a run cannot go on with this, so start anew with --overwrite"
        raise MemoryError(f"out of memory in {PARTS[error.part]}: {error}; {what}{resume}") from error


UNPLANNED_CHUNK = 32  # prompts at once on a GPU, where their memory is not predicted
PARTS = {"prompts": "the language model's pass over the prompts", "contrastive": "the contrastive loss",
         "reconstruction": "the decoder's pass over the target texts", "optimiser": "the optimiser's step",
         "evaluation": "the evaluation during training", "checkpoint": "writing a checkpoint"}


def advice(part: str, args: KarmaTrainingArguments, config: ModelConfig) -> tuple[str, bool]:
    """What to set after a part did not fit, and whether a run may go on with it.

    >>> args = KarmaTrainingArguments(per_device_train_batch_size=64, chunk_size=16, use_cpu=True)
    >>> from karma_fast.config import KarmaConfig
    >>> advice("prompts", args, KarmaConfig(gradient_checkpointing=True))
    ('set training.chunk_size to 8 (now 16; the gradients stay the same)', True)
    """
    windows = args.train_batch_size
    chunk = min(args.chunk_size or windows, windows)
    if part == "optimiser" and "paged" not in args.optim.value:
        return f"set training.optim to paged_adamw_8bit (now {args.optim.value})", False
    if part == "contrastive" and windows > 1:
        name, size = ("batch_size", args.batch_size) if args.batch_size else ("per_device_train_batch_size", windows)
        return f"set training.{name} to {size // 2} (now {size}; each query then sees half the negatives)", True
    steps = []
    if part in ("prompts", "reconstruction"):
        if chunk > 1:
            steps.append(f"set training.chunk_size to {chunk // 2} (now {chunk}; the gradients stay the same)")
        if not config.gradient_checkpointing:
            steps.append("set model.gradient_checkpointing to true")
    if steps:
        return ", or ".join(steps), True
    if part == "optimiser" and config.tuning == "lora":
        return f"set model.lora_rank below {config.lora_rank}", False
    return (f"set model.max_history below {config.max_history} or model.max_text_tokens below "
            f"{config.max_text_tokens}"), False


def millions(count: int) -> str:
    """
    >>> millions(134_515_008), millions(4_884_480), millions(98_304)
    ('135 M', '4.9 M', '0.10 M')
    """
    value = count / 1e6
    return f"{value:,.0f} M" if value >= 100 else f"{value:.1f} M" if value >= 1 else f"{value:.2f} M"


def banner(trainer: KarmaTrainer, data: Dataset, folder: Path) -> str:
    """What the run is about to do, in a few lines."""
    args, model = trainer.args, trainer.model
    config, split = model.config, data.split
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = causal_lm(model.backbone).num_parameters()  # counts packed 4-bit weights one by one
    if config.tuning == "lora":
        whole -= sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    windows = trainer.train_dataset
    pairs = float((windows.ends - windows.starts - 1).mean()) if config.positions == "all" else 1
    # with several processes the embeddings of all of them are gathered
    seen = negatives_of(min(args.train_batch_size * args.world_size, len(windows)), pairs)
    more = trainer.model.further_negatives(data.sequences)
    at_once = min(args.chunk_size or args.train_batch_size, args.train_batch_size)
    steps = args.max_steps if args.max_steps > 0 else round(
        args.num_train_epochs * -(-len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps))
    return "\n".join([
        f"karma_fast {__version__} on {device_name(args.device)}",
        f"  data       {data.name or 'data'}: {len(data.sequences):,} users, {len(data.items):,} items, "
        f"{len(data.sequences.items):,} events; {len(split.valid):,} validation and {len(split.test):,} test targets",
        f"  model      {config.backbone} ({millions(whole)} parameters, {config.quantization}, {config.tuning}), "
        f"{millions(trained)} trained, computing in {str(compute_dtype(args.device)).removeprefix('torch.')}",
        *([f"  queries    {how_queries_are_read(trainer.model)}"] if data.sequences.queries is not None else []),
        f"  training   {steps:,} steps of {args.train_batch_size} of {len(windows):,} windows; each query sees about "
        f"{seen:,} negatives{more and f', and {more}'}",
        f"  memory     {at_once} windows at once (training.chunk_size); {predicted_memory(trainer, data)}",
        f"  seed       {args.seed}",
        f"  writes to  {folder}", ""])


def how_queries_are_read(model: Recommender) -> str:
    if getattr(model, "query_shortcut", None) is not None:
        return "in the prompt, and their words past the language model"
    config = model.config
    if config.recipe == "karma" and config.query_shortcut and any(model.items.texts) \
            and "words" not in config.text_kinds:
        return ("in the prompt alone; model.text_vectors words (or both) would lead their words past the language "
                "model too")
    return "in the prompt alone"


def predicted_memory(trainer: KarmaTrainer, data: Dataset) -> str:
    """What `karma-fast plan` says of this run, as part of a line."""
    from .planning import Unpredicted, capability_of, plan_memory

    args, model = trainer.args, trainer.model
    if model.config.recipe != "karma":
        return "not predicted for this recipe"
    try:
        with torch.random.fork_rng([]):  # a run must not depend on its prediction
            plan = plan_memory(model.config, batch_size=args.train_batch_size, chunk_size=args.chunk_size,
                               device_type=args.device.type, data=data, tokenizer=model.tokenizer,
                               optimiser=args.optim.value, capability=capability_of(args.device))
    except Unpredicted as error:
        return str(error)
    where = "of the GPU" if args.device.type == "cuda" else "of tensors, beside the program itself"
    return f"predicted: at most about {plan.peak / 1e9:.1f} GB {where}"
