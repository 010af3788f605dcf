"""A fresh linear probe: which words of the target can be read off a frozen embedding?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .entries import entry, mean_entry

MAX_WORDS, MIN_COUNT = 500, 5  # words to look for: the most frequent of the training half, seen at least so often
STRENGTHS = 10.0 ** np.arange(-3, 5)  # of the ridge, over the mean square of the singular values
TOP = 10


def ridge_probe(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, float]:
    """Scores of new rows by ridge regression with an intercept, its strength chosen by leaving one row out.

    Args:
        x: (n, d) training rows. y: (n, V) targets. new: (m, d).

    Returns:
        (m, V) float64 scores, and the relative strength; infinity where no strength beats the mean of y, which is then
        the score of every row. Closed form: Hoerl and Kennard 1970; leave-one-out residuals: Allen 1974.
    """
    x, y, new = (np.asarray(a, np.float64) for a in (x, y, new))
    centre, level = x.mean(axis=0), y.mean(axis=0)
    scores, chosen = np.repeat(level[None], len(new), axis=0), math.inf
    left, singular, right = np.linalg.svd(x - centre, full_matrices=False)
    if len(x) < 3 or singular.max(initial=0.0) ** 2 <= 1e-12 * max(np.square(x).sum(), 1e-300):
        return scores, chosen  # the embeddings are all equal
    n, goal = len(x), left.T @ (y - level)
    best = np.square((y - level) * n / (n - 1)).sum()
    for strength in STRENGTHS:
        shrunk = singular**2 / (singular**2 + strength * np.square(singular).mean())
        leverage = np.square(left) @ shrunk + 1 / n
        error = np.square((y - level - left @ (shrunk[:, None] * goal)) / (1 - leverage)[:, None]).sum()
        if error < best:
            best, chosen = error, float(strength)
            weights = right.T @ ((shrunk / np.maximum(singular, 1e-300))[:, None] * goal)
            scores = level + (new - centre) @ weights
    return scores, chosen


def found_words(scores: np.ndarray, y: np.ndarray, top: int = TOP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of (m, V) scores against (m, V) 0/1 truth: (m,) words of the row among its best ``top``, (m,) words of the row,
    (m,) average precision, NaN for a row without words. Equal scores: the earlier word first.

    >>> found_words(np.array([[3.0, 2.0, 1.0]]), np.array([[1, 0, 1]]), top=2)
    (array([1]), array([2]), array([0.83333333]))
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = np.take_along_axis(np.asarray(y) > 0, order, axis=1)
    wanted = hits.sum(axis=1)
    precision = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
    average = np.where(wanted > 0, (precision * hits).sum(axis=1) / np.maximum(wanted, 1), np.nan)
    return hits[:, :top].sum(axis=1), wanted, average


def probe_entries(x: np.ndarray, words: Any, rows: np.ndarray, train: np.ndarray, *, shuffle: int | None = None
                  ) -> dict[str, dict[str, Any]]:
    """``probe_recall@10`` and ``probe_map`` of embeddings for the words of items.

    Args:
        x: (n, d) embeddings.
        words: (N, V) of `karma_fast.diagnostics.attributes.word_matrix`.
        rows: (n,) the item whose words belong to each embedding.
        train: (n,) bool, rows the probe is trained on; it is tested on the others.
        shuffle: a seed: within both halves the embeddings are dealt to other rows, as a control.

    Returns:
        Entries with ``baseline``, the value of the words' frequency alone, and for the mean average precision ``gain``
        over it with the standard error of the paired difference.
    """
    x, train = np.asarray(x), np.asarray(train, bool)
    if shuffle is not None:
        x, random = x.copy(), np.random.default_rng(shuffle)
        for half in (train, ~train):
            x[half] = random.permutation(x[half])
    counts = np.asarray(words[rows[train]].sum(axis=0)).reshape(-1)
    order = np.argsort(-counts, kind="stable")[:MAX_WORDS]
    kept = order[counts[order] >= MIN_COUNT]
    if not len(kept) or train.sum() < 3 or not (~train).any():
        why = f"no word occurs {MIN_COUNT} times in the probe's training half" if not len(kept) else "too few rows"
        return {name: entry(name, math.nan, int((~train).sum()), why) for name in ("probe_recall@10", "probe_map")}
    y, truth = words[rows[train]][:, kept].toarray(), words[rows[~train]][:, kept].toarray()
    scores, strength = ridge_probe(x[train], y, x[~train])
    hit, wanted, average = found_words(scores, truth)
    level = np.repeat(y.mean(axis=0, keepdims=True), len(truth), axis=0)
    level_hit, _, level_average = found_words(level, truth)
    total = int(wanted.sum())
    gain = mean_entry("probe_map", average - level_average)
    none = "no row of the test half has one of the words"
    shared = {"words": len(kept), "trained_on": int(train.sum()), "ridge_strength": strength}
    return {
        "probe_recall@10": entry("probe_recall@10", hit.sum() / total if total else math.nan, int((wanted > 0).sum()),
                                 none, baseline=level_hit.sum() / total if total else math.nan, **shared),
        "probe_map": mean_entry("probe_map", average, none, baseline=np.nanmean(level_average) if total else math.nan,
                                gain=gain["value"], gain_standard_error=gain.get("standard_error"), **shared)}
