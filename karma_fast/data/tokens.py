"""Texts of many items as tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

BLOCK = 10_000  # texts that are tokenised at once


def tokenised(tokenizer, texts: Iterable[str], **options) -> Iterator[list[int]]:
    """The tokens of one text after the other; a block at a time, as what a tokenizer returns is large.

    options: of the tokenizer's call.
    """
    texts = iter(texts)
    while block := list(islice(texts, BLOCK)):
        yield from tokenizer(block, **options)["input_ids"]


class TokenTexts:
    """N texts as tokens, like a list of lists, but in one array.

    ids: (T,) int32 tokens, text after text. lengths, starts: (N,) int64 number of each text's tokens, and where in ids
    they begin.

    >>> texts = TokenTexts([[7, 8], [], [9]])
    >>> texts[0], texts[-1], list(texts), texts.ids
    ([7, 8], [9], [[7, 8], [], [9]], array([7, 8, 9], dtype=int32))
    """

    def __init__(self, rows: Iterable[list[int]]) -> None:
        ids, lengths = array("i"), array("q")
        for row in rows:
            ids.extend(row)
            lengths.append(len(row))
        self.ids, self.lengths = np.asarray(ids), np.asarray(lengths)
        self.starts = np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, item: int) -> list[int]:
        start = self.starts[item]
        return self.ids[start:start + self.lengths[item]].tolist()
