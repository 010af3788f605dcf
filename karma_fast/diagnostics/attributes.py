"""The words of items' texts: what a probe has to find, and how alike a list of items is to the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.schema import Items
from ..data.words import words_of


def title_texts(items: Items) -> list[str]:
    return list(items.titles)


def attribute_texts(items: Items) -> list[str]:
    """What follows the title in each item's text: genres, brand, categories, description.

    >>> attribute_texts(Items(np.array(["a", "b"]), ["Toy Story | 1995 | Comedy", "Heat"], ["Toy Story", "Heat"]))
    ['1995 | Comedy', '']
    """
    return [text[len(title):].lstrip(" |") if text.startswith(title) else text.partition(" | ")[2]
            for text, title in zip(items.texts, items.titles, strict=True)]


def word_matrix(texts: Sequence[str]) -> tuple[Any, list[str]]:
    """(N, V) scipy.sparse 0/1 float32 and the V words, see `karma_fast.data.words.words_of`.

    >>> matrix, words = word_matrix(["Red shoe", "red red"])
    >>> words, matrix.toarray().tolist()
    (['red', 'shoe'], [[1.0, 1.0], [1.0, 0.0]])
    """
    from scipy import sparse

    places: dict[str, int] = {}
    lists = [sorted({places.setdefault(word, len(places)) for word in words_of(text)}) for text in texts]
    indptr = np.cumsum([0, *map(len, lists)])
    columns = np.array([place for part in lists for place in part], dtype=np.int64)
    return sparse.csr_matrix((np.ones(len(columns), np.float32), columns, indptr), (len(lists), len(places))), \
        list(places)


def list_likeness(words: Any, lists: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(R,) mean Jaccard similarity of the words of each listed item with those of the target; NaN without words.

    Args:
        words: (N, V) of `word_matrix`.
        lists: (R, k) catalogue indices; -1 where a list is shorter.
        targets: (R,) catalogue indices.

    >>> words, _ = word_matrix(["red shoe", "red hat", "tea"])
    >>> list_likeness(words, np.array([[1, 2], [1, -1]]), np.array([0, 0])).round(3).tolist()
    [0.167, 0.333]
    """
    sizes = np.asarray(words.sum(axis=1)).reshape(-1)
    rows, places = np.nonzero(lists >= 0)
    listed, wanted = lists[rows, places], targets[rows]
    both = np.asarray(words[listed].multiply(words[wanted]).sum(axis=1)).reshape(-1)
    either = sizes[listed] + sizes[wanted] - both
    likeness = np.where(either > 0, both / np.maximum(either, 1), 0.0)
    count = np.bincount(rows, minlength=len(lists))
    total = np.bincount(rows, weights=likeness, minlength=len(lists))
    return np.where((sizes[targets] > 0) & (count > 0), total / np.maximum(count, 1), np.nan)
