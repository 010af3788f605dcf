"""What happens beside a trainer's steps: the log, the stop after Ctrl-C, the progress bar or lines."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from .processes import on_any
from .step import random_state

if TYPE_CHECKING:
    from .trainer import KarmaTrainer

LOSSES = ("loss", "act", "gen", "rec", "vis", "user", "item")  # of a log line, where they are


class Hooks(TrainerCallback):
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


class Bar(TrainerCallback):
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


class Lines(TrainerCallback):
    """The log as plain lines, for where no progress bar can be drawn."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            parts = " ".join(f"{n} {logs[n]:.3f}" for n in LOSSES if n in logs)
            print(f"step {state.global_step}/{state.max_steps}: {parts}, {logs['tokens_per_second']:.0f} tokens/s, "
                  f"{logs['peak_memory_bytes'] / 1e9:.1f} GB", flush=True)
        elif "eval_HR@10" in logs:
            print(f"step {state.global_step}: validation HR@10 {logs['eval_HR@10']:.4f}, MRR {logs['eval_MRR']:.4f}",
                  flush=True)
