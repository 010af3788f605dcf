"""Hybrid prompts: places for injected vectors, then text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...data.batches import QUERY_TEMPLATE, StepBatch, query_of
from ...data.flat import spans
from ...data.packing import EMB, TEXT, OfTensors, Packed
from ...data.schema import Items
from ...data.schema import Sequences as UserSequences
from ...data.tokens import TokenTexts, tokenised
from .config import RaRecConfig

CLOSING = " Next:"  # the state is read at its last token, of requests and items alike


@dataclass
class HybridChunk(OfTensors):
    """S prompts that the language model reads together, of requests or of items. Index tensors are int64."""

    tokens: Packed  # slot of a title's token: the place of its item in the history
    places: Tensor  # (S * reserved,) of the stream, for injected vectors
    vectors: Tensor  # (S, d) float32 ID vectors, NaN where there is none
    pairs: Tensor  # (S,) the last token of each prompt
    of_items: bool
    text: Packed  # the same prompts without the reserved places
    owner: Tensor  # (tokens of text,) the prompt of each
    bare: None = None  # for `karma_fast.step`: no text follows these prompts

    @property
    def emb(self) -> Tensor:
        return self.pairs


@dataclass
class RaRecBatch(StepBatch):
    """The prompts of a step in chunks: those of B requests, then those of U distinct items."""

    prompts: list[HybridChunk]
    labels: Tensor  # (B,) the positive among the items
    keys: Tensor  # (U,) catalogue indices
    num_tokens: int  # read by the language model, with and without injection; on the host

    def __len__(self) -> int:
        return len(self.labels)


class HybridPrompts:
    """Turns requests and items into prompts; ``reserved`` places stand before the text of each."""

    def __init__(self, config: RaRecConfig, tokenizer, items: Items, id_model, item_vectors: Tensor) -> None:
        self.config, self.tokenizer, self.id_model = config, tokenizer, id_model
        self.reserved = config.num_context_tokens + 1
        self.item_vectors = item_vectors
        self.instruction = self._ids(config.instruction)
        self.closing = self._ids(CLOSING)
        self._untokenised = {"titles": items.titles, "texts": items.texts}

    @cached_property
    def titles(self) -> TokenTexts:
        """Of the items as they stand in a history, made when first asked for."""
        limit = self.config.max_title_tokens
        found = self._all(f" {title};" if title else "" for title in self._untokenised["titles"])
        titles = TokenTexts(ids[:limit] for ids in found)
        del self._untokenised["titles"]  # no other process needs to be sent them
        return titles

    @cached_property
    def item_texts(self) -> TokenTexts:
        """The texts of the items' own prompts, made when first asked for."""
        head, limit = self._ids(self.config.item_instruction), self.config.max_text_tokens
        found = self._all(f" {text}" if text else "" for text in self._untokenised["texts"])
        # read at the token that requests are read at: the state of another one says first of all which token it is
        texts = TokenTexts([*head, *ids[:limit], *self.closing] for ids in found)
        del self._untokenised["texts"]
        return texts

    @property
    def item_lengths(self) -> np.ndarray:
        """(N,) int64 tokens of the items' prompts."""
        return self.reserved + self.item_texts.lengths

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        return tokenised(self.tokenizer, texts, add_special_tokens=False)

    def length(self, history: np.ndarray) -> int:
        """Tokens of a request's prompt without its query."""
        return (self.reserved + len(self.instruction) + int(self.titles.lengths[history].sum()) + len(self.closing))

    def query_ids(self, query: str) -> list[int]:
        return self._ids(QUERY_TEMPLATE.format(query))[:self.config.max_query_tokens] if query else []

    def build(self, histories: Sequence[np.ndarray], queries: Sequence[str]) -> HybridChunk:
        """Prompts of requests. histories: catalogue indices, oldest first. queries: texts, "" for none."""
        ids, slots = [], []
        for history, query in zip(histories, queries, strict=True):
            titles = [self.titles[i] for i in history]
            tail = self.query_ids(query) + self.closing
            ids.append([*self.instruction, *(t for title in titles for t in title), *tail])
            slots.append([*[TEXT] * len(self.instruction),
                          *(n for n, title in enumerate(titles) for _ in title), *[TEXT] * len(tail)])
        vectors = self.id_model.user_vectors(histories)
        vectors[[not len(history) for history in histories]] = torch.nan  # SASRec gives zeros
        return self._chunk(ids, slots, vectors, False)

    def of_items(self, items: np.ndarray) -> HybridChunk:
        """Prompts of (n,) catalogue indices."""
        ids = [self.item_texts[i] for i in items]
        return self._chunk(ids, [[TEXT] * len(t) for t in ids], self.item_vectors[torch.from_numpy(items)], True)

    def _chunk(self, ids: list[list[int]], slots: list[list[int]], vectors: Tensor, of_items: bool) -> HybridChunk:
        text = np.array([len(row) for row in ids], dtype=np.int64)
        flat_ids = np.fromiter((i for row in ids for i in row), np.int64, int(text.sum()))
        flat_slots = np.fromiter((i for row in slots for i in row), np.int64, int(text.sum()))
        lengths = text + self.reserved
        starts = np.cumsum(lengths) - lengths
        token_ids, all_slots = np.zeros(int(lengths.sum()), np.int64), np.full(int(lengths.sum()), EMB, np.int64)
        behind = spans(starts + self.reserved, text)
        token_ids[behind], all_slots[behind] = flat_ids, flat_slots
        places = spans(starts, np.full(len(ids), self.reserved))
        owner = np.repeat(np.arange(len(ids)), text)
        return HybridChunk(Packed.of(lengths, token_ids, all_slots), torch.from_numpy(places), vectors,
                           torch.from_numpy(starts + lengths - 1), of_items, Packed.of(text, flat_ids, flat_slots),
                           torch.from_numpy(owner))

    def labels(self, history: np.ndarray, query: str, items: Items) -> list[str]:
        """A name for each position of a request's prompt."""
        titles = [t for i in history[-self.config.max_history:] for t in self.titles[i]]
        tokens = [*self.instruction, *titles, *self.query_ids(query), *self.closing]
        return [*(f"[c{n + 1}]" for n in range(self.reserved - 1)), "[user]",
                *(self.tokenizer.decode([i]).replace("\n", "⏎").strip() or "␣" for i in tokens)]


class RaRecCollator:
    """Windows (start, end) of flat events -> `RaRecBatch`: the last event of each is the target.

    chunk_size: prompts that the language model reads at once; None: all requests, then all items. seed: of the
    negatives that are drawn; the same windows have the same ones.
    """

    def __init__(self, prompts: HybridPrompts, sequences: UserSequences, chunk_size: int | None = None,
                 seed: int = 0) -> None:
        self.prompts, self.sequences, self.chunk_size, self.seed = prompts, sequences, chunk_size, seed

    def __call__(self, windows: Sequence[tuple[int, int]]) -> RaRecBatch:
        events, longest = self.sequences.items, self.prompts.config.max_history
        histories = [events[max(start, end - 1 - longest):end - 1] for start, end in windows]
        queries = [query_of(self.sequences, end - 1) for _, end in windows]
        targets = np.array([events[end - 1] for _, end in windows], dtype=np.int64)
        drawn = np.random.default_rng((self.seed, *np.ravel(windows))).integers(
            len(self.prompts.item_texts), size=self.prompts.config.num_negatives)
        keys = np.unique(np.concatenate([targets, drawn]))
        labels = np.searchsorted(keys, targets)
        prompts = [self.prompts.build([histories[i] for i in part], [queries[i] for i in part])
                   for part in self._parts(len(windows))]
        prompts += [self.prompts.of_items(keys[part]) for part in self._parts(len(keys))]
        read = [chunk.tokens for chunk in prompts]
        if self.prompts.config.align_weight > 0:
            read += [chunk.text for chunk in prompts]
        return RaRecBatch(prompts, torch.from_numpy(labels), torch.from_numpy(keys),
                          sum(len(packed.token_ids) for packed in read))

    def _parts(self, count: int) -> list[np.ndarray]:
        return np.array_split(np.arange(count), -(-count // (self.chunk_size or count)))
