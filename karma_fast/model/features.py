"""Frozen item features: text vectors from the language model, cached on disk, and their side by side with others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data.tokens import TokenTexts, tokenised
from .backbone import adapters_off, causal_lm

KINDS = ("text", "words", "image", "id")


def empty_vectors(texts: Sequence[str], backbone: nn.Module) -> np.ndarray:
    """(N, hidden) float32 of NaN."""
    return np.full((len(texts), causal_lm(backbone).config.get_text_config().hidden_size), np.nan, np.float32)


@torch.no_grad()
def encode_texts(texts: Sequence[str], backbone: nn.Module, tokenizer, instruction: str = "", max_tokens: int = 128,
                 batch_tokens: int = 4096, progress: bool = False, out: np.ndarray | None = None) -> np.ndarray:
    """(N, hidden) float32: mean of the untuned model's last states over a text's tokens; NaN rows for empty texts.

    Args:
        out: (N, hidden) float32 to fill, row by row; batches that have no NaN are left as they are.
    """
    from tqdm.auto import tqdm

    model = causal_lm(backbone)
    device = model.device
    head = tokenizer(instruction, add_special_tokens=False)["input_ids"] if instruction else []
    rows = TokenTexts((head + ids)[:max_tokens] for ids in tokenised(tokenizer, (t or "-" for t in texts)))
    order = sorted((i for i, t in enumerate(texts) if t), key=rows.lengths.__getitem__)
    if out is None:
        out = empty_vectors(texts, backbone)
    training = backbone.training
    backbone.eval()
    bar = tqdm(total=len(order), desc="encoding item texts", unit="item", disable=not progress)
    start = 0
    with adapters_off(backbone):
        while start < len(order):  # sorted by length, so a batch wastes little on padding
            stop = start + 1
            while stop < len(order) and (stop - start + 1) * rows.lengths[order[stop]] <= batch_tokens:
                stop += 1
            batch = order[start:stop]
            if np.isnan(out[batch]).any():
                lengths = torch.from_numpy(rows.lengths[batch]).to(device)
                width = int(lengths.max())
                ids = torch.tensor([rows[i] + [0] * (width - int(rows.lengths[i])) for i in batch], device=device)
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
                column = torch.arange(width, device=device)
                keep = (column < lengths[:, None]) & (column >= len(head) if width > len(head) else True)
                mean = (hidden * keep[..., None]).sum(dim=1) / keep.sum(dim=1, keepdim=True)
                out[batch] = mean.cpu().numpy()
            bar.update(len(batch))
            start = stop
    bar.close()
    backbone.train(training)
    return out


def cached_text_vectors(texts: Sequence[str], backbone: nn.Module, tokenizer, key: str, cache: Path,
                        instruction: str = "", progress: bool = True) -> np.ndarray:
    """`encode_texts`, kept under ``cache`` by model (``key``) and texts; what was done when it stopped is kept too."""
    digest = hashlib.sha256("\x1f".join([key, instruction, *texts]).encode()).hexdigest()[:32]
    path = cache / "text-vectors" / f"{digest}.npy"
    if path.exists():
        return np.load(path, allow_pickle=False)
    begun = path.with_name(f"{digest}.begun.npy")
    vectors = np.load(begun, allow_pickle=False) if begun.exists() else empty_vectors(texts, backbone)
    try:
        encode_texts(texts, backbone, tokenizer, instruction, progress=progress, out=vectors)
    except BaseException:  # Ctrl-C too
        if not np.isnan(vectors).all():
            _save(vectors, begun)
        raise
    _save(vectors, path)
    begun.unlink(missing_ok=True)
    return vectors


def _save(vectors: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.part-{os.getpid()}.npy")
    np.save(part, vectors)
    part.replace(path)


class ItemFeatures(nn.Module):
    """z_i: the vectors an item has, side by side, each kind centred and scaled to a mean square norm of 1.

    Args:
        vectors: for some of ``KINDS``, an (N, d) float array with NaN rows where an item has none.
        held_out: (folds, N, d), further sets of the ID vectors, for training alone; they are not saved.
        query_words: W words that queries are made of, and their (W, d) vectors in the space of the items' "words"; see
            `karma_fast.data.words.word_vectors`. None: queries have no vectors.

    An item without a vector of a kind gets that kind's learned "missing" vector. Called with (n,) rows; gives
    (n, width) float32. A row is a catalogue index; plus ``(g + 1) * N`` it is the item with ID vectors of set g.

    Example:
        >>> features = ItemFeatures({"id": np.array([[1.0, 0.0], [0.0, 1.0], [np.nan, np.nan]])})
        >>> features(torch.tensor([2, 0])).shape, features.width
        (torch.Size([2, 2]), 2)
    """

    def __init__(self, vectors: dict[str, np.ndarray], held_out: np.ndarray | None = None,
                 query_words: tuple[Iterable[str], np.ndarray] | None = None) -> None:
        super().__init__()
        self._set_up({k: vectors[k].shape[1] for k in KINDS if k in vectors}, 0 if held_out is None else len(held_out))
        for kind in self.kinds:
            array = np.asarray(vectors[kind], dtype=np.float32)
            present = ~np.isnan(array).any(axis=1)
            known = array[present]  # a copy, which is worked on in place, as tables are large
            # ID vectors keep their origin: their inner products are the co-occurrences
            mean = known.mean(axis=0) if kind != "id" and len(known) else np.zeros(array.shape[1], np.float32)
            known -= mean
            np.square(known, out=known)
            scale = 1 / max(float(np.sqrt(known.sum(axis=1).mean())) if len(known) else 1.0, 1e-6)
            del known
            if kind == "id" and held_out is not None:
                rows = np.concatenate([array, *held_out], dtype=np.float32)
                present = ~np.isnan(rows).any(axis=1)
                rows -= mean
            else:
                rows = array - mean
            rows *= scale
            rows[~present] = 0
            self.register_buffer(kind, torch.from_numpy(rows), persistent=False)
            self.register_buffer(f"{kind}_present", torch.from_numpy(present), persistent=False)
            self.register_buffer(f"{kind}_mean", torch.from_numpy(mean), persistent=False)
            self.register_buffer(f"{kind}_scale", torch.tensor(scale, dtype=torch.float32), persistent=False)
        words, of_words = ((), None) if query_words is None else query_words
        self.register_buffer("query_words", None if of_words is None else torch.from_numpy(of_words), persistent=False)
        # kept with the vectors that they number: UTF-8, a word a line
        spelled = np.frombuffer("\n".join(words).encode(), np.uint8).copy()
        self.register_buffer("query_spelling", None if of_words is None else torch.from_numpy(spelled),
                             persistent=False)

    def _set_up(self, widths: dict[str, int], folds: int) -> None:
        """All but the buffers."""
        self.kinds, self.widths, self.folds = list(widths), widths, folds
        if not self.kinds:
            raise ValueError("items have no features: give texts, image vectors or ID vectors (model.id_dim above 0)")
        self.missing = nn.ParameterDict({k: nn.Parameter(torch.zeros(widths[k])) for k in self.kinds})

    @property
    def width(self) -> int:
        return sum(self.widths.values())

    def __len__(self) -> int:
        kind = self.kinds[0]
        return len(getattr(self, kind)) // (1 + self.folds if kind == "id" else 1)

    @property
    def vocabulary(self) -> dict[str, int] | None:
        """Rows of ``query_words`` by word; None where queries have no vectors."""
        if self.query_spelling is None:
            return None
        return {word: n for n, word in enumerate(self.query_spelling.cpu().numpy().tobytes().decode().split("\n"))}

    def columns(self, kind: str) -> slice:
        """Where a kind's vectors stand in z."""
        start = sum(self.widths[k] for k in self.kinds[:self.kinds.index(kind)])
        return slice(start, start + self.widths[kind])

    def known(self, kind: str, most: int | None = None) -> Tensor:
        """(n, d) vectors of the catalogue's items that have one; most: of the first so many of these, None for all."""
        rows = getattr(self, f"{kind}_present")[:len(self)].nonzero()[:most, 0]
        return getattr(self, kind)[rows]

    def block(self, kind: str, rows: Tensor) -> Tensor:
        if self.folds and kind != "id":
            rows = rows % len(self)
        return torch.where(getattr(self, f"{kind}_present")[rows][:, None], getattr(self, kind)[rows],
                           self.missing[kind])

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([self.block(kind, rows) for kind in self.kinds], dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` needs to make the same features again, for safetensors; held-out sets are left out."""
        return {name: (buffer[:len(self)] if name in ("id", "id_present") else buffer).cpu().contiguous()
                for name, buffer in self.named_buffers()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> ItemFeatures:
        """The inverse of `tensors`; learned missing vectors come with the model's weights."""
        features = cls.__new__(cls)  # the vectors are centred and scaled already
        nn.Module.__init__(features)
        features._set_up({kind: tensors[kind].shape[1] for kind in KINDS if kind in tensors}, 0)
        for name, value in ({"query_words": None, "query_spelling": None} | tensors).items():
            features.register_buffer(name, value, persistent=False)
        return features
