"""Baselines by name, ranked over the full catalogue: the rows that stand beside a model's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..evaluation.csr import seen_before
from ..evaluation.metrics import ranking_metrics
from ..evaluation.ranks import Ranks, rank_scores
from .counts import LAST_ITEMS, recent_history, training_matrix, transition_counts
from .mix import MIX_LAST, mix_scorer, tune_mix
from .query import query_knn_scorer, query_scorer, tune_query
from .scorers import RequestScorer, Scorer, item_knn, popularity, tf_idf, transitions

BLOCK_BYTES = 64 << 20  # of float32 scores at a time
DECAY = 0.7  # of the scorers "with decay"; a usual value, not tuned to the data

KS = (1, 5, 10, 50, 200)
DEFAULT = ("popularity", "item-kNN", "title TF-IDF")
QUERIES = ("query TF-IDF", "query kNN")
QUERY_MIX = "query TF-IDF + tuned mix"
QUERIES_MIX = "query kNN + query TF-IDF + tuned mix"
BASELINES = (*DEFAULT, "kNN with decay", "text with decay", "transitions", "tuned mix", *QUERIES, QUERY_MIX,
             QUERIES_MIX)
KEYS = {"item-kNN": "item_knn", "title TF-IDF": "title_tfidf", "query TF-IDF": "query_tfidf",
        "query kNN": "query_knn"}  # of rows in a run's files


def baseline_rows(dataset: Any, positions: np.ndarray, ks: Sequence[int] = KS, *, mask_seen: bool = True,
                  names: Sequence[str] | None = None, progress: bool = False) -> dict[str, dict[str, float]]:
    """Metrics of baselines for the requests whose targets stand at flat ``positions``.

    All statistics of interactions come from the training part alone, as a model's weights do; what the user did since
    is history that a scorer reads, no more.

    Args:
        dataset: :class:`karma_fast.data.Dataset` (items, sequences, split).
        positions: (T,) flat positions of targets, for example ``dataset.split.test``.
        ks: cut-offs, see :func:`karma_fast.evaluation.ranking_metrics`.
        mask_seen: leave out what the user chose before the target, the rule for the model's own row too.
        names: some of ``BASELINES``; see docs/baselines.md for their formulas. None: ``DEFAULT``, and ``QUERIES``
            where one of the requests has a query.
        progress: show a bar for each (needs tqdm).

    Raises:
        ValueError: an unknown name; a tuned row without validation requests.

    Example:
        >>> from types import SimpleNamespace
        >>> from karma_fast.data.schema import Items, Sequences, Split
        >>> items = Items(ids=np.array(["a", "b", "c"]), texts=["", "", ""], titles=["red shoe", "blue shoe", "tea"])
        >>> sequences = Sequences(np.array(["u", "v"]), np.array([0, 3, 5]), np.array([2, 0, 1, 0, 1], np.int32))
        >>> split = Split(np.array([2, 4]), np.array([], int), np.array([2, 4]), "last event is the test")
        >>> dataset = SimpleNamespace(items=items, sequences=sequences, split=split)
        >>> rows = baseline_rows(dataset, split.test, ks=(1,))
        >>> {name: row["HR@1"] for name, row in rows.items()}
        {'popularity': 0.5, 'item-kNN': 0.5, 'title TF-IDF': 1.0}
    """
    if names is None:
        names = (*DEFAULT, *QUERIES) if dataset.sequences.has_queries(positions) else DEFAULT
    return {name: score_row(dataset, positions, request_scorer(dataset, name, mask_seen=mask_seen), ks,
                            mask_seen=mask_seen, progress=name if progress else "") for name in names}


def request_scorer(dataset: Any, name: str, *, mask_seen: bool = True) -> RequestScorer:
    """The baseline called ``name``, fitted. ``mask_seen`` is the rule under which a tuned row is tuned.

    >>> request_scorer(None, "magic")
    Traceback (most recent call last):
        ...
    ValueError: no baseline is called 'magic'; take some of popularity, item-kNN, title TF-IDF, kNN with decay, \
text with decay, transitions, tuned mix, query TF-IDF, query kNN, query TF-IDF + tuned mix, \
query kNN + query TF-IDF + tuned mix
    """
    if name not in BASELINES:
        raise ValueError(f"no baseline is called {name!r}; take some of {', '.join(BASELINES)}")
    if name == "tuned mix":
        return mix_scorer(dataset, tune_mix(dataset, mask_seen=mask_seen).weights)
    if name in QUERIES:
        return query_scorer(dataset) if name == "query TF-IDF" else query_knn_scorer(dataset)
    if name in (QUERY_MIX, QUERIES_MIX):
        less, query = ("tuned mix", "query TF-IDF") if name == QUERY_MIX else (QUERY_MIX, "query kNN")
        return tune_query(dataset, request_scorer(dataset, less, mask_seen=mask_seen), request_scorer(dataset, query),
                          mask_seen=mask_seen).scorer
    if name == "transitions":
        counts = transition_counts(dataset.sequences, dataset.split, len(dataset.items))
        return of_history(dataset, transitions(counts), last=1)
    if name == "title TF-IDF":
        return of_history(dataset, tf_idf(dataset.items.titles))
    if name == "text with decay":
        return of_history(dataset, tf_idf(dataset.items.texts), MIX_LAST, DECAY)
    matrix = training_matrix(dataset.sequences, dataset.split, len(dataset.items))
    if name == "popularity":
        return of_history(dataset, popularity(matrix))
    return of_history(dataset, item_knn(matrix), *(() if name == "item-kNN" else (MIX_LAST, DECAY)))


def of_history(dataset: Any, scorer: Scorer, last: int = LAST_ITEMS, decay: float = 1.0) -> RequestScorer:
    """A scorer of histories as one of requests: it reads their ``last`` items, weighted by decay^age."""
    return lambda positions: scorer(recent_history(dataset.sequences, positions, len(dataset.items), last, decay))


def score_row(dataset: Any, positions: np.ndarray, scorer: RequestScorer, ks: Sequence[int] = KS, *,
              mask_seen: bool = True, progress: str = "") -> dict[str, float]:
    """`ranking_metrics` of `rank_requests`, with the same arguments.

    Example:
        >>> from types import SimpleNamespace
        >>> from karma_fast.data.schema import Sequences
        >>> sequences = Sequences(np.array(["u"]), np.array([0, 3]), np.array([0, 1, 2], np.int32))
        >>> data = SimpleNamespace(sequences=sequences, items=["a", "b", "c"])
        >>> score_row(data, np.array([2]), lambda p: np.array([[3.0, 2.0, 1.0]], np.float32), (1,))["HR@1"]
        1.0
    """
    ranks = rank_requests(dataset, positions, scorer, mask_seen=mask_seen, progress=progress)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # counts and texts tie by nature; tie_share stands in the row
        return ranking_metrics(ranks, ks, num_items=len(dataset.items))


def rank_requests(dataset: Any, positions: np.ndarray, scorer: RequestScorer, *, mask_seen: bool = True,
                  progress: str = "") -> Ranks:
    """Ranks of the held-out requests at flat positions by one scorer, some at a time.

    mask_seen as in `karma_fast.evaluation.held_out_ranks`.

    Args:
        scorer: gives (R, N) float32 scores for flat positions (R,). progress: the label of a bar; "": none.
    """
    positions = np.asarray(positions, np.int64)
    targets = dataset.sequences.items[positions].astype(np.int64)
    parts, size = [], max(1, BLOCK_BYTES // (4 * len(dataset.items)))
    starts = range(0, len(positions), size)
    if progress:
        from tqdm import tqdm

        starts = tqdm(starts, desc=progress, unit="block")
    for start in starts:
        block = positions[start:start + size]
        left_out = seen_before(dataset.sequences, block) if mask_seen else None
        parts.append(rank_scores(scorer(block), targets[start:start + size], left_out))
    ranks = Ranks.concat(parts)
    return ranks.missed(dataset.sequences.chosen_before(positions)) if mask_seen else ranks
