"""Vectors to stand where a data set has no pictures. They are synthetic and no result with them speaks of pictures."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from karma_fast.data import Items

WIDTH, NOISE, COMMON = 64, 0.5, 5  # COMMON: items that a word must be in


def attribute_words(items: Items) -> list[list[str]]:
    """Each item's words beyond its title: brand and categories, or genres."""
    rest = [text.removeprefix(title) for text, title in zip(items.texts, items.titles, strict=True)]
    return [list(dict.fromkeys(re.findall(r"[a-z']+", text.lower()))) for text in rest]


def image_vectors(items: Items, width: int = WIDTH, noise: float = NOISE, seed: int = 0) -> np.ndarray:
    """(N, width) float32: a fixed random projection of the attribute words' one-hots, plus noise; NaN without words.

    noise: its norm over that of the projection, on average.
    """
    words = attribute_words(items)
    counts = Counter(word for found in words for word in found)
    known = {word: n for n, word in enumerate(sorted(w for w, c in counts.items() if c >= COMMON))}
    random = np.random.default_rng(seed)
    projection = random.standard_normal((len(known), width)) / np.sqrt(width)
    out = np.full((len(items), width), np.nan, dtype=np.float32)
    drawn = random.standard_normal((len(items), width)) * noise / np.sqrt(width)
    for n, found in enumerate(words):
        rows = [known[word] for word in found if word in known]
        if rows:
            out[n] = projection[rows].sum(axis=0) / np.sqrt(len(rows)) + drawn[n]
    return out
