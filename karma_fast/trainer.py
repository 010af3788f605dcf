"""KarmaTrainer: transformers' Trainer with the KARMA loss, full-catalogue evaluation and an exact resume."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .data.batches import log_sampling_probability
from .data.schema import Dataset
from .data.windows import windows_of_pairs
from .evaluation.evaluate import evaluate_model
from .model.recommender import Recommender
from .processes import average_gradients, group_of_hosts, on_any
from .rates import rate_factor
from .step import OutOfMemory, backward, first_line, is_out_of_memory, random_state, set_random_state

LOSSES = ("loss", "act", "gen", "rec", "vis", "user", "item")  # of a log line, where they are
COMPLETE = "complete"  # an empty file that says a checkpoint was written to its end
PARTIAL = "partial"  # what it is called while the checkpoint is written or removed
AFTER_NAN = ("lower training.learning_rate and training.projection_learning_rate, or look for bad vectors with "
             "`karma-fast check-data`")

NOT_COMPILED = "a step is not compiled, as the tokens of its prompts differ from batch to batch; leave it out"
REFUSED = {  # settings of transformers that would break a step or have no effect on it
    "fp16": "the model computes in bfloat16 or float32 by itself, as float16 would need a loss scaler",
    "gradient_checkpointing": "it is a setting of the model: model.gradient_checkpointing in YAML and flags, "
                              "KarmaConfig(gradient_checkpointing=True) in Python",
    "torch_compile": NOT_COMPILED, "torch_compile_backend": NOT_COMPILED, "torch_compile_mode": NOT_COMPILED,
    "label_smoothing_factor": "none of the losses smooths its labels; leave it out",
    "torch_empty_cache_steps": "the cache is not emptied between steps; lower chunk_size where memory is short",
    "auto_find_batch_size": "the batch decides the loss and stays as set; lower chunk_size where memory is short"}


@dataclass
class KarmaTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with defaults for KARMA and a few settings of its own.

    learning_rate is for the language model (adapters), projection_learning_rate for everything else; learned scales,
    gains and weights of ages take ten times the latter.
    batch_size: query-target pairs that compete in a step, over all processes; the number of windows a process takes
    (per_device_train_batch_size) follows from it. None: per_device_train_batch_size windows.
    chunk_size: windows that a process's language model holds in memory at once; None: all of its batch. It changes
    memory and time, not the loss or its gradient. "auto", for `karma-fast train`: what fits the GPU.
    eval_users: validation users ranked at each evaluation during training, drawn once by seed; 0: all.
    share_steps: steps between two measurements of each term's share of the language model's gradient, which costs one
    backward a term; 0: never. The shares at u are cheap and logged with every line.
    """

    output_dir: str = field(default="runs/karma")
    learning_rate: float = field(default=3e-4)
    projection_learning_rate: float = field(default=2e-4)
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=10)
    weight_decay: float = field(default=0.01)
    per_device_train_batch_size: int = field(default=32)
    num_train_epochs: float = field(default=1.0)
    max_grad_norm: float = field(default=1.0)
    logging_steps: float = field(default=10)
    eval_strategy: str = field(default="no")
    save_strategy: str = field(default="steps")
    save_steps: float = field(default=100)
    save_total_limit: int | None = field(default=2)
    metric_for_best_model: str | None = field(default="HR@10")
    greater_is_better: bool | None = field(default=True)
    remove_unused_columns: bool = field(default=False)
    batch_size: int | None = field(default=None)
    chunk_size: int | Literal["auto"] | None = field(default=None)
    ddp_find_unused_parameters: bool | None = field(default=False)  # gradients are averaged by `average_gradients`
    logging_nan_inf_filter: bool = field(default=False)  # it makes the host wait each step; `log` names a NaN's term
    report_to: str | list[str] | None = field(default="none")
    eval_users: int = field(default=500)
    share_steps: int = field(default=0)

    def __post_init__(self) -> None:
        for name, why in REFUSED.items():  # before transformers acts on them
            value = getattr(self, name)
            if value:
                raise ValueError(f"{name}: got {str(value).lower()}; {why}")
        super().__post_init__()
        for name in ("batch_size", "chunk_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}: got {value}; at least 1, or none, is needed")


def step_of(checkpoint: str | Path) -> int:
    """
    >>> step_of("runs/demo/checkpoint-60")
    60
    """
    return int(Path(checkpoint).name.removeprefix("checkpoint-"))


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders ``checkpoint-STEP`` in the order of their steps, whoever wrote them."""
    found = (p for p in Path(folder).glob("checkpoint-*") if p.is_dir())
    return sorted((p for p in found if p.name.removeprefix("checkpoint-").isdecimal()), key=step_of)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    return next((p for p in reversed(checkpoints(folder)) if (p / COMPLETE).exists()), None)


def mark_partial(checkpoint: Path) -> None:
    """Says of a checkpoint, before it is written or removed, that it is ours and not whole."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    if (checkpoint / COMPLETE).exists():
        (checkpoint / COMPLETE).replace(checkpoint / PARTIAL)
    else:
        (checkpoint / PARTIAL).touch()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the device's allocations on a GPU, of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def shares(norms: dict[str, Tensor]) -> dict[str, float]:
    """Each term's gradient norm divided by the sum of them."""
    values = {name: float(norm) for name, norm in norms.items()}
    total = sum(values.values())
    return {name: value / total for name, value in values.items()} if total > 0 else {}


def windows_of_a_step(args: KarmaTrainingArguments, positions: str, starts: np.ndarray, ends: np.ndarray) -> int:
    """Windows that a process takes in a step."""
    if args.batch_size is None:
        return args.per_device_train_batch_size
    return windows_of_pairs(args.batch_size / args.world_size, positions, starts, ends)


class Windows(torch.utils.data.Dataset):
    """Window number -> (start, end), kept as two arrays however many there are."""

    def __init__(self, starts: np.ndarray, ends: np.ndarray) -> None:
        self.starts, self.ends = starts, ends

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, window: int) -> tuple[int, int]:
        return int(self.starts[window]), int(self.ends[window])


class KarmaTrainer(Trainer):
    """Trains a recipe's model, such as a `KarmaModel`, on a dataset's training part.

    Args:
        model: from `KarmaModel.build`. args: settings. data: from `karma_fast.load_dataset`.

    Writes ``log.jsonl`` (a line each logging step and each evaluation) and checkpoints into ``args.output_dir``.
    ``train(resume_from_checkpoint=True)`` goes on from the last complete checkpoint as if nothing had happened. Ctrl-C
    saves one after the current step; a second Ctrl-C stops at once. Of several processes one that got the signal stops
    all.
    """

    def __init__(self, model: Recommender, args: KarmaTrainingArguments, data: Dataset, callbacks=None) -> None:
        if args.chunk_size == "auto":
            raise ValueError("chunk_size: got 'auto', which `karma-fast train` resolves; here take a number, such as "
                             "karma_fast.planning.propose(...).chunk_size")
        starts, ends = model.training_windows(data.sequences, data.split)
        if not len(starts):
            raise ValueError("no user has two events in the training part, so there is nothing to train on")
        if args.eval_strategy != "no" and not len(data.split.valid):
            raise ValueError(f"training.eval_strategy: got {args.eval_strategy.value}, but the data has no validation "
                             "target; set it to no, or move data.valid_time and data.test_time so that some "
                             "events of users with earlier ones lie between them")
        if args.n_gpu > 1:
            warnings.warn(f"{args.n_gpu} GPUs are visible and one is used; torchrun --nproc-per-node {args.n_gpu} "
                          "starts a process for each", stacklevel=2)
            args._n_gpu = 1
        args.per_device_train_batch_size = windows_of_a_step(args, model.config.positions, starts, ends)
        if args.per_device_train_batch_size * args.world_size == 1 and model.loss.wants("act") \
                and data.sequences.negatives is None:
            raise ValueError("a step has one window, whose targets have no negatives; give "
                             "training.per_device_train_batch_size 2 or more, or a larger training.batch_size")
        log_q = log_sampling_probability(data.sequences, data.split, len(data.items))
        collator = model.collator(data.sequences, log_q, seed=args.seed, chunk_size=args.chunk_size)
        super().__init__(model, args, data_collator=collator,
                         train_dataset=Windows(starts, ends), eval_dataset=data.split.valid, callbacks=callbacks)
        self.data = data
        valid = data.split.valid
        if 0 < args.eval_users < len(valid):
            valid = np.sort(np.random.default_rng(args.seed).choice(valid, args.eval_users, replace=False))
        self.eval_positions = valid
        self.interrupted = False
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("DeepSpeed and FSDP cannot train this model; several processes each hold the whole "
                             "(4-bit) model, as with torchrun")
        self.hosts = group_of_hosts(args.ddp_timeout_delta)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.doing = "prompts"  # what runs out of memory, where `backward` does not say it
        self._sums: dict[str, float | Tensor] = defaultdict(float)
        self._norms: dict[str, dict[str, Tensor]] = {}
        self._since = time.perf_counter()
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Hooks(self))
        if not args.disable_tqdm:
            self.add_callback(_Bar())

    # ---- one step ------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Gradients of one batch, chunk by chunk; the loss as Trainer counts it."""
        self.model.train()
        batch = self._prepare_inputs(inputs)
        step = self.state.global_step + 1
        measured = self.args.share_steps > 0 and (step % self.args.share_steps == 0 or step == 1)
        # our losses are means over a batch, so accumulated batches share one step
        scale = 1 / self.current_gradient_accumulation_steps
        found = backward(self.model, batch, scale=scale, llm_norms=measured)
        if self.accelerator.sync_gradients:
            average_gradients(self.trained)
        for name, value in found.parts.present().items():
            self._sums[name] = self._sums[name] + value
        self._sums["batches"] += 1
        self._sums["tokens"] += batch.num_tokens
        self._norms["u"] = found.norms_u
        if found.norms_llm:
            self._norms["llm"] = found.norms_llm
        if not found.parts.present():  # nothing in this batch for the terms that are wanted
            return torch.zeros((), device=self.args.device)
        return self.model.loss(found.parts) * scale

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            backbone = {id(p) for p in self.model.backbone.parameters()}
            groups = defaultdict(list)
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    # scales, gains and learned vectors are not pulled to 0
                    groups[id(p) in backbone, p.ndim > 1, rate_factor(name)].append(p)
            rates = {True: self.args.learning_rate, False: self.args.projection_learning_rate}
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options.pop("lr", None)
            self.optimizer = kind([{"params": params, "lr": rates[is_backbone] * factor,
                                    "weight_decay": self.args.weight_decay if decayed else 0.0}
                                   for (is_backbone, decayed, factor), params in groups.items()],
                                  lr=self.args.learning_rate, **options)
        return self.optimizer

    # ---- log and evaluation --------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums["batches"]:
            batches = self._sums.pop("batches")
            tokens = self._sums.pop("tokens")
            parts = self._means(batches)
            now = time.perf_counter()
            logs |= parts | {"scale": float(self.model.loss.scale.detach()),
                             "tokens_per_second": tokens / (now - self._since),
                             "peak_memory_bytes": peak_memory_bytes(self.model.device)}
            for where, norms in self._norms.items():
                logs |= {f"share_{where}/{name}": share for name, share in shares(norms).items()}
            self._since = now
            self._sums.clear()
            self._norms.clear()
            self._refuse_nan(parts, batches)
        super().log(logs, start_time)

    def _means(self, batches: int) -> dict[str, float]:
        """The loss parts since the last log, averaged over batches and processes."""
        names = [term.name for term in fields(self.model.loss.parts) if self.model.loss.wants(term.name)
                 and (term.name != "vis" or self.model.image_head is not None)]
        sums = torch.stack([torch.as_tensor(self._sums[name], device=self.args.device) for name in names])
        means = self.accelerator.gather(sums[None].float()).mean(dim=0) / batches
        return dict(zip(names, means.tolist(), strict=True))

    def _refuse_nan(self, parts: dict[str, float], batches: float) -> None:
        for name, value in parts.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"L_{name} is {value} within the last {batches:.0f} batches up to step "
                                         f"{self.state.global_step}; {AFTER_NAN}")

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """HR, NDCG, MRR over the full catalogue for the validation users; seen items masked."""
        positions = self.eval_positions if eval_dataset is None else np.asarray(eval_dataset)
        start, self.doing = time.perf_counter(), "evaluation"
        found = evaluate_model(self.model, self.data, positions)
        self.doing = "prompts"
        metrics = {f"{metric_key_prefix}_{name}": float(value) for name, value in found.items()}
        self._since += time.perf_counter() - start  # the time of an evaluation is not the time of training steps
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The states of a checkpoint with the arguments' rates and weight decay, which may have changed since."""
        ours = [(group.get("initial_lr"), group["weight_decay"]) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        for group, (_, decay) in zip(groups, ours, strict=True):
            group["weight_decay"] = decay
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            return  # it makes each rate of the one before, so the checkpoint's are all there is
        scheduler.base_lrs = [rate for rate, _ in ours]
        for group, rate, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in groups]

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if self.args.should_save:  # every process is asked
            self.model.save_weights(Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model, trial) -> None:
        # what is not finite now never will be again; all processes find the same
        if self._sums["batches"]:
            self._refuse_nan(self._means(self._sums["batches"]), self._sums["batches"])
        finite = torch.stack([p.detach().isfinite().all() for p in self.trained])
        if on_any(not finite.all(), self.hosts):
            raise FloatingPointError(f"step {self.state.global_step} left weights that are not finite; {AFTER_NAN}")
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            mark_partial(folder)
        self.doing = "checkpoint"
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process has written its random states
        if self.args.should_save:
            (folder / PARTIAL).replace(folder / COMPLETE)
            self._remove_older(folder)
        self.doing = "prompts"

    def _remove_older(self, newest: Path) -> None:
        """Removes the oldest complete checkpoints beyond the limit, but neither the newest nor the best."""
        if self.limit <= 0:
            return
        found = [p for p in checkpoints(newest.parent) if (p / COMPLETE).exists()]
        kept = {newest.name, Path(self.state.best_model_checkpoint or newest).name}
        spare = len(found) - max(self.limit, len(kept))
        for old in [p for p in found if p.name not in kept][:max(0, spare)]:
            mark_partial(old)
            shutil.rmtree(old, ignore_errors=True)

    def _issue_warnings_after_load(self, load_result) -> None:
        missing = [n for n in load_result.missing_keys if n in self.model.trained_names()]
        if missing or load_result.unexpected_keys:
            raise ValueError(f"the checkpoint does not fit this model: missing {missing}, unknown "
                             f"{load_result.unexpected_keys}; resume with the config the run was started with")

    def train(self, resume_from_checkpoint: str | bool | None = None, *, overwrite: bool = False, **kwargs):
        """Trains to the end, as transformers' Trainer does.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last complete one in ``args.output_dir``;
                where there is none, training starts at step 0. Later checkpoints of the folder are removed.
            overwrite: removes the checkpoints in ``args.output_dir`` and starts at step 0.

        Raises ValueError if the folder holds checkpoints and neither is asked for, or the one that is named was not
        written to its end.
        """
        folder = Path(self.args.output_dir)
        found = checkpoints(folder)
        if found and not (resume_from_checkpoint or overwrite):
            raise ValueError(f"{folder}: holds checkpoints of an earlier run, such as {found[-1].name}; "
                             "train(resume_from_checkpoint=True) goes on with it, train(overwrite=True) replaces it, "
                             "and another output_dir keeps it")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(folder)
        elif resume_from_checkpoint and (Path(resume_from_checkpoint) / PARTIAL).exists():
            raise ValueError(f"{resume_from_checkpoint}: was not written to its end; "
                             "train(resume_from_checkpoint=True) takes the last complete checkpoint")
        resume_from_checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            step = step_of(resume_from_checkpoint) if resume_from_checkpoint else 0
            for stale in found:
                left = (stale / COMPLETE).exists() and step_of(stale) > step  # of another branch
                if (stale / PARTIAL).exists() or (left if resume_from_checkpoint else overwrite):
                    mark_partial(stale)
                    shutil.rmtree(stale)
            keep_log(folder / "log.jsonl", step)
        if self.hosts is not None:  # process 0 may come hours later, and other groups may wait for less
            torch.distributed.barrier(self.hosts)
        self._since, self.doing, self.interrupted = time.perf_counter(), "prompts", False
        self._sums.clear()  # what an earlier training left when it was stopped
        self._norms.clear()
        # `_remove_older` keeps to it; transformers would remove what is not marked, and the newest at the end
        self.limit, self.args.save_total_limit = self.args.save_total_limit or 0, None
        try:
            with self._stop_on_interrupt():
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            found = error if isinstance(error, OutOfMemory) else OutOfMemory(self.doing, first_line(error))
            traceback.clear_frames(error.__traceback__)
        finally:
            self.args.save_total_limit = self.limit or None
        self._save_after_out_of_memory(found)
        raise found

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step < self.state.max_steps:  # a finished run that is resumed takes no further step
            super()._run_epoch(*args, **kwargs)

    def _save_after_out_of_memory(self, error: OutOfMemory) -> None:
        """A checkpoint of the last complete step, whose successor failed; not while weights were being changed."""
        self.model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        step = self.state.global_step
        saved = (Path(self.args.output_dir) / f"checkpoint-{step}" / COMPLETE).exists()
        if step == 0 or saved or error.part == "optimiser" or self.args.world_size > 1:
            return
        set_random_state(self.random_state, self.model.device)
        with contextlib.suppress(torch.OutOfMemoryError, MemoryError, RuntimeError, FloatingPointError):
            self._save_checkpoint(self.model, None)

    @contextlib.contextmanager
    def _stop_on_interrupt(self):
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        again = False  # `interrupted` may come from another process

        def stop(signum, frame):
            nonlocal again
            if again:
                raise KeyboardInterrupt
            again = self.interrupted = True
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def keep_log(path: Path, step: int) -> None:
    """Cuts a log's lines after ``step``, so that a resumed run writes them again."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
            if json.loads(line).get("step", 0) <= step and step > 0:
                lines.append(line + "\n")
    part = path.with_suffix(".part")
    part.write_text("".join(lines), encoding="utf-8")
    part.replace(path)


class _Hooks(TrainerCallback):
    """The scale's limit, the JSONL log, the stop after Ctrl-C, and what is needed after running out of memory."""

    def __init__(self, trainer: KarmaTrainer) -> None:
        self.trainer = trainer

    def remember(self, args, state, control, **kwargs):
        """The random state that a checkpoint of this step has to hold."""
        self.trainer.random_state = random_state(self.trainer.model.device)

    on_step_begin = remember

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # the arguments' intervals, not a checkpoint's
        self.remember(args, state, control)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.doing = "optimiser"

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.model.loss.clamp_()
        self.trainer.doing = "prompts"

    def on_step_end(self, args, state, control, **kwargs):
        self.remember(args, state, control)
        if on_any(self.trainer.interrupted, self.trainer.hosts):
            self.trainer.interrupted = True
            control.should_save = control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with open(os.path.join(args.output_dir, "log.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class _Bar(TrainerCallback):
    """One line: step, rate, time left, and the last logged loss parts."""

    def __init__(self) -> None:
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step",
                            dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            shown = {k: f"{logs[k]:.3f}" for k in LOSSES if k in logs}
            shown |= {"tok/s": f"{logs['tokens_per_second']:.0f}", "GB": f"{logs['peak_memory_bytes'] / 1e9:.1f}"}
            self.bar.set_postfix(shown)
        elif "eval_HR@10" in logs:
            self.bar.write(f"step {state.global_step}: validation HR@10 {logs['eval_HR@10']:.4f}, "
                           f"NDCG@10 {logs['eval_NDCG@10']:.4f}, MRR {logs['eval_MRR']:.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
