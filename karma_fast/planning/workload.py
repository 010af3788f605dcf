"""What a step is fed with, as far as memory goes: how many windows, how long, over how many items."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..config import KarmaConfig
from ..data.schema import Dataset, Items, Sequences
from ..data.words import MOST_WORDS, vocabulary

if TYPE_CHECKING:
    from ..data.batches import KarmaBatch
    from ..model.karma import KarmaModel

ASSUMED_ITEMS = 100_000
CHARACTERS_A_TOKEN = 4  # of English text, roughly


class Numbers:
    """What a workload takes from data, counted once for all settings that are looked at."""

    def __init__(self, data: Dataset) -> None:
        items, sequences = data.items, data.sequences
        self.items, self.texts = len(items), items.texts
        self.longest_text = max(map(len, items.texts), default=0)
        self.longest_training = int((data.split.train_end - sequences.indptr[:-1]).max(initial=0))
        self.widths = {kind: vectors.shape[1] for kind, vectors in (("image", items.image_vectors),
                                                                    ("id", items.id_vectors)) if vectors is not None}
        self.with_queries = sequences.queries is not None
        indptr = sequences.negatives_indptr
        self.hard_negatives = 0 if indptr is None else min(8, int(np.diff(indptr).max()))

    @cached_property
    def words(self) -> int:
        """Of the texts, that have a vector of their own."""
        return len(vocabulary(self.texts))


@dataclass
class Workload:
    """The largest a run can meet: every window, text and query as long as it can be.

    items: of the catalogue. history: items before the target. text_tokens, query_tokens, instruction_tokens: with an
    end token for texts. hard_negatives: of each pair. widths: of an item's vectors by kind. id_folds: further sets of
    ID vectors. query_words: that have vectors.
    """

    items: int
    history: int
    text_tokens: int
    query_tokens: int
    instruction_tokens: int
    hard_negatives: int
    widths: dict[str, int]
    id_folds: int = 0
    query_words: int = 0

    @classmethod
    def of(cls, config: KarmaConfig, hidden: int, data: Dataset | Numbers | None = None, tokenizer=None
           ) -> Workload:
        """From the settings, and from the data where there is some; else every limit of the settings is met."""
        if tokenizer is not None and config.instruction:
            instruction = len(tokenizer(config.instruction)["input_ids"])
        else:
            instruction = -(-len(config.instruction) // CHARACTERS_A_TOKEN)
        of_texts = {"text": hidden, "words": config.word_dim}
        widths = {kind: of_texts[kind] for kind in config.text_kinds} | {"image": 0, "id": config.id_dim}
        with_words = config.query_shortcut and "words" in config.text_kinds
        if data is None:
            queries = config.positions == "last"
            return cls(ASSUMED_ITEMS, config.max_history, config.max_text_tokens,
                       config.max_query_tokens if queries else 0, instruction, 0,
                       {kind: width for kind, width in widths.items() if width},
                       config.id_folds if config.id_dim else 0, MOST_WORDS if queries and with_words else 0)
        data = data if isinstance(data, Numbers) else Numbers(data)
        widths |= data.widths
        if not data.longest_text:
            widths |= dict.fromkeys(config.text_kinds, 0)
        # the longest window is of the user with most events to train on
        return cls(data.items, max(1, min(config.max_history, data.longest_training - 1)),
                   min(config.max_text_tokens, data.longest_text + 1),  # a token has at least one character
                   config.max_query_tokens if data.with_queries else 0, instruction, data.hard_negatives,
                   {kind: width for kind, width in widths.items() if width},
                   config.id_folds if config.id_dim and "id" not in data.widths else 0,
                   data.words if data.with_queries and with_words else 0)

    def applied(self, config: KarmaConfig) -> KarmaConfig:
        """The settings under which the batches below have this workload's lengths."""
        return dataclasses.replace(config, instruction="x" * self.instruction_tokens, query_dropout=0.0,
                                   max_query_tokens=self.query_tokens, max_text_tokens=max(1, self.text_tokens))

    def two_rows(self) -> dict[str, np.ndarray]:
        return {kind: np.eye(2, width, dtype=np.float32) for kind, width in self.widths.items()}

    def catalogue(self, batch_size: int) -> Items:
        """The items that a batch can hold."""
        count = min(self.items, batch_size * (self.history + 1) * (1 + self.hard_negatives))
        text = "x" * max(0, self.text_tokens - 1)  # and the end
        return Items(np.arange(count).astype(object), [text] * count, [""] * count)

    def batch(self, model: KarmaModel, batch_size: int, chunk_size: int | None) -> KarmaBatch:
        """What the collator makes of ``batch_size`` windows of different items."""
        length, count = self.history + 1, len(model.items)
        events = batch_size * length
        sequences = Sequences(np.arange(batch_size).astype(object), np.arange(batch_size + 1) * length,
                              np.arange(events, dtype=np.int32) % count)
        if self.query_tokens:
            # the first word is the one that the model knows
            sequences.queries, sequences.query_texts = np.zeros(events, np.int32), [f"x {'x' * self.query_tokens}"]
        if self.hard_negatives:
            sequences.negatives_indptr = np.arange(events + 1) * self.hard_negatives
            sequences.negatives = np.arange(events * self.hard_negatives, dtype=np.int32)[::-1] % count
        collate = model.collator(sequences, np.zeros(count, np.float32), chunk_size=chunk_size)
        return collate([(n * length, (n + 1) * length) for n in range(batch_size)])


class Tokens:
    """Stands for a tokenizer: a token for each character."""

    eos_token_id = pad_token_id = 2

    def __call__(self, texts, **options) -> dict[str, list]:
        return {"input_ids": [1] * len(texts) if isinstance(texts, str) else [[1] * len(t) for t in texts]}
