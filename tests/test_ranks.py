"""Ranks, top-k and metrics against counting one by one with exact arithmetic."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karma_fast import retrieval
from karma_fast.evaluation import counting, scores, torch_ranks
from karma_fast.evaluation.csr import csr_from_lists, csr_ranges, csr_rows
from karma_fast.evaluation.metrics import ranking_metrics
from karma_fast.evaluation.ranks import Ranks, rank_scores, target_ranks, top_k
from karma_fast.evaluation.scores import pair_scores


def to_float32(x: Fraction) -> np.float32:
    """The nearest float32, ties to even."""
    near = np.float32(float(x))
    options = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(options, key=lambda f: (abs(Fraction(float(f)) - x), f.view(np.int32) & 1))


def defined_score(q, x) -> np.float32:
    acc = np.float32(0)
    for a, b in zip(q, x, strict=True):
        acc = to_float32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(acc)))
    return acc


def count(queries, items, targets, seen=None):
    """greater, ties, candidates one by one from the defined scores."""
    out = []
    for q, own in enumerate(targets):
        table = [defined_score(queries[q], x) for x in items]
        kept = [j for j in range(len(items)) if j in own or seen is None or j not in seen[q]]
        for t in own:
            others = [table[j] for j in kept if j != t]
            out.append((sum(s > table[t] for s in others), sum(s == table[t] for s in others), len(kept)))
    return [list(column) for column in zip(*out, strict=True)]


def vectors(rows, width, seed, coarse=False):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    return np.round(x * 2) / 2 if coarse else x


def as_lists(r):
    return [r.greater.tolist(), r.ties.tolist(), r.candidates.tolist()]


def test_scores_are_chains_of_fma():
    q, x = vectors(7, 13, 0), vectors(9, 13, 1)
    rows, columns = (a.reshape(-1) for a in np.indices((7, 9)))
    expected = [defined_score(q[i], x[j]) for i, j in zip(rows, columns, strict=True)]
    assert np.array_equal(pair_scores(q, x, rows, columns), expected)


def test_score_rounds_once():
    """The float64 sum is the middle of two float32, the true sum lies just below it."""
    q = np.array([[1, 2.0**-12 * (1 + 2.0**-15)]], np.float32)
    x = np.array([[1 + 2.0**-23, 2.0**-12 * (1 - 2.0**-15)]], np.float32)
    assert np.float32(q.astype(np.float64) @ x.T.astype(np.float64)) == np.float32(1 + 2.0**-22)
    for sign in (1, -1):
        once = sign * np.float32(1 + 2.0**-23)
        assert pair_scores(sign * q, x, [0], [0]) == once == defined_score(sign * q[0], x[0])


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_ranks_equal_counting(num_queries, num_items, width, seed, coarse, data):
    queries, items = vectors(num_queries, width, seed, coarse), vectors(num_items, width, seed + 1, coarse)
    catalogue = st.integers(0, num_items - 1)
    targets = data.draw(st.lists(st.lists(catalogue, min_size=1, unique=True), min_size=num_queries,
                                 max_size=num_queries))
    seen = data.draw(st.none() | st.lists(st.lists(catalogue), min_size=num_queries, max_size=num_queries))
    pair = None if seen is None else csr_from_lists(seen)
    found = target_ranks(queries, items, csr_from_lists(targets), seen=pair)
    assert as_lists(found) == count(queries, items, targets, seen)
    firsts = [own[0] for own in targets]
    found = target_ranks(queries, items, firsts, seen=pair)
    assert as_lists(found) == count(queries, items, [[t] for t in firsts], seen)


@given(st.integers(1, 4), st.integers(1, 10), st.integers(1, 12), st.integers(0, 10**6), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_top_k_equals_sorting(num_queries, num_items, k, seed, coarse, data):
    queries, items = vectors(num_queries, 4, seed, coarse), vectors(num_items, 4, seed + 1, coarse)
    seen = data.draw(st.lists(st.lists(st.integers(0, num_items - 1)), min_size=num_queries, max_size=num_queries))
    values, found = top_k(queries, items, k, seen=csr_from_lists(seen))
    for q in range(num_queries):
        kept = sorted((-defined_score(queries[q], items[j]), j) for j in range(num_items) if j not in seen[q])[:k]
        kept += [(math.inf, -1)] * (k - len(kept))
        assert values[q].tolist() == [-s for s, _ in kept] and found[q].tolist() == [j for _, j in kept]


def test_blocks_and_threads_change_nothing(monkeypatch):
    queries, items = vectors(23, 31, 0), vectors(57, 31, 1)
    items[40:] = items[:17]  # copies in other panels
    targets, seen = np.arange(23) * 2, csr_from_lists([[i, i, i + 1, 56] for i in range(23)])
    whole, best = target_ranks(queries, items, targets, seen=seen), top_k(queries, items, 9, seen=seen)
    assert (whole.ties > 0).any()
    monkeypatch.setattr(counting, "BLOCK", 5)
    monkeypatch.setattr(torch_ranks, "ITEM_PANEL", 7)
    monkeypatch.setattr(torch_ranks, "ROW_BYTES", 3000)
    monkeypatch.setattr(scores, "PAIRS", 3)
    for threads in (1, 2):
        assert as_lists(target_ranks(queries, items, targets, seen=seen, threads=threads)) == as_lists(whole)
    assert all(np.array_equal(a, b) for a, b in zip(top_k(queries, items, 9, seen=seen), best, strict=True))
    several = csr_from_lists([[i, i + 20, i + 30] for i in range(23)])  # blocks end between queries
    assert as_lists(target_ranks(queries, items, several)) == count(queries, items, [[i, i + 20, i + 30]
                                                                                     for i in range(23)])
    assert torch.get_num_threads() >= 1


def test_copies_always_tie():
    """Copies of the target at every place of the catalogue, at an odd width, never above or below it."""
    queries, items = vectors(50, 257, 0), vectors(400, 257, 1)
    items[1::2] = items[0]
    found = target_ranks(queries, items, np.zeros(50, int))
    assert (found.ties == 200).all()


def test_near_ties_are_told_apart():
    items = np.tile(vectors(1, 64, 0), (100, 1))
    items[np.arange(100), np.arange(100) % 64] *= np.float32(1 + 2.0**-22)  # off by the last bits
    queries = vectors(5, 64, 2)
    assert as_lists(target_ranks(queries, items, [3] * 5)) == count(queries, items, [[3]] * 5)


def test_a_collapsed_model_is_in_the_middle_and_loud():
    same = np.ones((101, 8), np.float32)
    found = target_ranks(same[:4], same, [0, 50, 99, 100])
    assert found.expected.tolist() == [50] * 4
    with pytest.warns(UserWarning, match="100% of the queries.*collapsed"):
        metrics = ranking_metrics(found, (50, 51), num_items=101)
    assert metrics == {"HR@50": 0, "HR@51": 1, "NDCG@50": 0, "NDCG@51": pytest.approx(1 / math.log2(52)),
                       "MRR": pytest.approx(1 / 51), "AUC": 0.5, "tie_share": 1}


def test_half_precision_tensors():
    queries, items = torch.randn(4, 6).bfloat16(), torch.randn(9, 6).bfloat16()
    found = target_ranks(queries, items, torch.arange(4))
    assert as_lists(found) == count(queries.float().numpy(), items.float().numpy(), [[0], [1], [2], [3]])
    assert found.greater.dtype == found.ties.dtype == found.candidates.dtype == np.int64


def test_rank_scores_is_the_same_count():
    queries, items = vectors(9, 5, 0, coarse=True), vectors(30, 5, 1, coarse=True)  # exact in any arithmetic
    targets = csr_from_lists([[i, i + 3] for i in range(9)])
    seen = csr_from_lists([[i, 29] for i in range(9)])
    assert as_lists(rank_scores(queries @ items.T, targets, seen)) == as_lists(target_ranks(queries, items, targets,
                                                                                            seen=seen))
    given_scores = torch.tensor([[1.0, 2.0]])
    rank_scores(given_scores, [0])
    assert torch.equal(given_scores, torch.tensor([[1.0, 2.0]]))
    for bad in (np.array([[1.0, np.nan]]), np.array([[-np.inf, 1.0]], np.float32), np.array([[1, 2]]), np.ones(3),
                np.ones((1, 0))):
        with pytest.raises(ValueError, match="scores: "):
            rank_scores(bad, [0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rank_scores_compares_what_is_given_without_a_copy(dtype, recwarn):
    rng = np.random.default_rng(0)
    given = torch.from_numpy(np.round(rng.standard_normal((9, 400)) * 4) / 4).to(dtype)
    given[:, 7] = given[:, 3] + 2.0**-40  # another number in float64 alone
    own, left_out = [[i, i + 3] for i in range(9)], [[i, i + 9, 399, 399] for i in range(9)]
    found = rank_scores(given, csr_from_lists(own), csr_from_lists(left_out))
    table = given.double().numpy()
    for t, (q, item) in enumerate((row, item) for row, items in enumerate(own) for item in items):
        kept = [j for j in range(400) if j != item and (j in own[q] or j not in left_out[q])]
        assert found.greater[t] == (table[q, kept] > table[q, item]).sum()
        assert found.ties[t] == (table[q, kept] == table[q, item]).sum() and found.candidates[t] == len(kept) + 1
    same = np.broadcast_to(table[0].astype(np.float32), (64, 400))  # cannot be written to, and need not be
    assert as_lists(rank_scores(same, np.full(64, 5))) == [[x] * 64 for x in (
        (same[0] > same[0, 5]).sum(), (same[0] == same[0, 5]).sum() - 1, 400)]
    assert not recwarn.list


def test_concat():
    one, two = Ranks(*np.array([[1, 2], [0, 0], [9, 9]])), Ranks(*np.array([[3, 4], [0, 0], [9, 9]]), np.array([0, 2]))
    assert as_lists(Ranks.concat([one, one]))[0] == [1, 2, 1, 2] and Ranks.concat([one, one]).indptr is None
    both = Ranks.concat([one, two])
    assert both.indptr.tolist() == [0, 1, 2, 4] and len(both) == 3
    with pytest.raises(ValueError, match="empty"):
        Ranks.concat([])


Q, N = vectors(2, 3, 0), vectors(4, 3, 1)
NAN = np.where(np.arange(3) == 1, np.nan, Q).astype(np.float32)


@pytest.mark.parametrize("change,message", [
    ({"queries": NAN}, "queries: NaN or infinite"),
    ({"items": N * np.float32(np.inf)}, "items: NaN or infinite"),
    ({"queries": Q * np.float32(1e30), "items": N * np.float32(1e30)}, "overflow float32"),
    ({"queries": Q[0]}, r"queries: got shape \(3,\)"),
    ({"queries": Q.astype(np.float64)}, "dtype torch.float64"),
    ({"items": N.astype(int)}, "items: got shape .* dtype torch.int64"),
    ({"items": N[:, :2]}, "queries have width 3 and items 2"),
    ({"queries": Q[:, :0], "items": N[:, :0]}, "width 0"),
    ({"items": N[:0]}, "catalogue is empty"),
    ({"targets": [0]}, "got 1 for 2 queries"),
    ({"targets": [0, 4]}, "targets: got items 0 to 4; the catalogue has 0 to 3"),
    ({"targets": [0, -1]}, "targets: got items -1 to 0"),
    ({"targets": [0.0, 1.0]}, "targets: got shape .* float64"),
    ({"targets": ([0, 1, 1], [2])}, "query 1 has none"),
    ({"targets": ([0, 2, 3], [2, 2, 1])}, "same item twice"),
    ({"targets": ([0, 1], [2])}, "indptr has 2 entries; 3 are needed"),
    ({"seen": [0, 1, 2]}, "a pair"),
    ({"seen": ([1, 1, 1], [0])}, "seen: indptr must rise from 0"),
    ({"seen": ([0, 2, 1], [0])}, "seen: indptr must rise .* not rising"),
    ({"seen": ([0, 1, 2], [0])}, "seen: indptr must rise from 0 to the number of indices"),
    ({"seen": ([0, 1, 2], [0, 4])}, "seen: got items 0 to 4"),
    ({"seen": ([0.0, 1.0, 2.0], [0, 1])}, "seen indptr: got shape"),
    ({"threads": -1}, "threads: got -1"),
])
def test_refusals(change, message):
    arguments = {"queries": Q, "items": N, "targets": [0, 1]} | change
    with pytest.raises(ValueError, match=message):
        target_ranks(**arguments)
    if "targets" not in change:
        arguments.pop("targets")
        with pytest.raises(ValueError, match=message):
            top_k(**arguments, k=2)


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_top_k_refuses_k(k):
    with pytest.raises(ValueError, match="k: got"):
        top_k(Q, N, k)


def test_no_queries():
    found = target_ranks(Q[:0], N, np.zeros(0, int))
    assert len(found) == 0 and top_k(Q[:0], N, 2)[1].shape == (0, 2)
    with pytest.raises(ValueError, match="no queries"):
        ranking_metrics(found)


def test_metrics_of_one_target():
    found = Ranks(np.array([0, 4, 9]), np.array([0, 1, 0]), np.array([11, 11, 10]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = ranking_metrics(found, (4, 5, 6), num_items=11)
    assert metrics["HR@4"] == pytest.approx(1 / 3) and metrics["HR@5"] == pytest.approx(2 / 3)  # 4.5 < 5
    assert metrics["NDCG@5"] == pytest.approx((1 + 1 / math.log2(6.5)) / 3)
    assert metrics["MRR"] == pytest.approx((1 + 1 / 5.5 + 1 / 10) / 3)
    assert metrics["AUC"] == pytest.approx((1 + 0.55 + 0) / 3)
    assert metrics["tie_share"] == pytest.approx(1 / 3) and "recall@5" not in metrics


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6), st.data())
@settings(max_examples=60, deadline=None)
def test_metrics_of_several_targets(num_queries, num_items, seed, data):
    """Against a ranking that is sorted in full: distinct scores, so each place is a whole number."""
    table = np.random.default_rng(seed).permuted(np.tile(np.arange(float(num_items)), (num_queries, 1)), axis=1)
    targets = data.draw(st.lists(st.lists(st.integers(0, num_items - 1), min_size=1, unique=True),
                                 min_size=num_queries, max_size=num_queries))
    metrics = ranking_metrics(rank_scores(table, csr_from_lists(targets)), (1, 3))
    expected = {name: [] for name in ("HR@3", "NDCG@3", "MRR", "recall@3", "AUC")}
    for row, own in zip(table, targets, strict=True):
        hits = [j in own for j in np.argsort(-row)]
        expected["HR@3"].append(any(hits[:3]))
        dcg = sum(h / math.log2(i + 2) for i, h in enumerate(hits[:3]))
        expected["NDCG@3"].append(dcg / sum(1 / math.log2(i + 2) for i in range(min(3, len(own)))))
        expected["MRR"].append(1 / (hits.index(True) + 1))
        expected["recall@3"].append(sum(hits[:3]) / len(own))
        pairs = [row[t] > row[j] for t in own for j in range(num_items) if j not in own]
        expected["AUC"] += [np.mean(pairs)] if pairs else []
    for name, values in expected.items():
        if name in metrics and values:
            assert metrics[name] == pytest.approx(np.mean(values)), name
    assert math.isnan(metrics["AUC"]) == (not expected["AUC"])
    assert ("recall@3" in metrics) == any(len(own) > 1 for own in targets)


def test_own_targets_that_tie_take_one_place_each():
    with pytest.warns(UserWarning):
        metrics = ranking_metrics(rank_scores(np.array([[1.0, 1.0, 0.0, 0.0]]), ([0, 2], [0, 1])), (1, 2))
    assert metrics["recall@1"] == 0.5 and metrics["NDCG@1"] == metrics["NDCG@2"] == metrics["AUC"] == 1
    # level with everything: half of the pairs with others are wrong
    with pytest.warns(UserWarning):
        assert ranking_metrics(rank_scores(np.zeros((1, 6)), ([0, 3], [0, 1, 5])), (1,))["AUC"] == 0.5


@pytest.mark.filterwarnings("ignore:.*collapsed")
def test_missed_targets_share_the_last_places():
    both = Ranks(np.array([0, 4]), np.array([0, 0]), np.array([10, 10]), indptr=np.array([0, 2]))
    lost = both.missed(np.array([True, True]))
    assert lost.expected.tolist() == [8.5, 8.5] and ranking_metrics(lost)["AUC"] == 0
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, (40, 12)).astype(np.float64)
    targets = [rng.permutation(12)[:1 + n % 4].tolist() for n in range(40)]
    which = rng.random(sum(map(len, targets))) < 0.5
    below, flat = scores.copy(), np.repeat(np.arange(40), [len(own) for own in targets])
    below[flat[which], np.concatenate(targets)[which]] = -1
    pair = csr_from_lists(targets)
    found, expected = rank_scores(scores, pair).missed(which), rank_scores(below, pair)
    for name in ("greater", "ties", "candidates"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()
    assert ranking_metrics(found, (3,)) == ranking_metrics(expected, (3,))
    capped = Ranks(np.array([3, 3, 0]), np.array([0, 0, 0]), np.array([10, 10, 10]), np.array([0, 3]), largest_k=3)
    assert capped.missed(np.array([True, False, True])).greater.tolist() == [3, 3, 3]


def test_metric_refusals():
    found = Ranks(np.array([0]), np.array([0]), np.array([5]))
    with pytest.raises(ValueError, match="ks: got"):
        ranking_metrics(found, (0, 1))
    with pytest.raises(ValueError, match="num_items: got 4, but 5"):
        ranking_metrics(found, (1,), num_items=4)


def test_csr_helpers():
    pair = csr_from_lists([[1, 2], [], [3]])
    assert [x.tolist() for x in csr_rows(pair, 1, 99)] == [[0, 0, 1], [3]]
    assert [x.tolist() for x in csr_from_lists([])] == [[0], []]
    values, starts, ends = np.arange(10, 20), np.array([3, 0, 5]), np.array([5, 0, 6])
    assert [x.tolist() for x in csr_ranges(values, starts, ends)] == [[0, 2, 2, 3], [13, 14, 15]]
    with pytest.raises(ValueError, match="range 0 ends before"):
        csr_ranges(values, ends, starts)


def test_counts_fit_where_integers_are_of_32_bits(monkeypatch):
    """np.arange gives such by default with NumPy 1 on Windows."""
    arange = np.arange
    monkeypatch.setattr(np, "arange", lambda *args, dtype=np.int32: arange(*args, dtype=dtype))
    items, last = 2**31 - 1, np.array([2**31 - 2])
    targets = counting.Targets.check(np.repeat(last, 5), 5, items)
    assert targets.starts.dtype == targets.query.dtype == np.int64
    several = counting.Targets.check(([0, 2, 4, 6], [0, items - 1] * 3), 3, items)
    indptr, indices = counting.left_out(([0, 0, 1, 3], [5, 6, items - 1]), several, items)
    assert indptr.tolist() == [0, 0, 1, 2] and indices.tolist() == [5, 6]
    inside = retrieval._member(np.array([[6, 5], [5, 7]]), np.array([2, 1]), (np.array([0, 0, 1, 3]),
                                                                             np.array([5, 6, items - 1])), items)
    assert inside.tolist() == [[True, False], [True, False]]
