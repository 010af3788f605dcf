"""The one form that all data takes inside: a catalogue of items, users' sequences, and a split.

>>> import numpy as np
>>> items = Items(ids=np.array(["a", "b"], dtype=object), texts=["Toy Story | 1995", ""], titles=["Toy Story", ""])
>>> len(items), items.index(["b", "a"])
(2, array([1, 0]))
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .flat import numbered, slices


class DataError(ValueError):
    """Bad data. The message reads ``FILE, line N, column C: what is wrong; what to do``."""


def raise_first(problems: list[DataError]) -> None:
    """Raises the first problem, with a word about the others; does nothing for an empty list."""
    if len(problems) > 1:
        raise DataError(f"{problems[0]} ({len(problems) - 1} more found; `karma-fast check-data` lists them all)")
    if problems:
        raise problems[0]


@dataclass
class Items:
    """The catalogue. Everything inside counts items by their place in it, 0..N-1.

    ids: (N,) object array of str, the ids of the files. texts: N one-line texts, ``""`` where missing.
    titles: N titles or first text fields, for display. image_vectors, id_vectors: (N, d) float32 with NaN rows where
    an item has none, or None.
    """

    ids: np.ndarray
    texts: list[str]
    titles: list[str]
    image_vectors: np.ndarray | None = None
    id_vectors: np.ndarray | None = None
    _places: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def index(self, ids: Iterable[str]) -> np.ndarray:
        """Ids of the files -> (n,) int64 places in the catalogue; KeyError for an unknown id, naming near ones."""
        if isinstance(ids, str):
            ids = [ids]
        places = self.places
        try:
            return np.array([places[str(name)] for name in ids], dtype=np.int64)
        except KeyError as error:
            raise KeyError(self._unknown(str(error.args[0]))) from None

    @property
    def places(self) -> dict[str, int]:
        """Ids and their places in the catalogue."""
        if len(self._places) != len(self.ids):
            self._places = {str(name): place for place, name in enumerate(self.ids)}
        return self._places

    def _unknown(self, name: str) -> str:
        wanted = name.lower()
        near = [place for place, title in enumerate(self.titles) if wanted in title.lower()][:3]
        if not near and len(self) <= 50_000:  # difflib looks at every title; beyond this it takes seconds
            words = difflib.get_close_matches(name, [*self._places, *self.titles], n=3)
            near = [self._places[w] if w in self._places else self.titles.index(w) for w in words]
        hint = ", ".join(f"{self.ids[place]} ({self.titles[place]})" for place in dict.fromkeys(near))
        return f"no item has the id {name!r}; " + (f"near: {hint}" if hint else "ids look like "
                                                   + ", ".join(map(str, self.ids[:3])))


@dataclass
class Sequences:
    """All users' positive events, oldest first, user after user in flat arrays (U users, E events).

    user_ids: (U,) object array of str. indptr: (U+1,) int64, events of user u are ``indptr[u]:indptr[u+1]``.
    items: (E,) int32 places in the catalogue. times: (E,) int64 or float64, None if the data has no times.
    queries: (E,) int32 into query_texts, -1 for no query; None if the data has no queries.
    negatives_indptr: (E+1,) int64 and negatives: (M,) int32: the items shown but not clicked between the
    user's previous click and event e are ``negatives[negatives_indptr[e]:negatives_indptr[e+1]]``; or None.
    """

    user_ids: np.ndarray
    indptr: np.ndarray
    items: np.ndarray
    times: np.ndarray | None = None
    queries: np.ndarray | None = None
    query_texts: list[str] = field(default_factory=list)
    negatives_indptr: np.ndarray | None = None
    negatives: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user_ids)

    def history(self, position: int, max_history: int) -> np.ndarray:
        """Items before a flat position, of the same user, oldest first, at most ``max_history``: (h,) int32.

        >>> users, items = np.array(["u", "v"], dtype=object), np.arange(5, dtype=np.int32)
        >>> sequences = Sequences(users, np.array([0, 2, 5]), items)
        >>> sequences.history(4, 10), sequences.history(4, 1), sequences.history(2, 10)
        (array([2, 3], dtype=int32), array([3], dtype=int32), array([], dtype=int32))
        """
        first = int(self.indptr[self.user_of(position)])
        return self.items[max(first, int(position) - max_history):int(position)]

    def user_of(self, positions) -> np.ndarray:
        """Flat positions -> places in user_ids, int64."""
        positions = np.asarray(positions)
        if positions.size and (positions.min() < 0 or positions.max() >= self.indptr[-1]):
            raise IndexError(f"position {positions.min()}..{positions.max()}: the sequences have events "
                             f"0..{self.indptr[-1] - 1}")
        return np.searchsorted(self.indptr, positions, side="right") - 1

    def first_of_each(self, positions) -> np.ndarray:
        """Of flat positions the first of each user, rising, int64: requests of as many users.

        >>> Sequences(np.array(["u", "v"]), np.array([0, 3, 5]), np.zeros(5, np.int32)).first_of_each([4, 2, 3, 1])
        array([1, 3])
        """
        positions = np.sort(np.asarray(positions, np.int64))
        return positions[np.unique(self.user_of(positions), return_index=True)[1]]

    def without_queries(self, share: float, seed: int = 0) -> Sequences:
        """The same without a share of the queries, drawn by seed, for training: requests may come without one.

        >>> items, queries = np.zeros(4, np.int32), np.arange(4, dtype=np.int32)
        >>> whole = Sequences(np.array(["u"]), np.array([0, 4]), items, queries=queries)
        >>> whole.without_queries(0.5, seed=1).queries
        array([ 0,  1, -1,  3], dtype=int32)
        """
        if self.queries is None or share == 0:
            return self
        left_out = np.random.default_rng(seed).random(len(self.queries)) < share
        return dataclasses.replace(self, queries=np.where(left_out, np.int32(-1), self.queries))

    def has_queries(self, positions) -> bool:
        """Whether one of the events at flat positions has a query.

        >>> items, queries = np.zeros(3, np.int32), np.array([0, -1, -1], np.int32)
        >>> whole = Sequences(np.array(["u"]), np.array([0, 3]), items, queries=queries, query_texts=["tea"])
        >>> whole.has_queries([0, 2]), whole.has_queries([1, 2])
        (True, False)
        """
        return self.queries is not None and bool((self.queries[np.asarray(positions, np.int64)] >= 0).any())

    def chosen_before(self, positions) -> np.ndarray:
        """(T,) bool: whether the item at each flat position is one that its user had chosen earlier.

        >>> Sequences(np.array(["u"]), np.array([0, 3]), np.array([7, 4, 7], np.int32)).chosen_before([1, 2])
        array([False,  True])
        """
        positions = np.asarray(positions, np.int64)
        first, found = self.indptr[self.user_of(positions)], np.zeros(len(positions), bool)
        earlier = positions - first
        for part in slices(earlier):
            row, nth = numbered(earlier[part])
            same = self.items[first[part][row] + nth] == self.items[positions[part]][row]
            found[part][row[same]] = True
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the flat arrays, strings left out."""
        arrays = (self.indptr, self.items, self.times, self.queries, self.negatives_indptr, self.negatives)
        return sum(a.nbytes for a in arrays if a is not None)


@dataclass
class Split:
    """Which events train, which are validation and test targets.

    train_end: (U,) int64, events ``indptr[u]:train_end[u]`` are the training part. valid: (V,), test: (T,)
    int64 flat positions of targets. The history of a target is every earlier event of its user, so
    validation items are history at test time. description: one sentence for reports.
    """

    train_end: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    description: str

    def training_items(self, sequences: Sequences) -> np.ndarray:
        """Catalogue indices of the events of the training part, in their order."""
        train = np.arange(len(sequences.items)) < np.repeat(self.train_end, np.diff(sequences.indptr))
        return sequences.items[train]

    def training_counts(self, sequences: Sequences, num_items: int) -> np.ndarray:
        """(N,) int64: events of each item in the training part.

        >>> sequences = Sequences(np.array(["u"]), np.array([0, 4]), np.array([1, 2, 1, 0], np.int32))
        >>> Split(np.array([3]), np.array([]), np.array([3]), "last event").training_counts(sequences, 3)
        array([0, 2, 1])
        """
        return np.bincount(self.training_items(sequences), minlength=num_items)


@dataclass
class Dataset:
    """What `load_dataset` returns. notes: what was dropped or assumed on the way, one sentence each."""

    items: Items
    sequences: Sequences
    split: Split
    name: str = ""
    notes: list[str] = field(default_factory=list)
