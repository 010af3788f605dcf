"""Training of SASRec: epochs over windows of events, early stopping on validation, one checkpoint an epoch."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import MOST_REQUESTS, ConfigError
from ..data.flat import draw
from ..data.windows import training_windows
from ..evaluation.csr import csr_ranges
from ..evaluation.held_out import held_out_ranks
from ..evaluation.metrics import ranking_metrics
from ..model.storage import part_of
from .sasrec import SASRec, SASRecConfig

STOP_METRIC = "NDCG@10"
CHECKPOINT = "sasrec-checkpoint.pt"


def train_sasrec(data: Any, config: SASRecConfig | None = None, *, seed: int, device: Any = None,
                 progress: bool = True, folder: str | Path | None = None,
                 go_on: Callable[[int], bool] = lambda epoch: True) -> SASRec:
    """Trains SASRec on the training part of ``data`` and returns it with the weights of its best epoch.

    An epoch goes once over every training event that has a predecessor. After it the validation requests, at most
    ``MOST_REQUESTS`` drawn once by ``seed``, are ranked against the whole catalogue, seen items left out;
    ``config.patience`` epochs without a better NDCG@10 end the training. Without validation requests it runs for
    ``config.epochs``. The test requests are not looked at.

    Each epoch draws from a generator of its own, seeded by ``seed`` and its number: the same seed gives the same
    weights on the same machine, with or without interruptions, whatever was drawn before. Needs tqdm and safetensors
    (``pip install "karma-fast[train]"``).

    Args:
        data: :class:`karma_fast.data.Dataset`.
        seed: of weights, order, dropout and validation requests drawn.
        device: default the first GPU, else the CPU.
        progress: show a bar.
        folder: gets a checkpoint after each epoch and the model at the end. If it holds a checkpoint of the same
            settings, seed and data, the training goes on from there; if it had ended, nothing is trained again.
        go_on: asked after each epoch, by its number from 1, whether there is time for another.

    Returns:
        the model, in eval mode on ``device``; ``model.facts`` has the epochs, the best one, its validation metrics,
        the seconds, and under "done" whether the training had ended or ``go_on`` stopped it.

    Raises:
        ConfigError: ``folder`` holds another training. ValueError: no user has two training events.
        FloatingPointError: the loss is not finite.

    Example:
        >>> from types import SimpleNamespace
        >>> from karma_fast.data import Sequences, split_leave_one_out
        >>> sequences = Sequences(np.arange(4), np.arange(0, 21, 5), np.tile([0, 1, 2, 3, 4], 4).astype(np.int32))
        >>> data = SimpleNamespace(sequences=sequences, split=split_leave_one_out(sequences), items=range(5))
        >>> model = train_sasrec(data, SASRecConfig(dim=8, epochs=2), seed=0, device="cpu", progress=False)
        >>> model.facts["epochs"]
        2
    """
    config = config or SASRecConfig()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    starts, ends = training_windows(data.sequences, data.split, config.max_history, "all")
    if not len(starts):
        raise ValueError("no user has two events in the training part, so there is no next item to learn from; give "
                         "longer sequences or another split")
    valid = draw(np.asarray(data.split.valid, np.int64), MOST_REQUESTS, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SASRec(len(data.items), config)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    state = {"identity": identity(data, config, seed), "epoch": 0, "best_epoch": 0, "best": None, "metrics": {},
             "seconds": 0.0, "done": False}
    checkpoint = Path(folder) / CHECKPOINT if folder is not None else None
    if checkpoint is not None and checkpoint.is_file():
        state = restore(checkpoint, state["identity"], model, optimizer)

    from tqdm import tqdm

    steps = -(-len(starts) // config.batch_windows)
    with tqdm(total=config.epochs * steps, initial=state["epoch"] * steps, desc=f"SASRec, seed {seed}", unit="step",
              disable=not progress or state["done"]) as bar:
        while not state["done"]:
            began, state["epoch"] = time.perf_counter(), state["epoch"] + 1
            loss = run_epoch(model, optimizer, data.sequences.items, starts, ends, (seed, state["epoch"]), bar)
            metrics = validate(model, data, valid)
            if not metrics or metrics[STOP_METRIC] > state["metrics"].get(STOP_METRIC, -1.0):
                state |= {"best": copy.deepcopy(model.state_dict()), "best_epoch": state["epoch"], "metrics": metrics}
            waited = state["epoch"] - state["best_epoch"]
            state["done"] = waited >= config.patience or state["epoch"] >= config.epochs
            state["seconds"] += time.perf_counter() - began
            bar.set_postfix_str(f"loss {loss:.3f}" + "".join(f", {k} {v:.4f}" for k, v in metrics.items()))
            if checkpoint is not None:
                save_checkpoint(checkpoint, state, model, optimizer)
            if not go_on(state["epoch"]):
                break
    model.load_state_dict(state["best"])
    model.facts = {"seed": seed, "epochs": state["epoch"], "best_epoch": state["best_epoch"],
                   "validation": state["metrics"], "seconds": round(state["seconds"], 1), "done": state["done"]}
    if folder is not None and state["done"]:
        model.save(folder)
    return model.eval()


def run_epoch(model: SASRec, optimizer: torch.optim.Optimizer, events: np.ndarray, starts: np.ndarray,
              ends: np.ndarray, seeds: tuple[int, int], bar: Any) -> float:
    """One pass over the windows in an order drawn by ``seeds``; the mean loss over the pairs."""
    device = model.items.weight.device
    order = np.random.default_rng(seeds).permutation(len(starts))
    total, pairs = torch.zeros((), device=device), 0
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.default_rng((*seeds, 1)).integers(2**62)))  # of the dropout
        for at in range(0, len(order), model.config.batch_windows):
            rows = np.sort(order[at:at + model.config.batch_windows])
            items, lengths, targets = (x.to(device) for x in windows_batch(events, starts[rows], ends[rows]))
            loss = model.loss(items, lengths, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.loss_fn.clamp_()
            total, pairs = total + loss.detach() * len(targets), pairs + len(targets)
            bar.update()
    mean = float(total) / pairs
    if not np.isfinite(mean):
        raise FloatingPointError(f"SASRec's loss is {mean} in epoch {seeds[1]}; lower sasrec.learning_rate "
                                 f"({model.config.learning_rate:g})")
    return mean


def windows_batch(events: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Windows ``events[starts:ends]`` -> items (T,), lengths (B,) and targets (T,), the item after each; int64.

    >>> windows_batch(np.array([4, 5, 6, 7]), np.array([0, 2]), np.array([3, 4]))
    (tensor([4, 5, 6]), tensor([2, 1]), tensor([5, 6, 7]))
    """
    indptr, items = csr_ranges(events, starts, ends - 1)
    _, targets = csr_ranges(events, starts + 1, ends)
    return torch.from_numpy(items), torch.from_numpy(np.diff(indptr)), torch.from_numpy(targets)


def validate(model: SASRec, data: Any, positions: np.ndarray) -> dict[str, float]:
    """HR@10 and NDCG@10 of the requests at flat ``positions``, seen items left out; {} if there are none."""
    if not len(positions):
        return {}
    users = model.user_vectors([data.sequences.history(p, model.config.max_history) for p in positions])
    return ranking_metrics(held_out_ranks(data.sequences, positions, users, model.item_vectors(), largest_k=10), (10,))


def identity(data: Any, config: SASRecConfig, seed: int) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from."""
    arrays = (data.sequences.indptr, data.sequences.items, data.split.train_end, data.split.valid)
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, np.int64).tobytes())
    return {**config.to_dict(), "seed": seed, "items": len(data.items), "data": digest.hexdigest()}


def save_checkpoint(path: Path, state: dict[str, Any], model: SASRec, optimizer: torch.optim.Optimizer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    torch.save({**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, part)
    part.replace(path)


def restore(path: Path, wanted: dict[str, Any], model: SASRec, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Loads model and optimiser; the rest of the checkpoint is returned."""
    state = torch.load(path, map_location=model.items.weight.device, weights_only=True)
    other = [name for name, value in wanted.items() if state["identity"].get(name) != value]
    if other:
        raise ConfigError(f"{path}: is of another training ({', '.join(other)} differ); give another folder, or "
                          "remove that file to start anew")
    model.load_state_dict(state.pop("model"))
    optimizer.load_state_dict(state.pop("optimizer"))
    return state
