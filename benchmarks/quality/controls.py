"""The experiment's controls: models that differ from KarmaModel in one thing, which no product needs.

Each draws its weights after those of KarmaModel, so that all start from the same ones.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from karma_fast.config import KarmaConfig
from karma_fast.data.assets import cache_dir, put_in_place
from karma_fast.data.batches import DecodeChunk, KarmaBatch, KarmaCollator, PromptChunk
from karma_fast.model.backbone import resolve_backbone
from karma_fast.model.features import ItemFeatures
from karma_fast.model.karma import KarmaModel


class _Blocked(torch.autograd.Function):
    """The identity with a gradient of zeros: a detached u would have none, which a step takes for an error."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        return torch.zeros_like(upstream)


class StopGradient(KarmaModel):
    """L_rec trains its decoder P_rec and never reaches u."""

    def reconstruction_loss(self, u: Tensor, chunk: DecodeChunk) -> Tensor:
        return super().reconstruction_loss(_Blocked.apply(u), chunk)


class NoLanguageModel(KarmaModel):
    """u from the shortcuts alone: what the same data, losses and steps give without any language model."""

    def read(self, chunk: PromptChunk, gen: bool = True) -> tuple[Tensor, Tensor]:
        states = torch.zeros(len(chunk.pairs), self.interest_projection.in_features, device=self.device)
        return self.interest(states, chunk), states.new_zeros(())


class RandomWeights(KarmaModel):
    """A language model of the same shape whose weights are drawn anew: what it read before, taken away."""

    @classmethod
    def build(cls, config: KarmaConfig, *args, cache: Path | None = None, **options) -> KarmaModel:
        folder = random_backbone(config.backbone, cache or cache_dir())
        return super().build(dataclasses.replace(config, backbone=str(folder)), *args, cache=cache, **options)


def random_backbone(name: str, cache: Path) -> Path:
    """The folder of a model of ``name``'s shape with weights as before any training, and its tokenizer.

    Drawn once and kept in ``cache``: 4-bit weights come from files, and rows with other seeds read the same ones.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = resolve_backbone(name)
    shape = AutoConfig.from_pretrained(source)
    key = hashlib.sha256(shape.to_json_string().encode()).hexdigest()[:8]
    folder = cache / "quality" / f"{Path(name).name.lower()}-random-{key}"
    if not (folder / "config.json").exists():
        torch.manual_seed(1)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as temporary:
            part = Path(temporary) / "files"
            AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(part)
            AutoTokenizer.from_pretrained(source).save_pretrained(part)
            put_in_place(part, folder, lambda done: (done / "config.json").exists())
    return folder


class ShuffledTexts(KarmaModel):
    """L_rec decodes the text of another pair's target. All else of a batch stays as it is."""

    def collator(self, *args, **kwargs) -> Callable[[Sequence[tuple[int, int]]], KarmaBatch]:
        return ShuffledCollator(super().collator(*args, **kwargs))


class ShuffledCollator:
    """Gives each batch's decoded texts to other pairs, anew in each batch, so that no fixed swap can be learned."""

    def __init__(self, collator: KarmaCollator) -> None:
        self.collator = collator

    def __call__(self, windows: Sequence[tuple[int, int]]) -> KarmaBatch:
        batch, collator = self.collator(windows), self.collator
        if not batch.decode:
            return batch
        pairs = batch.decode_pairs.numpy()
        items = batch.keys.numpy()[pairs]
        texts = [tuple(collator.prompts.texts[i]) for i in items]
        other = items[swapped(texts, np.random.default_rng((collator.seed, *windows[0], len(windows))))]
        decode, at = [], 0
        for chunk in batch.decode:
            part = slice(at, at + len(chunk.pairs))
            decode.append(collator.prompts.decode_chunk(pairs[part], other[part]))
            at = part.stop
        return dataclasses.replace(batch, decode=decode)


def swapped(values: Sequence, random: np.random.Generator) -> np.ndarray:
    """(n,) a permutation that gives no place a value equal to its own, unless more than half are equal.

    >>> swapped(["a", "b", "a", "c"], np.random.default_rng(0)).tolist()
    [1, 0, 3, 2]
    """
    # equal values side by side, moved on by the largest group of them
    names = {value: n for n, value in enumerate(dict.fromkeys(values))}
    group = np.array([names[value] for value in values], dtype=np.int64)
    order = random.permutation(len(values))
    order = order[np.argsort(random.permutation(len(names))[group[order]], kind="stable")]
    out = np.empty(len(values), dtype=np.int64)
    out[order] = np.roll(order, -int(np.bincount(group).max(initial=0)))
    return out


def without_images(features: ItemFeatures) -> ItemFeatures:
    kept = copy.deepcopy(features)
    kept.kinds.remove("image")
    del kept.widths["image"], kept.missing["image"]
    for name in ("image", "image_present", "image_mean", "image_scale"):
        delattr(kept, name)
    return kept


class ImageTargets(KarmaModel):
    """Items' image vectors are what L_vis predicts from u, and no feature of the items: only the term is added."""

    def __init__(self, config, backbone: nn.Module, tokenizer, items, features: ItemFeatures) -> None:
        super().__init__(config, backbone, tokenizer, items, without_images(features))
        for name in ("image", "image_present"):
            self.features.register_buffer(name, getattr(features, name), persistent=False)
        width = config.embedding_dim
        self.image_head = nn.Sequential(nn.Linear(width, width), nn.GELU(),
                                        nn.Linear(width, features.widths["image"]))
        self.to(self.emb_token.device)
