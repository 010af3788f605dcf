r"""A weighted sum of the training-free scores, its weights chosen on validation requests.

.. math:: s(j) = \mathrm{kNN}(j) + a\,\mathrm{text}(j) + b\,\mathrm{next}(j) + c\,\mathrm{pop}(j)

kNN and text are the mean cosine of item j with the history (of users in common, of the TF-IDF vectors of the whole
texts), an item of age t weighing decay^t, so both lie between 0 and 1 whatever the history's length; next is
log(1 + times j came right after the last item in the training part): twice says more than once, but a thousand times
not a thousand times as much; pop is j's count by the largest one.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.flat import draw
from ..evaluation.csr import csr_rows, seen_before
from ..evaluation.metrics import ranking_metrics
from ..evaluation.ranks import Ranks, rank_scores
from .counts import recent_history, training_matrix, transition_counts
from .scorers import Scorer, item_knn, popularity, tf_idf, transitions

MIX_LAST = 50  # history items the mix looks at; at decay 0.9 older ones weigh under 1%
SEARCH_BYTES = 16 << 20  # of float32 scores of one part at a time
SEARCH_METRIC = "NDCG@10"  # less noisy than HR@10 on a sample of users
GRID: dict[str, tuple[float, ...]] = {
    "text": (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 4),
    "next": (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2),
    "pop": (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1),
    "knn_decay": (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1),
    "text_decay": (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1),
}


@dataclass(frozen=True)
class MixWeights:
    """a, b, c of the sum and the two decays; item-kNN has the weight 1."""

    text: float = 0.5
    next: float = 0.1
    pop: float = 0.1
    knn_decay: float = 0.7
    text_decay: float = 0.7


@dataclass(frozen=True)
class TunedMix:
    """What :func:`tune_mix` found. metrics: on the validation requests it looked at. tried: weights compared."""

    weights: MixWeights
    metrics: dict[str, float]
    requests: int
    tried: int


@dataclass
class MixParts:
    """The four fitted scorers of a data set, and the scores they give for its requests."""

    dataset: Any
    knn: Scorer
    text: Scorer
    next: Scorer
    pop: Scorer

    @staticmethod
    def fit(dataset: Any) -> MixParts:
        size = len(dataset.items)
        matrix = training_matrix(dataset.sequences, dataset.split, size)
        counts = transition_counts(dataset.sequences, dataset.split, size)
        texts = [text or title for text, title in zip(dataset.items.texts, dataset.items.titles, strict=True)]
        return MixParts(dataset, item_knn(matrix), tf_idf(texts), transitions(counts.log1p()),
                        popularity(matrix / max(1.0, matrix.sum(axis=0).max())))

    def mean_cosine(self, name: str, positions: np.ndarray, decay: float) -> np.ndarray:
        """(R, N) float32 of ``knn`` or ``text``."""
        history = recent_history(self.dataset.sequences, positions, len(self.dataset.items), MIX_LAST, decay)
        return getattr(self, name)(row_shares(history))

    def next_and_pop(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(R, N) float32 each."""
        last = recent_history(self.dataset.sequences, positions, len(self.dataset.items), 1)
        return self.next(last), self.pop(last)

    def scores(self, positions: np.ndarray, choices: list[MixWeights]) -> Any:
        """One (R, N) float32 after the other, for each of the choices; what they share is computed once."""
        following, popular = self.next_and_pop(positions)
        made: dict[tuple[str, float], np.ndarray] = {}
        for weights in choices:
            needed = (("knn", weights.knn_decay), ("text", weights.text_decay))
            made = {key: part for key, part in made.items() if key in needed}
            for key in needed:
                if key not in made:
                    made[key] = self.mean_cosine(key[0], positions, key[1])
            total = weights.text * made[needed[1]]
            total += made[needed[0]]
            total += weights.next * following
            total += weights.pop * popular
            yield total


def row_shares(matrix: Any) -> Any:
    """Sparse rows divided by their sums; empty rows stay empty."""
    from scipy import sparse

    sums = np.asarray(matrix.sum(axis=1)).reshape(-1)
    return (sparse.diags(1 / np.where(sums > 0, sums, 1)) @ matrix).tocsr()


def mix_scorer(dataset: Any, weights: MixWeights) -> Callable[[np.ndarray], np.ndarray]:
    """Flat positions (R,) of targets -> (R, N) float32 scores of what is read before them.

    Example:
        >>> from types import SimpleNamespace
        >>> from karma_fast.data.schema import Items, Sequences, Split
        >>> items = Items(ids=np.array(["a", "b", "c"]), texts=["red shoe", "blue shoe", "tea"], titles=[""] * 3)
        >>> sequences = Sequences(np.array(["u", "v"]), np.array([0, 3, 5]), np.array([2, 0, 1, 0, 2], np.int32))
        >>> split = Split(np.array([2, 4]), np.array([], int), np.array([2, 4]), "last event is the test")
        >>> score = mix_scorer(SimpleNamespace(items=items, sequences=sequences, split=split), MixWeights())
        >>> score(np.array([2])).round(3)  # "blue shoe" shares a word with "red shoe", the last item
        array([[0.685, 0.108, 0.672]], dtype=float32)
    """
    parts = MixParts.fit(dataset)
    return lambda positions: next(iter(parts.scores(positions, [weights])))


def tune_mix(dataset: Any, *, mask_seen: bool = True, users: int = 2000, seed: int = 0,
             progress: bool = False) -> TunedMix:
    """Weights and decays for the best NDCG@10 on validation requests, by coordinate descent over ``GRID``.

    Each weight in turn takes the value of its grid that is best with the others as they are, until a round changes
    nothing (four rounds at most). Neither the search nor what is fitted looks at a test target.

    Args:
        dataset: :class:`karma_fast.data.Dataset`.
        mask_seen: leave out what the user chose before the target; search under the rule of the test.
        users: validation requests to search on, drawn by ``seed``; 0: all. The time is about that of ranking them 150
            times.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: the split has no validation request.

    Example:
        >>> from types import SimpleNamespace
        >>> from karma_fast.data.schema import Items, Sequences, Split
        >>> items = Items(ids=np.array(["a", "b", "c"]), texts=["red shoe", "blue shoe", "tea"], titles=[""] * 3)
        >>> sequences = Sequences(np.array(["u", "v"]), np.array([0, 3, 5]), np.array([2, 0, 1, 0, 2], np.int32))
        >>> split = Split(np.array([2, 4]), np.array([2]), np.array([], int), "last event is the validation target")
        >>> found = tune_mix(SimpleNamespace(items=items, sequences=sequences, split=split))
        >>> found.requests, found.metrics["HR@10"]
        (1, 1.0)
    """
    positions = validation_requests(dataset, users, seed)
    parts, best, known = MixParts.fit(dataset), MixWeights(), {}
    from tqdm import tqdm

    with tqdm(desc="tuning the mix", unit="weights", disable=not progress) as bar:
        for _ in range(4):
            before = best
            for name, values in GRID.items():
                choices = [dataclasses.replace(best, **{name: value}) for value in values]
                new = [c for c in dict.fromkeys([best, *choices]) if c not in known]
                known |= dict(zip(new, search_metrics(parts, positions, new, mask_seen), strict=True))
                bar.update(len(new))
                # the current one first, so that an equal one does not replace it
                best = max([best, *choices], key=lambda c: known[c][SEARCH_METRIC])
            if best == before:
                break
    return TunedMix(best, known[best], len(positions), len(known))


def validation_requests(dataset: Any, users: int, seed: int) -> np.ndarray:
    """Flat positions of ``users`` validation targets drawn by ``seed``, rising; all for 0."""
    positions = np.asarray(dataset.split.valid, np.int64)
    if not len(positions):
        raise ValueError("the split has no validation request to choose weights on; give users with 3 events or "
                         "more, or take mix_scorer with weights of your own")
    return draw(positions, users, seed)


def search_metrics(parts: Any, positions: np.ndarray, choices: Sequence[Any],
                   mask_seen: bool) -> list[dict[str, float]]:
    """HR@10 and NDCG@10 of each choice on the requests at flat ``positions``.

    parts: has ``dataset``, and ``scores(positions, choices)`` as `MixParts` has.
    """
    if not choices:
        return []
    data = parts.dataset
    seen, targets = seen_before(data.sequences, positions), data.sequences.items[positions].astype(np.int64)
    ranks: list[list[Ranks]] = [[] for _ in choices]
    size = max(1, SEARCH_BYTES // (4 * len(data.items)))
    for start in range(0, len(positions), size):
        left_out = csr_rows(seen, start, start + size) if mask_seen else None
        for found, scores in zip(ranks, parts.scores(positions[start:start + size], choices), strict=True):
            found.append(rank_scores(scores, targets[start:start + size], left_out))
    lost = data.sequences.chosen_before(positions) & mask_seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # counts and texts tie by nature
        return [ranking_metrics(Ranks.concat(found).missed(lost), (10,), num_items=len(data.items))
                for found in ranks]
