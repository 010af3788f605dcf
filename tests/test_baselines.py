"""Training-free baselines against dense loops, and what they may look at."""

import re
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from karma_fast.baselines import BASELINES, baseline_rows, query_knn_scorer, query_scorer, rows, tune_query
from karma_fast.baselines.counts import recent_history, training_matrix, transition_counts
from karma_fast.baselines.query import QUERY_WEIGHTS
from karma_fast.baselines.rows import DEFAULT, rank_requests, request_scorer
from karma_fast.baselines.scorers import item_knn, popularity, tf_idf, transitions
from karma_fast.data import flat, schema
from karma_fast.data.schema import Items, Sequences, Split
from karma_fast.data.words import tf_idf_vectors
from karma_fast.evaluation import Catalogue, held_out
from karma_fast.evaluation.csr import seen_before
from karma_fast.evaluation.held_out import held_out_ranks, ranking_rule

TITLES = ["Red shoe", "blue SHOE, blue", "", "tea (1995)", "green tea", "Red tea pot", "shoe"]
TEXTS = [f"{title} | {kind}" for title, kind in zip(TITLES, ["shoes", "shoes", "", "food", "food", "home", "shoes"],
                                                    strict=True)]
UNTUNED = [name for name in BASELINES if not name.endswith("tuned mix")]


def dataset(lists):
    """Leave one out: the last event of a user is the test, the one before it the validation target."""
    sizes = [len(part) for part in lists]
    indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    items = Items(ids=np.arange(len(TITLES)).astype(str), texts=TEXTS, titles=TITLES)
    sequences = Sequences(user_ids=np.arange(len(lists)).astype(str), indptr=indptr,
                          items=np.concatenate(lists).astype(np.int32))
    split = Split(train_end=indptr[1:] - 2, valid=indptr[1:] - 2, test=indptr[1:] - 1, description="leave one out")
    return SimpleNamespace(items=items, sequences=sequences, split=split)


def similarity(texts):
    """(7, 7) cosines of TF-IDF vectors, dense."""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    names = sorted({w for part in words for w in part})
    idf = [np.log(8 / (1 + sum(w in part for part in words))) + 1 for w in names]
    table = np.array([[part[w] for w in names] for part in words]) * idf
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    return table @ table.T


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
    follows = Counter(pair for part in train for pair in zip(part, part[1:], strict=False))
    title, text = similarity(TITLES), similarity(TEXTS)

    found = {name: request_scorer(data, name)(data.split.test) for name in UNTUNED}
    for u, part in enumerate(lists):
        past = part[:-1]  # the validation item is history by now
        weights = 0.7 ** np.arange(len(past))[::-1]
        np.testing.assert_array_equal(found["popularity"][u], [count[j] for j in range(7)])
        np.testing.assert_allclose(found["item-kNN"][u], cosine[past[-5:]].sum(0), atol=1e-6)
        np.testing.assert_allclose(found["title TF-IDF"][u], title[past[-5:]].sum(0), atol=1e-6)
        np.testing.assert_allclose(found["kNN with decay"][u], weights @ cosine[past], atol=1e-6)
        np.testing.assert_allclose(found["text with decay"][u], weights @ text[past], atol=1e-6)
        np.testing.assert_array_equal(found["transitions"][u], [follows[past[-1], j] for j in range(7)])
        assert not found["query TF-IDF"][u].any() and not found["query kNN"][u].any()  # the data has no queries


def test_scores_are_never_wide_in_float64():
    """Nor does popularity write the same numbers for each request."""
    width, rng = 50_000, np.random.default_rng(0)
    events = rng.integers(0, width, (40, 30))
    sequences = Sequences(np.arange(40).astype(str), np.arange(0, 1201, 30), events.reshape(-1).astype(np.int32))
    split = Split(sequences.indptr[1:], np.array([], int), sequences.indptr[1:] - 1, "")
    history = recent_history(sequences, split.test, width)
    matrix = training_matrix(sequences, split, width)
    scorers = (popularity(matrix), item_knn(matrix), tf_idf([f"w{i}" for i in range(width)]),
               transitions(transition_counts(sequences, split, width)))
    for scorer, most in zip(scorers, (0.1, 1.5, 1.5, 1.5), strict=True):
        tracemalloc.start()
        found = scorer(history)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.shape == (40, width) and found.dtype == np.float32 and peak < most * 4 * 40 * width


def test_transitions_are_directed_and_stay_within_a_user():
    data = dataset([[0, 1, 1, 5, 5], [1, 2, 5, 5], [3, 4, 4]])  # in training: 0 1 1, 1 2, 3
    counts = transition_counts(data.sequences, data.split, 7).toarray()
    assert list(zip(*np.nonzero(counts), strict=True)) == [(0, 1), (1, 1), (1, 2)] and counts.sum() == 3
    scores = transitions(transition_counts(data.sequences, data.split, 7))(
        recent_history(data.sequences, np.array([1, 5]), 7, last=1))
    assert scores[0].tolist() == [0, 1, 0, 0, 0, 0, 0]  # after item 0
    assert not scores[1].any()  # before the first event of a user there is nothing to go on from


def test_history_weights():
    data = dataset([[0, 1, 0, 2, 3]])
    found = recent_history(data.sequences, np.array([4, 2]), 7, last=3, decay=0.5).toarray()
    assert found[0].tolist() == [0.5, 0.25, 1, 0, 0, 0, 0] and found[1].tolist() == [0.5, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", UNTUNED)
def test_only_the_training_part_is_fitted(name):
    """Scores of validation requests, which read the training part alone, do not move with what came later."""
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 7, rng.integers(4, 9)).tolist() for _ in range(20)]
    one = dataset(lists)
    two = dataset([part[:-2] + rng.integers(0, 7, 2).tolist() for part in lists])
    assert (one.sequences.items != two.sequences.items).any()
    np.testing.assert_array_equal(*(request_scorer(data, name)(data.split.valid) for data in (one, two)))
    leaked = dataset(lists)  # the check would notice: the same with everything in the training part
    leaked.split.train_end = leaked.sequences.indptr[1:]
    moved = not np.array_equal(*(request_scorer(data, name)(data.split.valid) for data in (one, leaked)))
    assert moved == (name not in ("title TF-IDF", "text with decay", "query TF-IDF", "query kNN"))


def test_seen_before():
    data = dataset([[0, 1, 2], [5, 5, 6, 3]])
    indptr, items = seen_before(data.sequences, np.array([6, 0, 2, 4]))
    assert indptr.tolist() == [0, 3, 3, 5, 6] and items.tolist() == [5, 5, 6, 0, 1, 5]


@given(histories)
@settings(max_examples=30, deadline=None)
def test_chosen_before_equals_loops(lists):
    sequences = dataset(lists).sequences
    positions = np.arange(len(sequences.items))[::-1]
    wanted = [item in part[:at] for part in lists for at, item in enumerate(part)][::-1]
    assert sequences.chosen_before(positions).tolist() == wanted


@given(histories)
@settings(max_examples=30, deadline=None)
def test_slices_change_nothing_and_bound_what_is_written_out(lists):
    data = dataset(lists)
    positions, before = np.arange(len(data.sequences.items))[::-1], data.sequences.chosen_before
    rng = np.random.default_rng(0)
    users, vectors = (rng.integers(-2, 3, (n, 3)).astype(np.float32) for n in (len(positions), 7))

    def found(catalogue):
        ranks = [held_out_ranks(data.sequences, positions, users, catalogue, **options)
                 for options in ({}, {"largest_k": 2}, {"mask_seen": False})]
        ranks.append(rank_requests(data, positions, lambda p: vectors[:7, :1].T.repeat(len(p), axis=0)))
        return [before(positions).tolist(), *([x.greater.tolist(), x.ties.tolist(), x.candidates.tolist()]
                                              for x in ranks)]

    whole, sizes, packed = found(vectors), [], []

    def noted(real, size):
        return lambda *given: sizes.append(size(given)) or real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "PAIRS", 9)
        patch.setattr("karma_fast.baselines.rows.BLOCK_BYTES", 4 * 7)
        patch.setattr(schema, "numbered", noted(schema.numbered, lambda given: int(given[0].sum())))
        for module in (held_out, rows):
            patch.setattr(module, "seen_before", noted(seen_before, lambda given: int(
                (given[1] - given[0].indptr[given[0].user_of(given[1])]).sum())))
        patch.setattr(Catalogue, "passing", lambda rows: packed.append(rows) or Catalogue(rows))
        parts = list(flat.slices(positions - data.sequences.indptr[data.sequences.user_of(positions)]))
        assert found(vectors) == whole and found(Catalogue(vectors)) == whole
    assert max(sizes) <= 9 and parts[0].start == 0 and parts[-1].stop == len(positions)
    assert len(packed) == (1 if len(parts) > 1 else 3)  # seen items kept: all requests in one go, as ever


@pytest.mark.parametrize("masked", [True, False])
def test_a_target_chosen_before_is_no_hit_among_unseen_items(masked):
    data = dataset([[0, 1, 2, 0], [3, 4, 5, 6], [1, 2, 6, 1]])  # users 0 and 2 come back to an item
    one_hot = sparse.identity(7, dtype=np.float32).tocsr()
    near = np.stack([one_hot[data.sequences.history(p, 9)].toarray().sum(axis=0) for p in data.split.test])
    vectors = np.eye(7, dtype=np.float32)  # scores mark the history and nothing else
    ranks = [held_out_ranks(data.sequences, data.split.test, near.astype(np.float32), vectors, mask_seen=masked),
             rank_requests(data, data.split.test, lambda p: near.astype(np.float32), mask_seen=masked)]
    for found in ranks:
        wanted = [4.0, 1.5, 4.0] if masked else [1.0, 4.5, 1.0]
        assert found.expected.tolist() == wanted and found.candidates.tolist() == ([5, 4, 5] if masked else [7] * 3)
        assert found.ties.tolist() == ([0, 3, 0] if masked else [2, 3, 2])
    limited = held_out_ranks(data.sequences, data.split.test, near.astype(np.float32), vectors, mask_seen=masked,
                             largest_k=2)
    assert limited.greater.tolist() == ([2, 0, 2] if masked else [0, 2, 0])
    data.name, ranked = "shop", "ranked against all 7 items"
    assert ranking_rule(data, data.split.test, masked) == f"shop: 3 requests {ranked}, " + (
        "seen items left out (2 targets chosen before count as missed)" if masked else "seen items kept"
    ) + ", ties count half"
    assert ranking_rule(data, data.split.test[1:2], True) == f"shop: 1 requests {ranked}, seen items left out, " \
        "ties count half"


def test_rows():
    # users 0 to 2 teach that 4 follows 3; user 3 is asked after [3, 0] and chooses 4
    data = dataset([[3, 4, 0, 1], [3, 4, 1, 0], [3, 4, 2, 2], [6, 3, 0, 4]])
    position = data.split.test[3:]
    rows = baseline_rows(data, position, ks=(1, 2))
    assert list(rows) == list(DEFAULT) == ["popularity", "item-kNN", "title TF-IDF"]
    # 3 is more popular, but was chosen already
    assert rows["popularity"]["HR@1"] == 1 and rows["item-kNN"]["HR@1"] == 1
    assert baseline_rows(data, position, ks=(1, 2), mask_seen=False)["popularity"]["HR@1"] == 0
    # after "shoe", "tea (1995)" and "Red shoe", "Red tea pot" is nearer than "green tea"
    assert rows["title TF-IDF"]["HR@1"] == 0
    assert list(baseline_rows(data, position, names=("transitions", "tuned mix"))) == ["transitions", "tuned mix"]
    with pytest.raises(ValueError, match="'itemknn'; take some of popularity"):
        baseline_rows(data, position, names=("itemknn",))


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    data = dataset([rng.integers(0, 7, rng.integers(3, 9)) for _ in range(20)])
    whole = baseline_rows(data, data.split.test, ks=(1, 3), names=UNTUNED)
    monkeypatch.setattr("karma_fast.baselines.rows.BLOCK_BYTES", 3 * 4 * 7)
    for name, row in baseline_rows(data, data.split.test, ks=(1, 3), names=UNTUNED).items():
        assert row == pytest.approx(whole[name])


def test_empty_parts():
    data = dataset([[0, 1], [2, 3, 4]])  # the first user has no training part, and one item of history
    for row in baseline_rows(data, data.split.test, ks=(1,), names=BASELINES).values():
        assert all(np.isfinite(value) for value in row.values())
    matrix = training_matrix(data.sequences, data.split, 7)
    none = recent_history(data.sequences, np.array([0]), 7)  # no history at all
    assert not item_knn(matrix)(none).any() and not tf_idf(TITLES)(none).any()
    assert popularity(matrix)(none).tolist() == [[0, 0, 1, 0, 0, 0, 0]]
    assert not tf_idf(["", ""])(none[:, :2]).any()


def asked(lists, queries, texts):
    """`dataset` with the number of each event's query, -1 for none."""
    data = dataset(lists)
    data.sequences.queries, data.sequences.query_texts = np.array(queries, np.int32), texts
    return data


def test_queries_are_compared_with_texts_and_do_not_count():
    data = asked([[0, 1, 3, 2, 4]], [-1, 0, 1, 2, -1], [TEXTS[5], "zeppelin", "TEA zeppelin"])
    found = request_scorer(data, "query TF-IDF")(np.arange(5))
    assert found.dtype == np.float32 and found.shape == (5, 7)
    np.testing.assert_allclose(found[1], similarity(TEXTS)[5], atol=1e-6)
    assert not found[[0, 2, 4]].any()
    vector = tf_idf_vectors(TEXTS, ["tea zeppelin"]).toarray()  # in which the unknown word has a length
    np.testing.assert_allclose(found[3], vector[:7] @ vector[7], atol=1e-6)


def knn_by_hand(data, position: int, sharpness: int) -> np.ndarray:
    sequences, found, texts = data.sequences, np.zeros(7), {}
    for u, end in enumerate(data.split.train_end):
        for p in range(sequences.indptr[u], end):
            if sequences.queries[p] >= 0:
                texts.setdefault(sequences.query_texts[sequences.queries[p]], []).append(sequences.items[p])
    of_all = tf_idf_vectors([*texts], [sequences.query_texts[sequences.queries[position]]]).toarray()
    for n, items in enumerate(texts.values()):
        np.add.at(found, items, (of_all[n] @ of_all[-1]) ** sharpness)
    return found / found.max()


@pytest.mark.parametrize("sharpness", [1, 8])
def test_query_knn_counts_what_was_chosen_after_such_queries(sharpness, monkeypatch):
    lists = [[0, 1, 3, 2], [2, 3, 3, 4, 5, 1], [6, 0, 5, 3]]
    texts = ["red shoe", "red tea", "tea", "never seen", "shoe"]
    data = asked(lists, [0, 1, 2, 4, 1, 0, -1, 0, 2, 1, 4, 1, 3, -1], texts)
    for pairs in (1, 1 << 24):  # in blocks, and at once
        monkeypatch.setattr("karma_fast.baselines.query.NEIGHBOURS", pairs)
        scorer = query_knn_scorer(data, sharpness)
        found = scorer(np.array([2, 3, 8, 12, 13]))
        assert found.dtype == np.float32 and found.shape == (5, 7)
        for row, position in zip(found[:3], (2, 3, 8), strict=True):
            np.testing.assert_allclose(row, knn_by_hand(data, position, sharpness), atol=1e-6)
        assert not found[3:].any()  # words that nobody asked for in training; no query
    np.testing.assert_array_equal(scorer(np.array([9])), scorer(np.array([11])))


def test_query_knn_reads_the_training_part_alone():
    lists, queries = [[0, 1, 3, 2], [2, 3, 3, 4, 5, 1]], [0, 1, 2, 1, 0, 2, 1, 1, 2, 0]
    data, other = asked(lists, queries, ["red", "tea", "pot"]), asked(lists, queries, ["red", "tea", "pot"])
    at = data.split.valid
    later = np.arange(10) >= np.repeat(data.split.train_end, [4, 6])
    other.sequences.items[later], other.sequences.queries[later & ~np.isin(np.arange(10), at)] = 6, 0
    np.testing.assert_array_equal(query_knn_scorer(data)(at), query_knn_scorer(other)(at))
    other.split.train_end = other.sequences.indptr[1:]
    assert not np.array_equal(query_knn_scorer(data)(at), query_knn_scorer(other)(at))


def test_rows_of_queries():
    lists = [[0, 1, 3], [2, 5, 4], [6, 0, 5]]
    data = asked(lists, [-1] * 8 + [0], ["red pot"])  # the last user's last item was searched for
    rows = baseline_rows(data, data.split.test, ks=(1,))
    assert list(rows) == [*DEFAULT, "query TF-IDF", "query kNN"]
    assert rows["query TF-IDF"]["HR@1"] == pytest.approx(1 / 3)
    assert list(baseline_rows(data, data.split.test[:2], ks=(1,))) == list(DEFAULT)  # these have no query
    assert list(baseline_rows(data, data.split.test, ks=(1,), names=("popularity",))) == ["popularity"]


def test_the_weight_of_the_query_is_the_first_of_the_best_on_validation():
    # three validation requests; the history's score prefers item 6, that no one chooses then
    lists = [[0, 1, 3], [2, 5, 4], [4, 0, 5]]
    data = asked(lists, [-1, 0, -1, -1, 1, -1, -1, 2, -1], [TEXTS[1], TEXTS[5], TEXTS[0]])
    history = lambda p: np.tile(np.float32([0, 0, 0, 0, 0, 0, 0.2]), (len(p), 1))  # noqa: E731
    found = tune_query(data, history, query_scorer(data))
    by_weight = {}
    for weight in QUERY_WEIGHTS:
        ranks = rank_requests(data, data.split.valid, lambda p, w=weight: history(p) + w * query_scorer(data)(p))
        by_weight[weight] = np.where(ranks.expected < 10, 1 / np.log2(ranks.expected + 2), 0).mean()
    assert by_weight[1.0] == max(by_weight.values()) == by_weight[10.0] > by_weight[0.3]
    assert found.weight == 1 and found.metrics["NDCG@10"] == pytest.approx(by_weight[1.0])
    assert (found.requests, found.tried) == (3, len(QUERY_WEIGHTS))
    np.testing.assert_allclose(found.scorer(np.array([1])), history([1]) + query_scorer(data)(np.array([1])))
    assert tune_query(data, history, query_scorer(data), users=2, seed=1).requests == 2
    data.split.valid = np.array([], np.int64)
    with pytest.raises(ValueError, match="no validation request to choose weights on"):
        tune_query(data, history, query_scorer(data))
