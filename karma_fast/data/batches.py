"""From windows of events to one typed batch: prompts, pairs, keys and target texts.

A prompt reads ``[instruction] [query] [item] ... [item] [EMB] [target text]`` and is padded on its right only. In a
causal model nothing to the right reaches a position, so no attention mask is needed, and a row's result does not
depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import ConfigError, KarmaConfig
from .schema import Sequences, Split

QUERY_TEMPLATE = " Now the user searches for: {}."


@dataclass
class KarmaBatch:
    """B prompts of width T, P query-target pairs, N >= P keys. All index tensors are int64."""

    token_ids: Tensor  # (B, T); 0 where an item, [EMB] or padding stands
    slots: Tensor  # (B, T) row of history_items for an item, -1 elsewhere
    history_items: Tensor  # (R,) distinct catalogue indices
    emb_columns: Tensor  # (B,) column of [EMB]
    pair_rows: Tensor  # (P,) where each pair's query is read
    pair_columns: Tensor  # (P,)
    keys: Tensor  # (N,) catalogue indices: the P positives, then hard negatives
    log_q: Tensor | None  # (N,) float32
    gen_rows: Tensor  # (G,) positions whose next token belongs to a target text ...
    gen_columns: Tensor  # (G,)
    gen_labels: Tensor  # (G,) ... and that token
    decode_pairs: Tensor  # (S,) pairs that L_rec and L_vis look at
    text_ids: Tensor  # (S, Y) their target texts, 0 after the end
    text_lengths: Tensor  # (S,)
    num_texts: float  # windows that the text losses look at, in expectation: the divisor of their sums
    num_tokens: int  # read by the language model, padding left out; on the host, so that logging needs no sync

    # transformers' Trainer asks these of a batch
    def __contains__(self, name: str) -> bool:
        return any(name == f.name for f in dataclasses.fields(self))

    def __getitem__(self, name: str) -> Tensor | None:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __len__(self) -> int:
        return len(self.token_ids)

    def to(self, device, **kwargs) -> KarmaBatch:
        return KarmaBatch(*(v.to(device, **kwargs) if isinstance(v, Tensor) else v for v in vars(self).values()))


class Prompts:
    """Turns histories, queries and target texts into the token part of a batch."""

    def __init__(self, config: KarmaConfig, tokenizer, texts: Sequence[str]) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.instruction = tokenizer(config.instruction)["input_ids"] if config.instruction else []
        eos = tokenizer.eos_token_id
        if self.instruction and self.instruction[-1] == eos:  # some tokenizers close every text
            self.instruction = self.instruction[:-1]
        self.end = [] if eos is None else [eos]
        limit = config.max_text_tokens - len(self.end)
        flat = tokenizer([t for t in texts if t], add_special_tokens=False)["input_ids"] if any(texts) else []
        encoded = iter(flat)
        self.texts = [(next(encoded)[:limit] + self.end) if t else [] for t in texts]

    def query_ids(self, query: str) -> list[int]:
        if not query:
            return []
        ids = self.tokenizer(QUERY_TEMPLATE.format(query), add_special_tokens=False)["input_ids"]
        return ids[: self.config.max_query_tokens]

    def padded_texts(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Catalogue indices -> (n, Y) tokens of their texts, 0 after the end, and (n,) lengths."""
        texts = [self.texts[i] for i in items]
        width = max(map(len, texts), default=0)
        padded = torch.tensor([t + [0] * (width - len(t)) for t in texts], dtype=torch.int64)
        return padded.reshape(len(texts), width), torch.tensor([len(t) for t in texts], dtype=torch.int64)

    def build(self, histories: Sequence[np.ndarray], queries: Sequence[str], targets: Mapping[int, int] = {}
              ) -> dict[str, Tensor]:
        """Fields of `KarmaBatch` from token_ids to emb_columns, and gen_*.

        ``targets``: row -> item whose text follows [EMB].
        """
        heads = [self.instruction + self.query_ids(q) for q in queries]
        tails = [self.texts[targets[row]] if row in targets else [] for row in range(len(queries))]
        widths = [len(h) + len(i) + 1 + len(y) for h, i, y in zip(heads, histories, tails, strict=True)]
        token_ids = np.zeros((len(heads), max(widths, default=0)), dtype=np.int64)
        slots = np.full_like(token_ids, -1)
        flat = np.concatenate([np.asarray(h, dtype=np.int64) for h in histories]) if len(heads) else np.zeros(0, int)
        distinct, inverse = np.unique(flat, return_inverse=True)
        emb, gen, start = [], [], 0
        for row, (head, items, tail) in enumerate(zip(heads, histories, tails, strict=True)):
            column = len(head) + len(items)
            token_ids[row, : len(head)] = head
            slots[row, len(head):column] = inverse[start:start + len(items)]
            token_ids[row, column + 1:column + 1 + len(tail)] = tail
            gen += [(row, column + n, label) for n, label in enumerate(tail)]
            emb.append(column)
            start += len(items)
        gen_rows, gen_columns, gen_labels = torch.tensor(gen, dtype=torch.int64).reshape(-1, 3).unbind(1)
        return {"token_ids": torch.from_numpy(token_ids), "slots": torch.from_numpy(slots),
                "history_items": torch.from_numpy(distinct), "emb_columns": torch.tensor(emb, dtype=torch.int64),
                "gen_rows": gen_rows, "gen_columns": gen_columns, "gen_labels": gen_labels}


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
    position = np.arange(len(sequences.items))
    train = position < np.repeat(split.train_end, np.diff(sequences.indptr))
    counts = np.bincount(sequences.items[train], minlength=num_items)
    return np.log(np.maximum(counts, 1) / max(1, counts.sum())).astype(np.float32)


class KarmaCollator:
    """Windows (start, end) of flat events -> `KarmaBatch`. Stateless: the same windows give the same batch."""

    def __init__(self, config: KarmaConfig, prompts: Prompts, sequences: Sequences, log_q: np.ndarray | None,
                 max_hard_negatives: int = 8, seed: int = 0) -> None:
        if config.positions == "all" and sequences.queries is not None:
            raise ConfigError("model.positions: got all, but the data has queries, and an inner position would read "
                              "the query of a later request; set model.positions last")
        self.config, self.prompts, self.sequences, self.log_q = config, prompts, sequences, log_q
        self.max_hard_negatives, self.seed = max_hard_negatives, seed

    def __call__(self, windows: Sequence[tuple[int, int]]) -> KarmaBatch:
        events = self.sequences.items
        histories = [events[start:end - 1] for start, end in windows]
        queries = [query_of(self.sequences, end - 1) for _, end in windows]
        last = [int(events[end - 1]) for _, end in windows]
        wants_gen = self.config.weight("gen") > 0
        looked_at = [self._random(start, end).random() < self.config.decode_share for start, end in windows]
        with_text = [row for row, wanted in enumerate(looked_at) if wanted and wants_gen]
        fields = self.prompts.build(histories, queries, {row: last[row] for row in with_text})
        rows, columns, positions, decode = [], [], [], []
        for row, (start, end) in enumerate(windows):
            emb = int(fields["emb_columns"][row])
            first = len(rows)
            if self.config.positions == "all":
                inner = end - start - 2
                rows += [row] * inner
                columns += range(emb - inner - 1, emb - 1)  # the item tokens but the last, which trains nothing
                positions += range(start + 1, end - 1)
            rows.append(row)
            columns.append(emb)
            positions.append(end - 1)
            if looked_at[row]:
                decode += self._decode_pairs(first, len(rows) - 1, start, end)
        positives = events[positions].astype(np.int64)
        keys = np.concatenate([positives, *self._hard_negatives(positions)])
        text_ids, text_lengths = self.prompts.padded_texts(positives[decode] if self.config.weight("rec") > 0 else [])
        return KarmaBatch(
            **fields, pair_rows=torch.tensor(rows), pair_columns=torch.tensor(columns), keys=torch.from_numpy(keys),
            log_q=None if self.log_q is None else torch.from_numpy(self.log_q[keys]),
            decode_pairs=torch.tensor(decode, dtype=torch.int64),
            text_ids=text_ids, text_lengths=text_lengths,
            num_texts=len(windows) * self.config.decode_share,
            num_tokens=int(fields["emb_columns"].sum()) + len(windows) + len(fields["gen_labels"])
            + int(text_lengths.sum()) + len(text_lengths) * self.config.num_soft_tokens)

    def _decode_pairs(self, first: int, last: int, start: int, end: int) -> list[int]:
        """The last pair of a window, which serving reads, and further ones drawn by the window alone."""
        if self.config.weight("rec") == 0 and self.config.weight("vis") == 0:
            return []
        extra = min(self.config.decode_positions - 1, last - first)
        if extra <= 0:
            return [last]
        drawn = self._random(start, end, 1).choice(last - first, extra, replace=False)
        return [*(first + np.sort(drawn)).tolist(), last]

    def _random(self, *key: int) -> np.random.Generator:
        """Depends on the window alone, so a resumed or repeated epoch draws the same."""
        return np.random.default_rng((self.seed, *key))

    def _hard_negatives(self, positions: Sequence[int]) -> list[np.ndarray]:
        indptr, negatives = self.sequences.negatives_indptr, self.sequences.negatives
        if indptr is None or negatives is None:
            return []
        return [negatives[indptr[p]:indptr[p + 1]][-self.max_hard_negatives:].astype(np.int64) for p in positions]
