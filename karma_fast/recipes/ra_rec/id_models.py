"""ID recommenders whose vectors of items and users are injected: a mean of items, ALS, SASRec.

Each has ``item_vectors() -> (N, d)`` and ``user_vectors(histories) -> (n, d)``, float32 tensors on the CPU with NaN
rows where there is no vector, and ``save(folder)``. All are fitted to the training part alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...config import ConfigError
from ...data.batches import LATEST
from ...data.schema import Dataset, Items, Split
from ...data.schema import Sequences as UserSequences
from ...model.id_vectors import id_vectors
from ...model.initialise import DECAY
from ...model.storage import save_tensors, write_atomically

if TYPE_CHECKING:
    from .config import RaRecConfig

KIND_FILE, VECTORS_FILE = "id_model.json", "id_model.safetensors"
ALS_REGULARISATION, ALS_ALPHA, ALS_ITERATIONS = 0.01, 1.0, 15  # implicit's defaults


class MeanOfItems:
    """Users as the decayed mean of their latest items' vectors; serves any table of item vectors.

    >>> model = MeanOfItems(torch.tensor([[1.0], [float("nan")], [3.0]]))
    >>> model.user_vectors([np.array([0]), np.array([1]), np.array([], int)]).tolist()
    [[1.0], [nan], [nan]]
    """

    kind = "mean"

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors.float()

    def item_vectors(self) -> Tensor:
        return self.vectors

    def user_vectors(self, histories: Sequence[np.ndarray]) -> Tensor:
        out = torch.full((len(histories), self.vectors.shape[1]), torch.nan)
        for n, history in enumerate(histories):
            latest = self.vectors[torch.from_numpy(np.asarray(history[-LATEST:], np.int64))]
            weights = DECAY ** torch.arange(len(latest) - 1, -1, -1.0)
            known = ~latest.isnan().any(dim=1)
            if known.any():
                out[n] = weights[known] @ latest[known] / weights[known].sum()
        return out

    def save(self, folder: Path) -> None:
        save_tensors({"vectors": self.vectors}, folder / VECTORS_FILE)


class Als:
    """Implicit-feedback matrix factorisation (Hu et al. 2008, https://doi.org/10.1109/ICDM.2008.22).

    Fitted by ``implicit`` (``pip install implicit``); users are folded in from their history by least squares, so no
    user needs to have been there at the training.

    >>> Als(torch.eye(2)).user_vectors([np.array([0])]).round(decimals=3).tolist()
    [[0.99, 0.0]]
    """

    kind = "als"

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors.float()
        factors = self.vectors.double()
        self.gram = factors.T @ factors + ALS_REGULARISATION * torch.eye(factors.shape[1], dtype=torch.float64)

    @classmethod
    def fit(cls, sequences: UserSequences, split: Split, num_items: int, dim: int, seed: int) -> Als:
        from ...baselines.counts import training_matrix

        try:
            from implicit.als import AlternatingLeastSquares
        except ImportError as error:
            raise ConfigError(f"model.id_model: als needs implicit ({error}); pip install implicit, or take "
                              "co_occurrence") from error
        found = AlternatingLeastSquares(factors=dim, regularization=ALS_REGULARISATION, alpha=ALS_ALPHA,
                                        iterations=ALS_ITERATIONS, random_state=seed, use_gpu=False, num_threads=1)
        found.fit(training_matrix(sequences, split, num_items).astype(np.float32), show_progress=False)
        return cls(torch.from_numpy(np.asarray(found.item_factors)))

    def item_vectors(self) -> Tensor:
        return without_zeros(self.vectors)

    def user_vectors(self, histories: Sequence[np.ndarray]) -> Tensor:
        out = torch.zeros(len(histories), self.vectors.shape[1])
        for n, history in enumerate(histories):
            if len(history):
                items, counts = np.unique(np.asarray(history, np.int64), return_counts=True)
                rows = self.vectors[torch.from_numpy(items)].double()
                confidence = torch.from_numpy(ALS_ALPHA * counts)
                # an item seen c times has confidence alpha c where it is 1 otherwise
                left = self.gram + rows.T @ ((confidence - 1).clamp_min(0)[:, None] * rows)
                out[n] = torch.linalg.solve(left, rows.T @ confidence.double()).float()
        return without_zeros(out)

    def save(self, folder: Path) -> None:
        save_tensors({"vectors": self.vectors}, folder / VECTORS_FILE)


def without_zeros(vectors: Tensor) -> Tensor:
    """NaN in place of (n, d) rows of zeros, which ALS gives to what it has not seen."""
    return vectors.masked_fill((vectors == 0).all(dim=1, keepdim=True), torch.nan)


def make_id_model(config: RaRecConfig, items: Items, sequences: UserSequences, split: Split, seed: int, cache: Path,
                  progress: bool = False):
    """The ID model that ``config.id_model`` names, fitted or read; ConfigError with what to do if it cannot be had.

    cache: folder that keeps a trained SASRec, so that a resumed run and further processes have the same.
    """
    name = config.id_model
    if name == "items":
        if items.id_vectors is None:
            raise ConfigError("model.id_model: got items, but the item table has no ID vectors; set "
                              "data.id_vector_column, or take co_occurrence")
        return MeanOfItems(torch.from_numpy(items.id_vectors))
    if name == "co_occurrence":
        return MeanOfItems(torch.from_numpy(id_vectors(sequences, split, len(items), config.id_dim,
                                                       config.id_window)))
    if name == "als":
        return Als.fit(sequences, split, len(items), config.id_dim, seed)
    from ...baselines import SASRec

    if name == "sasrec":
        return cached_sasrec(Dataset(items, sequences, split), seed, cache, progress)
    if not (Path(name) / "sasrec.json").is_file():
        raise ConfigError(f"model.id_model: got {name!r}; co_occurrence, als, sasrec, items or a folder with a saved "
                          "SASRec is needed")
    model = SASRec.load(name)
    if model.items.num_embeddings != len(items):
        raise ConfigError(f"model.id_model: {name} was trained on {model.items.num_embeddings:,} items, the data has "
                          f"{len(items):,}; train it on this data")
    return model


def cached_sasrec(data: Dataset, seed: int, cache: Path, progress: bool = False):
    """SASRec with its default settings, trained once for the same data and seed; on the CPU.

    It stays there, as workers that make batches cannot use a GPU. Of several processes the first one trains.
    """
    from ...baselines import SASRec, SASRecConfig, train_sasrec
    from ...baselines.sasrec_training import identity

    key = json.dumps(identity(data, SASRecConfig(), seed), sort_keys=True)
    folder = cache / "sasrec" / hashlib.sha256(key.encode()).hexdigest()[:32]
    together = dist.is_available() and dist.is_initialized()
    if not (folder / "sasrec.json").is_file() and (not together or dist.get_rank() == 0):
        train_sasrec(data, seed=seed, progress=progress, folder=folder)
    if together:
        dist.barrier()
    return SASRec.load(folder)


def known_vectors(id_model, sequences: UserSequences, split: Split) -> Tensor:
    """(N, d) an ID model's item vectors; NaN where it has learned nothing of the item.

    SASRec has a vector of every item: those without a training event are what they were drawn as, but for having been
    everyone's negatives.
    """
    from ...baselines import SASRec

    vectors = id_model.item_vectors()
    if not isinstance(id_model, SASRec):
        return vectors
    never = split.training_counts(sequences, len(vectors)) == 0
    return vectors.masked_fill(torch.from_numpy(never)[:, None], torch.nan)


def save_id_model(model, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder)
    write_atomically(folder / KIND_FILE, json.dumps({"kind": getattr(model, "kind", "sasrec")}) + "\n")


def load_id_model(folder: Path):
    """What `save_id_model` wrote; ConfigError if it is not there."""
    try:
        kind = json.loads((folder / KIND_FILE).read_text(encoding="utf-8"))["kind"]
    except (OSError, json.JSONDecodeError, KeyError):
        raise ConfigError(f"{folder}: holds no ID model ({KIND_FILE} is missing); save the model again") from None
    if kind == "sasrec":
        from ...baselines import SASRec

        return SASRec.load(folder)
    from safetensors.torch import load_file

    return (Als if kind == "als" else MeanOfItems)(load_file(folder / VECTORS_FILE)["vectors"])
