"""From windows of events to one typed batch: prompts, pairs, keys and target texts.

A prompt reads ``[instruction] [query] [item] ... [item] [EMB] [target text]``. The prompts of a chunk stand side by
side in one stream without padding; a batch has one chunk or, to save memory, several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..config import ConfigError, KarmaConfig
from .flat import spans
from .packing import EMB, TEXT, OfTensors, Packed, TextTargets
from .schema import Items, Sequences, Split
from .tokens import TokenTexts, tokenised
from .words import words_of

LATEST = 10  # items of a history that the mean of the latest ones looks at
TITLE_WIDTH = 24  # of an item in a prompt's labels
QUERY_TEMPLATE = " Now the user searches for: {}."
KEPT_QUERIES = 65_536  # whose tokens are kept


@dataclass
class Words(OfTensors):
    """The words of P queries, one query after the other."""

    index: Tensor  # (n,) int64 numbers in the vocabulary
    starts: Tensor  # (P,) int64, where each query's begin


@dataclass
class PromptChunk(OfTensors):
    """B prompts that the language model reads together. Index tensors are int64."""

    tokens: Packed  # slot of an item: row of history_items
    history_items: Tensor  # (R,) distinct rows of the features
    emb: Tensor  # (B,) places of [EMB] in the stream
    pairs: Tensor  # (P,) places in the stream where the query of each pair is read
    latest: Tensor  # (P, LATEST) rows of history_items that each query has seen, the newest first; -1 for none
    texts: TextTargets
    words: Words | None = None  # of the pairs' queries; None where queries have no vectors
    bare: PromptChunk | None = None  # the same without the texts, for a pass that only wants the pairs' queries


@dataclass
class DecodeChunk(OfTensors):
    """S texts that the decoder reads together, each behind the soft tokens made from one interest embedding."""

    pairs: Tensor  # (S,) whose embedding
    tokens: Packed  # slot of soft token k of text s: s * num_soft_tokens + k
    texts: TextTargets


class StepBatch(OfTensors):
    """Mixed into a recipe's batch: what transformers' Trainer asks of one. ``prompts``: its chunks."""

    def __contains__(self, name: str) -> bool:
        return any(name == f.name for f in dataclasses.fields(self))

    def __getitem__(self, name: str):
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)


@dataclass
class KarmaBatch(StepBatch):
    """The prompts of a step in chunks, its P query-target pairs and N >= P keys. Index tensors are int64."""

    prompts: list[PromptChunk]  # the pairs of all of them, one chunk after the other, are the batch's
    key_items: Tensor  # (U,) distinct rows of the features
    key_index: Tensor  # (N,) place in key_items: of the P positives, then of hard negatives
    keys: Tensor  # (N,) catalogue indices; key_items[key_index] are their rows of the features
    key_users: Tensor  # (N,) whose target a key is; -1 of hard negatives, but for targets of the same window
    log_q: Tensor | None  # (N,) float32
    decode_pairs: Tensor  # (S,) pairs that L_rec and L_vis look at
    decode: list[DecodeChunk]  # their target texts, for L_rec
    num_texts: float  # windows whose target L_gen writes, in expectation: the divisor of its sum
    num_decoded: float  # pairs that L_rec and L_vis look at, in expectation: their divisor
    num_tokens: int  # read by the language model; on the host, so that logging needs no sync

    def __len__(self) -> int:
        return sum(len(chunk.emb) for chunk in self.prompts)


class Prompts:
    """Turns histories, queries and target texts into streams of tokens.

    words: the vocabulary of queries that have vectors, see `karma_fast.data.words.vocabulary`.
    """

    def __init__(self, config: KarmaConfig, tokenizer, texts: Sequence[str], words: dict[str, int] | None = None
                 ) -> None:
        self.config, self.tokenizer, self.words = config, tokenizer, words
        self.instruction = tokenizer(config.instruction)["input_ids"] if config.instruction else []
        eos = tokenizer.eos_token_id
        if self.instruction and self.instruction[-1] == eos:  # some tokenizers close every text
            self.instruction = self.instruction[:-1]
        self._end = [] if eos is None else [eos]
        self._untokenised = texts
        self._queries: dict[str, tuple[list[int], list[int]]] = {}

    @cached_property
    def texts(self) -> TokenTexts:
        """Of the items, made when first asked for: requests are encoded without."""
        limit = self.config.max_text_tokens - len(self._end)
        found = tokenised(self.tokenizer, (t for t in self._untokenised if t), add_special_tokens=False)
        texts = TokenTexts([*next(found)[:limit], *self._end] if t else [] for t in self._untokenised)
        self._untokenised = ()  # no other process needs to be sent them
        return texts

    def length(self, history: np.ndarray) -> int:
        """Tokens of a prompt without its query and text."""
        return len(self.instruction) + len(history) + 1

    def query_ids(self, query: str) -> list[int]:
        return self._query(query)[0]

    def _query(self, query: str) -> tuple[list[int], list[int]]:
        """Tokens of a query, and its words' numbers in the vocabulary; kept, as searches come again."""
        if not query:
            return [], []
        if query not in self._queries:
            if len(self._queries) == KEPT_QUERIES:
                self._queries.clear()
            ids = self.tokenizer(QUERY_TEMPLATE.format(query), add_special_tokens=False)["input_ids"]
            known = self.words or {}
            self._queries[query] = (ids[:self.config.max_query_tokens],
                                    [known[word] for word in words_of(query) if word in known])
        return self._queries[query]

    def _words(self, queries: Sequence[str]) -> Words | None:
        if self.words is None:
            return None
        found = [self._query(query)[1] for query in queries]
        lengths = np.array([len(part) for part in found], dtype=np.int64)
        index = np.fromiter((n for part in found for n in part), np.int64, int(lengths.sum()))
        return Words(torch.from_numpy(index), torch.from_numpy(np.cumsum(lengths) - lengths))

    def _text(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) catalogue indices, -1 for none -> (n,) lengths of their texts and all their tokens."""
        if (items < 0).all():
            return np.zeros(len(items), np.int64), np.zeros(0, np.int64)
        lengths = np.where(items < 0, 0, self.texts.lengths[items])
        return lengths, self.texts.ids[spans(self.texts.starts[items], lengths)].astype(np.int64)

    def build(self, histories: Sequence[np.ndarray], queries: Sequence[str], text_items: np.ndarray | None = None
              ) -> PromptChunk:
        """Prompts of requests; every one has a pair, read at its [EMB].

        Args:
            histories: rows of the features, oldest first. queries: texts, "" for none.
            text_items: of each prompt, the item whose text follows [EMB]; -1 or None for no text.
        """
        rows = len(queries)
        text_items = np.full(rows, -1) if text_items is None else text_items
        heads = [self.instruction + self.query_ids(q) for q in queries]
        head = np.array([len(h) for h in heads], dtype=np.int64)
        seen = np.array([len(h) for h in histories], dtype=np.int64)
        text, text_tokens = self._text(text_items)
        lengths = head + seen + 1 + text
        starts = np.cumsum(lengths) - lengths
        emb = starts + head + seen
        token_ids, slots = np.zeros(int(lengths.sum()), np.int64), np.full(int(lengths.sum()), TEXT, np.int64)
        token_ids[spans(starts, head)] = np.fromiter((i for h in heads for i in h), np.int64, int(head.sum()))
        token_ids[spans(emb + 1, text)] = text_tokens
        items, slots[spans(starts + head, seen)] = np.unique(
            np.concatenate([np.zeros(0, np.int64), *histories]).astype(np.int64), return_inverse=True)
        slots[emb] = EMB
        emb_places = torch.from_numpy(emb)
        return PromptChunk(Packed.of(lengths, token_ids, slots), torch.from_numpy(items), emb_places, emb_places,
                           latest_rows(slots, emb - 1, seen), text_targets(emb, text, text_tokens),
                           self._words(queries))

    def labels(self, history: np.ndarray, query: str, items: Items) -> list[str]:
        """A name for each position of a request's prompt; long titles are cut.

        >>> from types import SimpleNamespace as Fake
        >>> prompts = Fake(instruction=[7, 8], query_ids=lambda query: [], config=Fake(max_history=20),
        ...                tokenizer=Fake(decode=lambda ids: {7: "Chosen", 8: ":"}[ids[0]]))
        >>> Prompts.labels(prompts, [0, 1], "", Fake(titles=["tea", ""], ids=["a", "b"]))
        ['Chosen', ':', 'tea', 'b', '[EMB]']
        """
        tokens = [self.tokenizer.decode([i]).replace("\n", "⏎").strip() or "␣"
                  for i in self.instruction + self.query_ids(query)]
        titles = [items.titles[i] or str(items.ids[i])
                  for i in np.asarray(history, np.int64)[-self.config.max_history:]]
        return [*tokens, *(t if len(t) <= TITLE_WIDTH else t[:TITLE_WIDTH - 1].rstrip() + "…" for t in titles),
                "[EMB]"]

    def decode_chunk(self, pairs: np.ndarray, items: np.ndarray) -> DecodeChunk:
        """The texts of (S,) items behind the soft tokens of as many pairs' embeddings."""
        soft = self.config.num_soft_tokens
        text, text_tokens = self._text(items)
        lengths = text + soft
        starts = np.cumsum(lengths) - lengths
        token_ids, slots = np.zeros(int(lengths.sum()), np.int64), np.full(int(lengths.sum()), TEXT, np.int64)
        token_ids[spans(starts + soft, text)] = text_tokens
        slots[spans(starts, np.full(len(items), soft))] = np.arange(len(items) * soft)
        # the last soft token predicts the first token of the text
        return DecodeChunk(torch.from_numpy(pairs), Packed.of(lengths, token_ids, slots),
                           text_targets(starts + soft - 1, text, text_tokens))


def text_targets(starts: np.ndarray, lengths: np.ndarray, tokens: np.ndarray) -> TextTargets:
    """Texts of (S,) lengths whose first tokens are predicted at ``starts``; tokens: of all texts."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    weights = np.repeat(1 / np.maximum(lengths, 1), lengths).astype(np.float32)
    return TextTargets(*map(torch.from_numpy, (spans(starts, lengths), tokens, rows, weights)))


def query_of(sequences: Sequences, position: int) -> str:
    """The query of the event at a flat position, "" for none."""
    if sequences.queries is None or sequences.queries[position] < 0:
        return ""
    return sequences.query_texts[sequences.queries[position]]


def request(sequences: Sequences, position: int, max_history: int) -> tuple[np.ndarray, str]:
    """(history, query) of the request whose target is the event at a flat position."""
    return sequences.history(position, max_history), query_of(sequences, position)


def log_sampling_probability(sequences: Sequences, split: Split, num_items: int) -> np.ndarray:
    """(N,) float32: log of each item's share of the training events; items without one count as one event."""
    counts = split.training_counts(sequences, num_items)
    return np.log(np.maximum(counts, 1) / max(1, counts.sum())).astype(np.float32)


class KarmaCollator:
    """Windows (start, end) of flat events -> `KarmaBatch`. Stateless: the same windows give the same batch.

    chunk_size: windows that the language model reads at once; None: all of a batch. first_rows: (U,) what is added to
    the catalogue indices of a user's window to have rows of the features; None: nothing.
    """

    def __init__(self, config: KarmaConfig, prompts: Prompts, sequences: Sequences, log_q: np.ndarray | None,
                 max_hard_negatives: int = 8, seed: int = 0, chunk_size: int | None = None,
                 first_rows: np.ndarray | None = None) -> None:
        if config.positions == "all" and sequences.queries is not None:
            raise ConfigError("model.positions: got all, but the data has queries, and an inner position would read "
                              "the query of a later request; set model.positions last, or data.query_column false")
        self.config, self.prompts, self.sequences, self.log_q = config, prompts, sequences, log_q
        self.max_hard_negatives, self.seed, self.chunk_size = max_hard_negatives, seed, chunk_size
        self.first_rows = first_rows

    def __call__(self, windows: Sequence[tuple[int, int]]) -> KarmaBatch:
        starts, ends = np.array(windows, dtype=np.int64).T
        events = self.sequences.items
        # with positions="all" every event of a window but its first is a target
        targets = ends - starts - 1 if self.config.positions == "all" else np.ones(len(ends), np.int64)
        positions = spans(ends - targets, targets)
        positives = events[positions].astype(np.int64)
        looked_at = np.ones(len(ends), bool)
        if self.config.decode_share < 1:
            looked_at = np.array([self._random(*window).random() < self.config.decode_share
                                  for window in zip(starts.tolist(), ends.tolist(), strict=True)])
        hard = list(self._hard_negatives(positions))
        keys = np.concatenate([positives, *hard])
        users = self.sequences.user_of(starts)
        pair_of = np.concatenate([np.arange(len(positives)),
                                  np.repeat(np.arange(len(positives)), [len(h) for h in hard] or 0)])
        key_users = np.repeat(users, targets)[pair_of]
        # shown and not chosen, but chosen elsewhere in the window: a target of its user like any other; in the window,
        # as the other windows of the batch may be another process's
        in_window = np.repeat(np.arange(len(ends)), targets)[pair_of] * (keys.max() + 1) + keys
        key_users[len(positives):][~np.isin(in_window[len(positives):], in_window[:len(positives)])] = -1
        first = np.zeros(len(users), np.int64) if self.first_rows is None else self.first_rows[users]
        key_items, key_index = np.unique(keys + np.repeat(first, targets)[pair_of], return_inverse=True)
        pairs = self._decode_pairs(starts, ends, targets, looked_at)
        with_text = pairs if self.config.weight("rec") > 0 else pairs[:0]
        decode = [self.prompts.decode_chunk(part, positives[part]) for part in self._parts(with_text)]
        parts = self._parts(np.arange(len(ends)))
        prompts = [self._prompts(starts[part], ends[part], first[part], targets[part], looked_at[part],
                                 len(parts) > 1) for part in parts]
        return KarmaBatch(
            prompts, *map(torch.from_numpy, (key_items, key_index, keys, key_users)),
            None if self.log_q is None else torch.from_numpy(self.log_q[keys]), torch.from_numpy(pairs), decode,
            num_texts=len(ends) * self.config.decode_share,
            num_decoded=float(np.minimum(targets, self.config.decode_positions).sum()) * self.config.decode_share,
            num_tokens=sum(len(chunk.tokens.token_ids) for chunk in [*prompts, *decode]))

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """At most ``chunk_size`` rows each, and all of nearly the same size."""
        return np.array_split(rows, -(-len(rows) // (self.chunk_size or max(1, len(rows))))) if len(rows) else []

    def _prompts(self, starts: np.ndarray, ends: np.ndarray, first: np.ndarray, targets: np.ndarray,
                 looked_at: np.ndarray, with_bare: bool) -> PromptChunk:
        events = self.sequences.items
        histories = [events[start:end - 1] + row for start, end, row in zip(starts, ends, first, strict=True)]
        queries = [query_of(self.sequences, end - 1) for end in ends]
        texts = np.where(looked_at & (self.config.weight("gen") > 0), events[ends - 1], -1)
        chunk = with_pairs(self.prompts.build(histories, queries, texts), histories, targets)
        if with_bare and len(chunk.texts):
            chunk.bare = with_pairs(self.prompts.build(histories, queries), histories, targets)
        return chunk

    def _decode_pairs(self, starts: np.ndarray, ends: np.ndarray, targets: np.ndarray,
                      looked_at: np.ndarray) -> np.ndarray:
        """The last pair of each window, which serving reads, and further ones drawn by the window alone."""
        if self.config.weight("rec") == 0 and self.config.weight("vis") == 0:
            return np.zeros(0, np.int64)
        lasts = np.cumsum(targets) - 1
        if self.config.decode_positions == 1:
            return lasts[looked_at]
        drawn = []
        for start, end, inner, last in zip(*(x[looked_at].tolist() for x in (starts, ends, targets - 1, lasts)),
                                           strict=True):
            extra = min(self.config.decode_positions - 1, inner)
            if extra > 0:
                drawn.append(last - inner + np.sort(self._random(start, end, 1).choice(inner, extra, replace=False)))
            drawn.append(np.array([last]))
        return np.concatenate([np.zeros(0, np.int64), *drawn])

    def _random(self, *key: int) -> np.random.Generator:
        """Depends on the window alone, so a resumed or repeated epoch draws the same."""
        return np.random.default_rng((self.seed, *key))

    def _hard_negatives(self, positions: Sequence[int]) -> Iterator[np.ndarray]:
        indptr, negatives = self.sequences.negatives_indptr, self.sequences.negatives
        if indptr is not None and negatives is not None:
            for p in positions:
                yield negatives[indptr[p]:indptr[p + 1]][-self.max_hard_negatives:].astype(np.int64)


def with_pairs(chunk: PromptChunk, histories: Sequence[np.ndarray], targets: np.ndarray) -> PromptChunk:
    """Reads the queries of each prompt's last (B,) ``targets``: at the item before each, the last at [EMB].

    So serving reads too, and nothing is read at the last item.
    """
    places = spans(chunk.emb.numpy() - targets, targets)  # of the newest item that each has seen
    number = spans(np.zeros_like(targets), targets)
    seen = np.repeat(np.array([len(h) for h in histories], np.int64) - targets, targets) + number + 1
    chunk.latest = latest_rows(chunk.tokens.slots.numpy(), places, seen)
    places[np.cumsum(targets) - 1] += 1
    chunk.pairs = torch.from_numpy(places)
    return chunk


def latest_rows(slots: np.ndarray, places: np.ndarray, seen: np.ndarray) -> Tensor:
    """(P, LATEST) slots of the items at (P,) ``places`` of a stream and before, as many as (P,) ``seen``; else -1.

    >>> latest_rows(np.array([-1, 4, 2]), np.array([2]), np.array([2]))[0, :3]
    tensor([ 2,  4, -1])
    """
    ages = np.arange(LATEST)
    rows = slots[np.maximum(places[:, None] - ages, 0)]
    return torch.from_numpy(np.where(ages < seen[:, None], rows, -1))
