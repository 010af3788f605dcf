"""Training-free baselines against dense loops, and what they may look at."""

import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karma_fast.data.schema import Items, Sequences, Split
from karma_fast.evaluation.baselines import (
    baseline_rows,
    baseline_scorers,
    item_knn,
    popularity,
    recent_history,
    tf_idf,
    training_matrix,
)
from karma_fast.evaluation.csr import seen_before

TITLES = ["Red shoe", "blue SHOE, blue", "", "tea (1995)", "green tea", "Red tea pot", "shoe"]


def dataset(lists):
    """Leave one out: the last event of a user is the test, the one before it the validation target."""
    sizes = [len(part) for part in lists]
    indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    items = Items(ids=np.arange(len(TITLES)).astype(str), texts=TITLES, titles=TITLES)
    sequences = Sequences(user_ids=np.arange(len(lists)).astype(str), indptr=indptr,
                          items=np.concatenate(lists).astype(np.int32))
    split = Split(train_end=indptr[1:] - 2, valid=indptr[1:] - 2, test=indptr[1:] - 1, description="leave one out")
    return SimpleNamespace(items=items, sequences=sequences, split=split)


histories = st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=9), min_size=1, max_size=6)


@given(histories)
@settings(max_examples=40, deadline=None)
def test_scores_equal_loops(lists):
    data = dataset(lists)
    train = [part[:-2] for part in lists]
    count = Counter(item for part in train for item in part)
    users = [{u for u, part in enumerate(train) if j in part} for j in range(7)]
    cosine = np.array([[0 if h == j or not users[h] or not users[j] else
                        len(users[h] & users[j]) / np.sqrt(len(users[h]) * len(users[j])) for j in range(7)]
                       for h in range(7)])
    words = [Counter(re.findall(r"\w+", title.lower())) for title in TITLES]
    names = sorted({w for part in words for w in part})
    idf = [np.log(8 / (1 + sum(w in part for part in words))) + 1 for w in names]
    table = np.array([[part[w] for w in names] for part in words]) * idf
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    similar = table @ table.T

    history = recent_history(data.sequences, data.split.test, 7)
    found = {name: scorer(history) for name, scorer in baseline_scorers(data).items()}
    for u, part in enumerate(lists):
        recent = part[:-1][-5:]  # the validation item is history by now
        np.testing.assert_array_equal(found["popularity"][u], [count[j] for j in range(7)])
        np.testing.assert_allclose(found["item-kNN"][u], cosine[recent].sum(0), atol=1e-6)
        np.testing.assert_allclose(found["title TF-IDF"][u], similar[recent].sum(0), atol=1e-6)


def test_nothing_after_the_training_part_is_fitted():
    one, two = dataset([[0, 1, 2, 3], [1, 0, 4, 5]]), dataset([[0, 1, 6, 5], [1, 0, 2, 2]])
    assert (training_matrix(one.sequences, one.split, 7) != training_matrix(two.sequences, two.split, 7)).nnz == 0


def test_seen_before():
    data = dataset([[0, 1, 2], [5, 5, 6, 3]])
    indptr, items = seen_before(data.sequences, np.array([6, 0, 2, 4]))
    assert indptr.tolist() == [0, 3, 3, 5, 6] and items.tolist() == [5, 5, 6, 0, 1, 5]


def test_rows():
    # users 0 to 2 teach that 4 follows 3; user 3 is asked after [3, 0] and chooses 4
    data = dataset([[3, 4, 0, 1], [3, 4, 1, 0], [3, 4, 2, 2], [6, 3, 0, 4]])
    position = data.split.test[3:]
    rows = baseline_rows(data, position, ks=(1, 2))
    assert list(rows) == ["popularity", "item-kNN", "title TF-IDF"]
    # 3 is more popular, but was chosen already
    assert rows["popularity"]["HR@1"] == 1 and rows["item-kNN"]["HR@1"] == 1
    assert baseline_rows(data, position, ks=(1, 2), mask_seen=False)["popularity"]["HR@1"] == 0
    # after "shoe", "tea (1995)" and "Red shoe", "Red tea pot" is nearer than "green tea"
    assert rows["title TF-IDF"]["HR@1"] == 0


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    data = dataset([rng.integers(0, 7, rng.integers(3, 9)) for _ in range(20)])
    whole = baseline_rows(data, data.split.test, ks=(1, 3))
    monkeypatch.setattr("karma_fast.evaluation.baselines.BLOCK_BYTES", 3 * 4 * 7)
    for name, row in baseline_rows(data, data.split.test, ks=(1, 3)).items():
        assert row == pytest.approx(whole[name])


def test_empty_parts():
    data = dataset([[0, 1], [2, 3, 4]])  # the first user has no training part, and one item of history
    for row in baseline_rows(data, data.split.test, ks=(1,)).values():
        assert all(np.isfinite(value) for value in row.values())
    matrix = training_matrix(data.sequences, data.split, 7)
    none = recent_history(data.sequences, np.array([0]), 7)  # no history at all
    assert not item_knn(matrix)(none).any() and not tf_idf(TITLES)(none).any()
    assert popularity(matrix)(none).tolist() == [[0, 0, 1, 0, 0, 0, 0]]
    assert not tf_idf(["", ""])(none[:, :2]).any()
