"""What several commands need: a quiet start, models, configurations, and the data behind a model."""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoints import checkpoints
from ..config import MOST_REQUESTS, ConfigError, RunConfig
from ..data.flat import draw

if TYPE_CHECKING:
    import torch

    from ..data import Dataset
    from ..model.recommender import Recommender


def set_up_process() -> None:
    """Keeps other packages' notices off the terminal and oneDNN's cache small; warnings become single lines."""
    # a compiled product for each of the last 1,024 shapes otherwise, and every batch has shapes of its own: gigabytes
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def program() -> str:
    """What to type for `karma-fast` in this shell: the environment it lies in may not be activated."""
    if shutil.which("karma-fast"):
        return "karma-fast"
    started = Path(sys.argv[0])
    if started.name != "karma-fast":
        return shlex.join([sys.executable, "-m", "karma_fast"])
    return shlex.quote(os.path.relpath(started) if started.resolve().is_relative_to(Path.cwd()) else str(started))


def load_config(path: str | None, overrides: dict[str, str]) -> RunConfig:
    """`RunConfig.load`, with `--seed` alone meaning the training's, as the data's decides only the order of ties."""
    return RunConfig.load(path, {"training.seed" if key == "seed" else key: value for key, value in overrides.items()})


def model_folder(path: str) -> Path:
    """A run's folder or a saved model's -> the latter; FileNotFoundError if there is none."""
    for folder in (Path(path) / "model", Path(path)):
        if (folder / "config.json").is_file():
            return folder
    if checkpoints(path):
        raise FileNotFoundError(f"{path}: its training did not end, so there is no model yet; go on with "
                                "`karma-fast train CONFIG.yaml --resume`")
    raise FileNotFoundError(f"{path}: no model there; give a run's folder, such as runs/demo, or a saved model's")


def load_model(path: str) -> tuple[Recommender, Path]:
    folder = model_folder(path)
    set_up_process()
    from ..recipes import load_model as load

    return load(folder), folder


def load_data(data: str | None, folder: Path) -> Dataset:
    """The data of a YAML file, or of the run that wrote the model in ``folder``."""
    path = Path(data) if data is not None else folder.parent / "config.yaml"
    if data is None and not path.is_file():
        raise ConfigError(f"{folder}: no config.yaml beside it names its data; give --data CONFIG.yaml")
    from ..data import load_dataset

    return load_dataset(RunConfig.load(path).data)


def fit_to(model: Recommender, data: Dataset) -> Dataset:
    """The same data with its items counted as the model counts them; DataError if it has items the model lacks."""
    from ..data import DataError, Dataset, Sequences

    if data.items.ids.tolist() == model.items.ids.tolist():
        return data
    known = {name: place for place, name in enumerate(model.items.ids)}
    places = np.array([known.get(name, -1) for name in data.items.ids])
    used = np.unique(data.sequences.items)
    unknown = used[places[used] < 0]
    if len(unknown):
        raise DataError(f"{len(unknown)} items of this data are not in the model's catalogue, "
                        f"{data.items.ids[unknown[0]]!r} first; train a model on this data")
    sequences = Sequences(**{**vars(data.sequences), "items": places[data.sequences.items].astype(np.int32),
                             "negatives_indptr": None, "negatives": None})
    return Dataset(model.items, sequences, data.split, data.name, data.notes)


def user_index(user_ids: np.ndarray, user: str) -> int:
    """Place of an external id; KeyError with near ones."""
    found = np.flatnonzero(user_ids == user)
    if len(found):
        return int(found[0])
    near = difflib.get_close_matches(user, map(str, user_ids[:50_000]), n=3)
    hint = f"near: {', '.join(near)}" if near else f"ids look like {', '.join(map(str, user_ids[:3]))}"
    raise KeyError(f"no user has the id {user!r} (or they have too few events); {hint}")


def requests_to_rank(positions: np.ndarray, number: int | None, say: Callable[[str], None]) -> np.ndarray:
    """So many held-out requests, all for 0; for None all, or ``MOST_REQUESTS`` where there are more, which is said.

    Every command draws the same ones, whatever its seed, so that their tables can be compared.
    """
    drawn = draw(positions, MOST_REQUESTS if number is None else number, seed=0)
    if number is None and len(drawn) < len(positions):
        error = math.ceil(5000 / math.sqrt(len(drawn))) / 10_000  # of a share of one half, rounded up
        say(f"{len(drawn):,} of {len(positions):,} requests are drawn and ranked, so HR has a standard error of at "
            f"most {error:.4f}; --test-users 0 ranks all")
    return drawn


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device | None = None) -> str:
    """Of the GPU in use or, without one, of the CPU with the number of threads."""
    import torch

    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


COLUMNS = ("HR@1", "HR@5", "HR@10", "HR@50", "HR@200", "NDCG@10", "MRR")


def table(rows: dict[str, dict[str, float]], columns: Sequence[str] = COLUMNS) -> str:
    """Metrics as aligned text.

    >>> print(table({"popularity": {"HR@1": 0.25}}, ["HR@1"]))
                         HR@1
    popularity         0.2500
    >>> lines = table({"karma_start": {"HR@1": 1.0}, "karma": {"HR@1": 0.0}}, ["HR@1"]).splitlines()
    >>> len({len(line) for line in lines})
    1
    """
    from ..evaluation.verdict import name_of

    width = max(16, *(len(name_of(key)) for key in rows)) if rows else 16
    lines = [" " * width + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in columns)]
    lines += [f"{name_of(key):<{width}}" + "".join(f"{row[name]:{max(9, len(name) + 2)}.4f}" for name in columns)
              for key, row in rows.items()]
    return "\n".join(lines)
