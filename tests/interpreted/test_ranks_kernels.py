"""The shipped Triton kernels of ranks, interpreted: scores and counts are those of the definition.

The interpreter rounds fma twice, so there the kernels compute it through float64 (``EMULATED``); the compile gate sees
that a GPU gets ``fma.rn.f32``. Products of float16 are exact in both.
"""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from karma_kernels.ranks import count_ranks, launch, pair_scores, parts, reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def vectors(rows, width, seed=0, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def to_float32(x: Fraction) -> np.float32:
    """The nearest float32, ties to even, subnormal ones included."""
    near = np.float32(float(x))
    options = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(options, key=lambda f: (abs(Fraction(float(f)) - x), int(f.view(np.int32)) & 1))


def by_fractions(q, x) -> float:
    acc = np.float32(0)
    for a, b in zip(q.tolist(), x.tolist(), strict=True):
        acc = to_float32(Fraction(a) * Fraction(b) + Fraction(float(acc)))
    return float(acc)


def problem(num_queries, num_items, width, targets=1, dtypes=(torch.float32, torch.float32), seed=0):
    """(queries, items, query_rows, item_rows), with copies of items: each target ties with some."""
    queries, items = vectors(num_queries, width, seed, dtypes[0]), vectors(num_items, width, seed + 1, dtypes[1])
    items[num_items // 2:] = items[:num_items - num_items // 2].clone()
    rows = torch.arange(num_queries).repeat_interleave(targets)
    return queries, items, rows, torch.arange(len(rows)) * 7 % num_items


def check(queries, items, rows, chosen, workspace_bytes=1 << 20, ways=(True, False)):
    scores = launch.pair_scores(queries, items, rows, chosen)
    assert torch.equal(scores, reference.pair_scores(queries, items, rows, chosen))
    expected = reference.count_ranks(queries, items, rows, scores)
    for filtered in ways:
        found = parts.count_ranks(queries, items, rows, scores, workspace_bytes, filtered)
        assert found[0].dtype == found[1].dtype == torch.int64
        assert [x.tolist() for x in found] == [x.tolist() for x in expected]
    return scores, expected


@pytest.fixture
def calls(monkeypatch):
    """What was launched, in order: "filter", ("resolve", pairs) or "exact"."""
    made = []

    def watch(name):
        original = getattr(parts, f"launch_{name}")

        def spy(*args):
            made.append((name, args[5]) if name == "resolve" else name)
            return original(*args)

        monkeypatch.setattr(parts, f"launch_{name}", spy)

    for name in ("filter", "resolve", "exact"):
        watch(name)
    return made


@pytest.mark.parametrize("scale", [1.0, 2.0**-72, 2.0**60])
def test_the_definition_is_a_chain_of_fma(scale):
    """Sums of subnormal numbers too, where rounding twice is easily wrong."""
    queries, items = vectors(6, 9), vectors(7, 9, 1)
    queries[0], items[0] = 1.0, torch.tensor([2.0**-24, 1.0] * 4 + [2.0**-24])  # each step in the middle
    rows, chosen = (x.reshape(-1) for x in torch.meshgrid(torch.arange(6), torch.arange(7), indexing="ij"))
    queries, items = queries * scale, items * scale
    expected = [by_fractions(queries[i], items[j]) for i, j in zip(rows, chosen, strict=True)]
    assert reference.pair_scores(queries, items, rows, chosen).tolist() == expected
    assert launch.pair_scores(queries, items, rows, chosen).tolist() == expected


@pytest.mark.parametrize("scale", [1.0, 2.0**-60])
def test_scores_round_once(scale):
    """The float64 sum is the middle of two float32; the true sum lies just below it, or just above."""
    m = next(m for m in range(2**22 + 1, 2**23) if 0 < -(2**46) % m < 2**16)
    n = -(-(2**46) // m)  # m n is a little more than 2^46
    for q, x in (([1, 2.0**-12 * (1 + 2.0**-15)], [1 + 2.0**-23, 2.0**-12 * (1 - 2.0**-15)]),
                 ([1, m * 2.0**-35], [1, n * 2.0**-35])):
        for sign in (1, -1):
            queries, items = torch.tensor([q]) * scale * sign, torch.tensor([x]) * scale
            exact = by_fractions(queries[0], items[0])
            assert (queries.double() * items.double()).sum().float().item() != exact
            for scores in (reference.pair_scores, launch.pair_scores):
                assert scores(queries, items, ROWS[:1], ROWS[:1]).item() == exact


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, repeat=2)))
def test_every_pair_of_dtypes(dtypes):
    check(*problem(19, 37, 20, dtypes=dtypes))


@pytest.mark.parametrize("num_queries,num_items,width,targets", [
    (1, 1, 1, 1), (3, 5, 1, 1), (17, 40, 7, 1), (5, 33, 65, 4), (16, 32, 64, 2), (2, 16, 130, 16)])
def test_sizes_that_fill_no_block(num_queries, num_items, width, targets, calls):
    check(*problem(num_queries, num_items, width, targets))
    assert calls[0] == "filter" and calls[-1] == "exact" and calls.count("exact") == 1


def test_the_filter_leaves_few_pairs(calls):
    queries, items, rows, _ = problem(16, 96, 33)
    items[48:] = vectors(48, 33, 5)
    _, (_, equal) = check(queries, items, rows, torch.arange(16), ways=(True,))
    assert equal.tolist() == [1] * 16
    assert calls[0] == "filter" and calls[1][0] == "resolve" and 16 <= calls[1][1] < 16 + 16 and len(calls) == 2


def test_near_ties_are_told_apart():
    items = vectors(1, 40).repeat(60, 1)
    items[torch.arange(60), torch.arange(60) % 40] *= 1 + 2.0**-22  # off by the last bits
    check(vectors(5, 40, 2), items, torch.arange(5), torch.arange(5))


def test_a_part_with_many_copies_is_counted_exactly(calls):
    queries, items = vectors(9, 24), vectors(1, 24, 1).repeat(80, 1)
    scores, (greater, equal) = check(queries, items, torch.arange(9), torch.arange(9), 1 << 9, (True,))
    assert equal.tolist() == [80] * 9 and greater.tolist() == [0] * 9
    assert "exact" in calls


@pytest.mark.parametrize("workspace_bytes", [1, 3000, 12000])
def test_any_workspace(workspace_bytes, calls):
    """One byte: a tile of each, and room for one close pair."""
    check(*problem(9, 41, 20, targets=2), workspace_bytes=workspace_bytes)
    assert calls.count("filter") > 1


@pytest.mark.parametrize("workspace_bytes", [1, 3000, 12001, 50000, 64 << 20])
def test_columns_begin_at_16_bytes(workspace_bytes, monkeypatch):
    """Else the kernel would read them number by number; no column is left out for it."""
    begin, columns = [], launch.columns
    monkeypatch.setattr(launch, "columns", lambda *args: begin.append(columns(*args)) or begin[-1])
    check(*problem(19, 37, 21), workspace_bytes=workspace_bytes, ways=(False,))
    assert begin and {x.data_ptr() % 16 for x in begin} == {0}


def test_groups_of_targets_are_made_smaller(monkeypatch, calls):
    """40 targets with 4 close pairs each, in 40 x 128 scores, and room for 96."""
    monkeypatch.setattr(parts.Plan, "of", lambda *_: parts.Plan(48, 128, 96, 1 << 14))
    items = vectors(128, 16)
    items[40:80], items[80:120] = items[:40].clone(), items[:40].clone()
    check(vectors(40, 16, 1), items, torch.arange(40), torch.arange(40), ways=(True,))
    assert calls.count("exact") == 0 and calls[:2] == ["filter", "filter"]  # the first held too many
    assert [x for x in calls if x == "filter"] == ["filter"] * (1 + sum(x[0] == "resolve" for x in calls))
    assert sum(x[1] for x in calls if x[0] == "resolve") >= 120


@pytest.mark.parametrize("query_scale,item_scale", [(1e-30, 1e30), (1e30, 1e-38), (1e-25, 1e-20), (1e18, 1e18)])
def test_any_magnitude(query_scale, item_scale):
    queries, items, rows, chosen = problem(9, 33, 20)
    check(queries * query_scale, items * item_scale, rows, chosen)
    items[::3] *= 1e-6  # rows of very different lengths side by side
    queries[::2] *= 1e-6
    check(queries * query_scale, items * item_scale, rows, chosen)


def test_zeros_of_either_sign_are_level():
    queries, items = vectors(3, 6), vectors(20, 6, 1)
    items[4], items[9] = 0.0, -0.0
    queries[1] = 0.0
    rows = torch.tensor([0, 0, 1, 2])
    for zero in (0.0, -0.0):
        scores = torch.full((4,), zero)
        expected = [[int((reference.chain(queries[r], items) > 0).sum()) for r in rows], [2, 2, 20, 2]]
        for filtered in (True, False):
            found = parts.count_ranks(queries, items, rows, scores, 1 << 20, filtered)
            assert [x.tolist() for x in found] == expected


@pytest.mark.parametrize("score,above", [(3e38, 0), (-3e38, 50), (float("inf"), 0), (1e-45, None)])
def test_scores_that_no_item_has(score, above):
    queries, items = vectors(2, 8), vectors(50, 8, 1)
    scores = torch.full((2,), score)
    expected = reference.count_ranks(queries, items, torch.arange(2), scores)
    assert above is None or expected[0].tolist() == [above] * 2
    for filtered in (True, False):
        found = parts.count_ranks(queries, items, torch.arange(2), scores, 1 << 20, filtered)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_layouts():
    queries, items, rows, chosen = problem(9, 30, 12)
    whole = check(queries, items, rows, chosen)
    for change in (lambda x: x.t().contiguous().t(), lambda x: x.repeat_interleave(2, 0)[::2],
                   lambda x: torch.cat([x, x], 1)[:, :x.shape[1]]):
        scores, counts = check(change(queries), change(items), rows, chosen)
        assert torch.equal(scores, whole[0]) and all(torch.equal(a, b) for a, b in zip(counts, whole[1], strict=True))


def test_what_was_not_written_is_not_read(monkeypatch):
    empty = torch.empty

    def dirty(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else 1 << 14)

    monkeypatch.setattr(torch, "empty", dirty)
    check(*problem(19, 37, 20))


def test_a_listed_pair_reaches_the_last_rows():
    """16 bits for each side of an int32: the sign bit is one of them."""
    last = launch.LISTED_ROWS - 1
    items, scores = torch.arange(last + 1.0)[:, None], torch.full((last + 1,), last - 0.5)
    greater, equal = torch.zeros((2, last + 1), dtype=torch.int64)
    wanted = torch.tensor([[last, last], [1 << 15, last - 1], [0, last], [last, 3]])
    pairs = ((wanted[:, 0] << 16) + wanted[:, 1]).to(torch.int32)
    launch.launch_resolve(torch.ones(1, 1), items, torch.zeros(last + 1, dtype=torch.int64), scores, pairs, 4, greater,
                          equal)
    assert greater.nonzero().flatten().tolist() == [0, last] and greater.sum() == 2 and equal.sum() == 0


def test_no_targets_and_no_items():
    queries, items, rows, chosen = problem(3, 5, 4)
    for filtered in (True, False):
        assert [len(x) for x in parts.count_ranks(queries, items, rows[:0], torch.zeros(0), 1, filtered)] == [0, 0]
        assert [x.tolist() for x in parts.count_ranks(queries, items[:0], rows, torch.zeros(3), 1, filtered)] == [
            [0, 0, 0]] * 2
    assert len(launch.pair_scores(queries, items, rows[:0], chosen[:0])) == 0


X = vectors(4, 3)
ROWS = torch.tensor([0, 1])


@pytest.mark.parametrize("change,error,message", [
    ({"queries": X.double()}, TypeError, "queries: got torch.float64"),
    ({"items": X.numpy()}, TypeError, "items: got ndarray"),
    ({"items": X[0]}, ValueError, r"items: got shape \(3,\)"),
    ({"items": X[:, :2]}, ValueError, "queries have width 3 and items 2"),
    ({"query_rows": ROWS.int()}, TypeError, "query_rows: got torch.int32"),
    ({"query_rows": ROWS + 3}, ValueError, "query_rows: got 3 to 4; with 4 rows 0 to 3"),
    ({"query_rows": ROWS[None]}, ValueError, r"query_rows: got shape \(1, 2\)"),
    ({"scores": X[0, :2].double()}, TypeError, "scores: got torch.float64"),
    ({"scores": X[0]}, ValueError, r"scores: got shape \(3,\)"),
    ({"workspace_bytes": 0}, ValueError, "workspace_bytes: got 0"),
    ({"items": X.to("meta")}, ValueError, "queries are on cpu and items on meta"),
])
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        count_ranks(**({"queries": X, "items": X, "query_rows": ROWS, "scores": X[0, :2]} | change))


def test_pair_scores_refuses_rows_beyond():
    with pytest.raises(ValueError, match="item_rows: got 0 to 4"):
        pair_scores(X, X, ROWS, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="2 query_rows and 1 item_rows"):
        pair_scores(X, X, ROWS, torch.tensor([0]))
    assert torch.equal(pair_scores(X, X, ROWS, ROWS), torch.stack([reference.chain(x, x) for x in X[:2]]))
