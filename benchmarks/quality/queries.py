"""Queries for data that has none: the usual simulation of product search.

A query is made of the words of the target's category path (Van Gysel et al. 2016, arXiv 1608.07253; Ai et al. 2017,
doi 10.1145/3077136.3080813), each word once, without stop words. Drawing which levels and words are used, so that two
searches for one item differ, is ours. No word of the brand is left, as that would nearly name the item.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

STOP_WORDS = frozenset(re.findall(r"\w+", "a an and at by for from in of on or other others plus the to with"))
KEPT = 0.8  # of the words of the chosen levels, at least one


def words_of(text: str) -> list[str]:
    """
    >>> words_of("Women's Creams & Lotions")
    ["women's", 'creams', 'lotions']
    """
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def query_for(categories: Sequence[str], brand: str, draw: random.Random) -> str:
    """Some words of a category path (top level first), in its order; "" where the brand leaves none.

    >>> query_for(["Makeup", "Face", "Concealers & Neutralizers"], "Makeup Forever", random.Random(1))
    'face concealers neutralizers'
    """
    unwanted = STOP_WORDS | set(words_of(brand))
    levels = [found for level in categories if (found := [w for w in words_of(level) if w not in unwanted])]
    if not levels:
        return ""
    # a path's end says most, so it is there in most queries
    last = len(levels) if draw.random() < 0.75 else draw.randint(1, len(levels))
    first = draw.randrange(last)
    words = list(dict.fromkeys(word for level in levels[first:last] for word in level))
    kept = [word for word in words if draw.random() < KEPT] or [draw.choice(words)]
    return " ".join(kept)


def simulate_queries(targets: Sequence[tuple[Sequence[str], str]], seed: int = 0) -> list[str]:
    """A query for each (categories, brand), drawn one after the other by the seed."""
    draw = random.Random(seed)
    return [query_for(categories, brand, draw) for categories, brand in targets]
