"""KarmaTrainingArguments: transformers' TrainingArguments with KARMA's defaults and a few settings more."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from transformers import TrainingArguments

NOT_COMPILED = "a step is not compiled, as the tokens of its prompts differ from batch to batch; leave it out"
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR")  # what it sets; other launchers are accelerate's to know
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
        if all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1:
            if not torch.accelerator.is_available():
                self.use_cpu = True  # without it the processes would not know of each other
            if self.use_cpu and not dist.is_initialized():  # transformers hands ddp_timeout on for GPUs alone
                dist.init_process_group(self.ddp_backend or "gloo", timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()
        for name in ("batch_size", "chunk_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}: got {value}; at least 1, or none, is needed")
