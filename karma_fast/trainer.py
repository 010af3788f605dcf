"""KarmaTrainer: transformers' Trainer with the KARMA loss, full-catalogue evaluation and an exact resume."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .callbacks import Bar, Hooks
from .checkpoints import (
    PARTIAL,
    checkpoints,
    is_complete,
    last_checkpoint,
    mark_complete,
    mark_partial,
    remove_older,
    remove_stale,
)
from .data.batches import log_sampling_probability
from .data.schema import Dataset
from .data.windows import windows_of_pairs
from .evaluation.evaluate import evaluate_model
from .model.recommender import Recommender
from .processes import average_gradients, group_of_hosts, on_any
from .rates import rate_factor
from .step import OutOfMemory, backward, first_line, is_out_of_memory, set_random_state
from .training_arguments import KarmaTrainingArguments

AFTER_NAN = ("lower training.learning_rate and training.projection_learning_rate, or look for bad vectors with "
             "`karma-fast check-data`")


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
    wanted = args.per_device_train_batch_size
    if args.batch_size is not None:
        wanted = windows_of_pairs(args.batch_size / args.world_size, positions, starts, ends)
    # with more than its share the processes would have windows in common
    return wanted if args.world_size == 1 else min(wanted, -(-len(starts) // args.world_size))


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
                and not model.further_negatives(data.sequences):
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
        self.add_callback(Hooks(self))
        if not args.disable_tqdm:
            self.add_callback(Bar())

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
            tokens = torch.tensor([self._sums.pop("tokens")], device=self.args.device)
            parts = self._means(batches)
            now = time.perf_counter()
            logs |= parts | {"scale": float(self.model.loss.scale.detach()),
                             "tokens_per_second": int(self.accelerator.gather(tokens).sum()) / (now - self._since),
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
        if self.is_in_train and self.hosts is not None:  # what is best, or a plateau, is so for all processes
            shared = [metrics]
            torch.distributed.broadcast_object_list(shared, src=0, group=self.hosts)
            metrics = shared[0]
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
            mark_complete(folder)
            remove_older(folder, self.state.best_model_checkpoint, self.limit)
        self.doing = "prompts"

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
            remove_stale(folder, resume_from_checkpoint, overwrite)
        if self.hosts is not None:  # process 0 may come hours later, and other groups may wait for less
            torch.distributed.barrier(self.hosts)
        self._since, self.doing, self.interrupted = time.perf_counter(), "prompts", False
        self._sums.clear()  # what an earlier training left when it was stopped
        self._norms.clear()
        # `remove_older` keeps to it; transformers would remove what is not marked, and the newest at the end
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

    def leave_processes(self) -> None:
        """Ends the processes' group and its threads, once, after the last training: none can train any more.

        Every process calls it; what is left to evaluate and save, each does by itself. A thread of gloo that is still
        giving up a tensor while Python shuts down aborts its process.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        self.hosts, self.model_wrapped = None, self.model  # a group ends when nobody holds it any more
        self.accelerator.free_memory()
        torch.distributed.destroy_process_group()

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step < self.state.max_steps:  # a finished run that is resumed takes no further step
            super()._run_epoch(*args, **kwargs)

    def _save_after_out_of_memory(self, error: OutOfMemory) -> None:
        """A checkpoint of the last complete step, whose successor failed; not while weights were being changed."""
        self.model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        step = self.state.global_step
        saved = is_complete(Path(self.args.output_dir) / f"checkpoint-{step}")
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
