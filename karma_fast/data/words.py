"""Texts as bags of words. Needs scipy."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_WORDS = 65_536  # that have a vector of their own
# Thai and Lao, Burmese, Khmer, kana, Han: no space between words
WITHOUT_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
UNSPACED = re.compile(f"([{WITHOUT_SPACES}]+)")
# letters and digits, with the vowel signs of Hebrew, Arabic and Indic scripts, which \w leaves out
RUNS = re.compile(rf"[\w\u0591-\u05c7\u064b-\u065f\u0900-\u0dff{WITHOUT_SPACES}]+")


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case; of scripts without spaces, every two neighbouring characters.

    >>> words_of("Red, size-9 shoe")
    ['red', 'size', '9', 'shoe']
    >>> words_of("男士跑鞋 2023"), words_of("跑鞋")
    (['男士', '士跑', '跑鞋', '2023'], ['跑鞋'])
    """
    text = text.lower()
    if text.isascii():
        return re.findall(r"\w+", text)
    words: list[str] = []
    text = unicodedata.normalize("NFC", text)
    text = "".join(" " if unicodedata.category(c)[0] in "PSZ" and c != "_" else c for c in text)
    for run in RUNS.findall(text):
        for n, part in enumerate(UNSPACED.split(run)):
            if n % 2:  # of a script without spaces
                words += [part[i:i + 2] for i in range(max(1, len(part) - 1))]
            elif part:
                words.append(part)
    return words


def vocabulary(texts: Sequence[str], most: int = MOST_WORDS) -> dict[str, int]:
    """The words that most texts have, with their numbers; of as many texts, the one that came first.

    >>> vocabulary(["red shoe", "red tea, red", "shoe"], 2)
    {'red': 0, 'shoe': 1}
    """
    texts_with = Counter(word for text in texts for word in dict.fromkeys(words_of(text)))
    return {word: n for n, (word, _) in enumerate(texts_with.most_common(most))}


def tf_idf_vectors(texts: Sequence[str], further: Sequence[str] = ()) -> Any:
    """(N, words) scipy CSR float64 of TF-IDF vectors of length 1; a text without words has an empty row.

    Words are those of `words_of`, weighted by count times ``log((1 + N) / (1 + texts)) + 1``.
    ``further`` texts, such as queries, get rows behind the N and do not count in the weights.

    >>> tf_idf_vectors(["red shoe", "Red", ""]).toarray().round(4)
    array([[0.6053, 0.796 ],
           [1.    , 0.    ],
           [0.    , 0.    ]])
    """
    return _tf_idf(texts, further)[0]


def _tf_idf(texts: Sequence[str], further: Sequence[str] = ()) -> tuple[Any, dict[str, int], np.ndarray]:
    """The vectors, the column of each word, and the weight of each column."""
    from scipy import sparse

    words: dict[str, int] = {}
    lists = [[words.setdefault(word, len(words)) for word in words_of(text)] for text in [*texts, *further]]
    indptr = np.concatenate([[0], np.cumsum([len(part) for part in lists])])
    columns = np.concatenate([np.asarray(part, np.int64) for part in lists])
    vectors = sparse.csr_matrix((np.ones(len(columns)), columns, indptr), shape=(len(lists), len(words)))
    vectors.sum_duplicates()
    frequency = np.bincount(vectors[:len(texts)].indices, minlength=len(words))
    weights = np.log((1 + len(texts)) / (1 + frequency)) + 1
    vectors = vectors @ sparse.diags(weights)
    length = np.sqrt(np.asarray(vectors.multiply(vectors).sum(axis=1)).reshape(-1))
    return (sparse.diags(1 / np.where(length > 0, length, 1)) @ vectors).tocsr(), words, weights


def word_vectors(texts: Sequence[str], dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Vectors of texts and of words in one space. No language model is asked.

    Returns:
        (N, dim) float32 unit rows of the texts, whose inner products approximate the TF-IDF cosines; NaN rows for
        texts without any word. And (W, dim) float32 rows of the words of ``vocabulary(texts)``, and that vocabulary:
        their sum over the words of a text, or of a query, points where the text's vector does.

    The leading singular directions of the TF-IDF vectors, zeros where there are fewer than ``dim``. Source: latent
    semantic analysis, Deerwester et al. 1990.

    >>> of_texts, of_words, words = word_vectors(["red shoe", "shoe, red", "tea", ""], 2)
    >>> of_texts.round(4).tolist()
    [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [nan, nan]]
    >>> of_words.shape, words
    ((3, 2), {'red': 0, 'shoe': 1, 'tea': 2})
    """
    from scipy.sparse.linalg import svds

    vectors, columns, weights = _tf_idf(texts)
    present = np.diff(vectors.indptr) > 0
    if dim < min(vectors.shape):
        start = np.random.default_rng(seed).standard_normal(min(vectors.shape))  # svds draws its own otherwise
        left, values, right = svds(vectors, k=dim, v0=start)
        left, values, right = left[:, ::-1], values[::-1], right[::-1]
    else:
        left, values, right = np.linalg.svd(vectors.toarray(), full_matrices=False)
    of_texts = left[:, :dim] * values[:dim]
    words = vocabulary(texts)
    kept = [columns[word] for word in words]
    of_words = np.zeros((len(kept), dim), np.float32)
    of_words[:, :of_texts.shape[1]] = (right[:dim].T * signs(of_texts))[kept] * weights[kept, None]
    return unit_rows(of_texts, dim, present), of_words, words


def signs(rows: np.ndarray) -> np.ndarray:
    """(N, k) coordinates -> (k,) the sign of the largest of each."""
    if not rows.size:
        return np.ones(rows.shape[1])
    return np.where(rows[np.abs(rows).argmax(axis=0), np.arange(rows.shape[1])] < 0, -1, 1)


def unit_rows(rows: np.ndarray, dim: int, present: np.ndarray) -> np.ndarray:
    """(N, k <= dim) spectral coordinates -> (N, dim) float32 rows of length 1; NaN where absent or without length.

    A direction's sign is arbitrary: here its largest entry is positive. Zeros fill up.

    >>> unit_rows(np.array([[-2.0], [0.0], [-1.0]]), 2, np.array([True, True, False])).tolist()
    [[1.0, 0.0], [nan, nan], [nan, nan]]
    """
    rows = rows * signs(rows)
    rows = np.pad(rows, ((0, 0), (0, dim - rows.shape[1])))
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(present[:, None] & (length > 1e-9), rows / np.maximum(length, 1e-9), np.nan).astype(np.float32)
