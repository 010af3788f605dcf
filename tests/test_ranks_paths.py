"""Every path of the C++ extension that this machine can run gives the numbers of the definition."""

import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karma_fast.evaluation import (
    Catalogue,
    Ranks,
    csr_from_lists,
    native_ranks,
    paths,
    ranking_metrics,
    target_ranks,
    top_k,
)
from karma_fast.evaluation import catalogue as catalogue_module
from karma_fast.evaluation import ranks as ranks_module

pytestmark = pytest.mark.skipif(not paths(), reason="the C++ extension was not built: no C++ compiler")
PATHS = list(paths())
FILTERS = [name for name, meaning in paths().items() if meaning != "exact"]


def vectors(rows, width, seed, coarse=False):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    return np.round(x * 2) / 2 if coarse else x / np.linalg.norm(x, axis=1, keepdims=True)


def numbers(r):
    return [r.greater.tolist(), r.ties.tolist(), r.candidates.tolist()]


def counted(queries, items, targets, seen=None):
    """By plain comparison of float64 scores; for coarse vectors, whose scores are exact in any arithmetic."""
    scores = queries.astype(np.float64) @ items.astype(np.float64).T
    out = []
    for q, own in enumerate(targets):
        left = np.ones(len(items), bool)
        left[[j for j in (seen[q] if seen else []) if j not in own]] = False
        for t in own:
            others = scores[q][left & (np.arange(len(items)) != t)]
            out.append(((others > scores[q, t]).sum(), (others == scores[q, t]).sum(), left.sum()))
    return [list(column) for column in zip(*out, strict=True)]


# more items than a block of any path holds, a last panel with one item, groups that are not full
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows, items, width", [(61, 4097, 3), (7, 9001, 16), (5, 300, 600), (300, 33, 5), (1, 1, 1)])
def test_coarse_vectors_are_counted_in_any_arithmetic(path, rows, items, width):
    queries, catalogue = vectors(rows, width, 0, True), vectors(items, width, 1, True)
    rng = np.random.default_rng(2)
    targets = [rng.choice(items, min(items, 1 + q % 3), replace=False).tolist() for q in range(rows)]
    seen = [rng.integers(0, items, q % 40).tolist() for q in range(rows)]
    found = target_ranks(queries, catalogue, csr_from_lists(targets), seen=csr_from_lists(seen), path=path)
    assert numbers(found) == counted(queries, catalogue, targets, seen)
    firsts = [own[:1] for own in targets]
    found = target_ranks(queries, catalogue, [own[0] for own in targets], path=path, threads=2)
    assert numbers(found) == counted(queries, catalogue, firsts)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_paths_agree_with_torch(path, storage):
    """On vectors whose scores differ in the last bits, with copies and near copies of the targets."""
    items = vectors(2000, 70, 0)
    items[1000:1100] = items[:100]
    items[1100:1200] = items[:100] * np.float32(1 + 2.0**-20)
    items = torch.from_numpy(items).to(getattr(torch, storage))
    queries = torch.from_numpy(vectors(150, 70, 1)).to(getattr(torch, storage))
    queries[:50] = items[:50]
    targets, seen = np.arange(150) * 3 % 200, csr_from_lists([range(q, q + 30) for q in range(150)])
    expected = target_ranks(queries, items, targets, seen=seen, path="torch")
    assert (expected.ties > 0).any()
    assert numbers(target_ranks(queries, items, targets, seen=seen, path=path)) == numbers(expected)
    for k in (1, 7, 2500):
        assert_same(top_k(queries, items, k, seen=seen, path=path), top_k(queries, items, k, seen=seen, path="torch"))


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


@given(st.sampled_from(PATHS), st.integers(1, 40), st.integers(1, 200), st.integers(1, 70), st.integers(0, 10**6),
       st.floats(-18, 18), st.floats(-18, 18), st.booleans(), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_any_shape_and_size(path, rows, items, width, seed, log_q, log_x, mixed, k):
    """Scales over 36 powers of ten, and items whose lengths differ as much."""
    rng = np.random.default_rng(seed)
    queries = (vectors(rows, width, seed) * 10.0**log_q).astype(np.float32)
    catalogue = vectors(items, width, seed + 1) * 10.0**log_x
    if mixed:
        catalogue *= 10.0 ** rng.uniform(-12, 0, (items, 1))
    catalogue = catalogue.astype(np.float32)
    catalogue[rng.random(items) < 0.2] = catalogue[0]
    targets = rng.integers(0, items, rows)
    expected = target_ranks(queries, catalogue, targets, path="torch")
    assert numbers(target_ranks(queries, catalogue, targets, path=path)) == numbers(expected)
    assert_same(top_k(queries, catalogue, k, path=path), top_k(queries, catalogue, k, path="torch"))


@pytest.mark.parametrize("path", PATHS)
def test_tiny_and_huge_numbers(path):
    """Subnormal numbers, which the instructions of the filters take for zero, and the end of float32."""
    rng = np.random.default_rng(0)
    for low, high, shift in ((-46, -37, 0), (-44, -18, 0), (17, 18, 0), (0, 1, 35.5), (0, 1, -35.5), (17, 18, 17)):
        queries, items = ((rng.choice([-1, 1], (n, 9)) * 10.0 ** (s + rng.uniform(low, high, (n, 9))))
                          .astype(np.float32) for n, s in ((20, shift), (300, -shift)))
        targets = rng.integers(0, 300, 20)
        expected = target_ranks(queries, items, targets, path="torch")
        assert numbers(target_ranks(queries, items, targets, path=path)) == numbers(expected)
        torch.set_flush_denormal(True)  # in this thread, but not in those that help it
        try:
            assert numbers(target_ranks(queries, items, targets, path=path, threads=1)) == numbers(expected)
        finally:
            torch.set_flush_denormal(False)
    with pytest.raises(ValueError, match="overflow float32"):
        target_ranks(np.full((1, 4), 1e20, np.float32), np.full((3, 4), 1e20, np.float32), [0], path=path)


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_vanish_when_they_are_rotated(path):
    """A few of the smallest numbers there are, against queries so large that they count."""
    rng = np.random.default_rng(0)
    items = np.where(rng.random((400, 256)) < 0.03, np.float32(1.4e-45), np.float32(0)).astype(np.float32)
    queries = (vectors(40, 256, 1) * 1e20).astype(np.float32)
    targets = np.arange(40)
    expected = target_ranks(queries, items, targets, path="torch")
    assert (expected.greater > 0).any()
    assert numbers(target_ranks(queries, items, targets, path=path)) == numbers(expected)
    assert numbers(target_ranks(items[:40], queries, targets, path=path)) == \
        numbers(target_ranks(items[:40], queries, targets, path="torch"))


@pytest.mark.parametrize("path", PATHS)
def test_more_targets_than_a_list_holds(path):
    queries, items = vectors(2, 4, 0, True), vectors(40_000, 4, 1, True)
    targets = ([0, 40_000, 40_001], np.append(np.arange(40_000), 7))
    found = target_ranks(queries, items, targets, path=path)
    scores = queries.astype(np.float64) @ items.T
    ordered = np.sort(-scores[0])
    above = np.searchsorted(ordered, -scores[0], side="left")
    assert np.array_equal(found.greater[:-1], above)
    assert np.array_equal(found.ties[:-1], np.searchsorted(ordered, -scores[0], side="right") - above - 1)
    assert found.greater[-1] == (scores[1] > scores[1, 7]).sum()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("largest_k", [None, 20])
def test_slices_of_queries_change_nothing(path, largest_k, monkeypatch):
    queries, items = vectors(100, 12, 0), vectors(3000, 12, 1)
    targets, seen = csr_from_lists([[q, q + 9][:1 + q % 2] for q in range(100)]), csr_from_lists([[5]] * 100)
    expected = target_ranks(queries, items, targets, seen=seen, path=path, largest_k=largest_k)
    for name, value in (("SLICE", 7), ("STEP", 1), ("SECONDS", 0), ("FIRST_ITEMS", 64)):
        monkeypatch.setattr(native_ranks, name, value)
    found = target_ranks(queries, items, targets, seen=seen, path=path, largest_k=largest_k, threads=1)
    assert numbers(found) == numbers(expected)


class Slow:
    """Packed items that take a nanosecond a product, by a clock of their own."""

    begin, end, block_items, longest = 0, 2_000_000, 1024, 1.0

    def __init__(self):
        self.now, self.steps, self.done = 0.0, [], 0

    def took(self, products):
        self.steps.append(products / 1e9)
        self.now += self.steps[-1]
        self.done += products

    def count(self, queries, first, item, score, begin, end, greater, equal, threads):
        self.took(queries.size * (end - begin))

    def top_k(self, queries, left_out, scores, items, threads):
        self.took(queries.size * (self.end - self.begin))


@pytest.mark.parametrize("queries, largest_k", [(10_000, None), (10_000, 50), (2000, None), (None, None)])
def test_steps_are_short_on_a_slow_machine(queries, largest_k, monkeypatch):
    """So that Ctrl-C is heard; None: the k best."""
    slow, items = Slow(), vectors(4, 16, 0)
    monkeypatch.setattr(native_ranks, "perf_counter", lambda: slow.now)
    catalogue = Catalogue(items)
    monkeypatch.setattr(Catalogue, "__len__", lambda self: slow.end)
    monkeypatch.setattr(Catalogue, "parts", lambda self, *args: iter([slow]))
    if queries:
        users = vectors(queries, 16, 1)
        target_ranks(users, catalogue, np.zeros(queries, np.int64), largest_k=largest_k, path=PATHS[0], threads=1)
    else:
        users = vectors(3000, 16, 1)
        top_k(users, catalogue, 5, path=PATHS[0], threads=1)
    assert slow.done == users.size * slow.end and len(slow.steps) > 20
    assert slow.steps[0] <= 10 and max(slow.steps[1:]) < 3 and np.median(slow.steps) > 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [1, 8, 16, 64])
def test_parts_of_narrow_vectors_have_their_size(path, width, monkeypatch):
    """As packed, with what rows are padded by."""
    items = np.zeros((9000, width), np.float32)
    each = catalogue_module.native.item_bytes(path, width)
    assert catalogue_module.pack(Catalogue(items).rows, path, 0, 9000, 1).nbytes == -(-9000 // 32) * 32 * each
    monkeypatch.setattr(catalogue_module, "PART_BYTES", 2048 * each)
    parts = list(Catalogue.passing(items).parts(path, 0, 9000, 1))
    assert [part.nbytes for part in parts[:-1]] == [2048 * each] * 4 and len(parts) == 5


@pytest.mark.parametrize("path", PATHS)
def test_a_collapsed_model_is_in_the_middle(path):
    same = np.tile(vectors(1, 33, 0), (3001, 1))
    found = target_ranks(same[:20], same, range(20), path=path)
    assert (found.expected == 1500).all() and (found.ties == 3000).all()
    scores, items = top_k(same[:20], same, 40, seen=csr_from_lists([[1, 2]] * 20), path=path)
    assert (items == [0, *range(3, 42)]).all() and len(np.unique(scores)) == 1
    with pytest.warns(UserWarning, match="collapsed"):
        assert ranking_metrics(found, (10,))["HR@10"] == 0
    zeros = np.zeros((50, 8), np.float32)
    assert numbers(target_ranks(zeros[:3], zeros, [0, 1, 2], path=path)) == [[0] * 3, [49] * 3, [50] * 3]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("largest_k", [1, 10, 200])
def test_early_stop_keeps_the_metrics(path, largest_k, monkeypatch):
    monkeypatch.setattr(native_ranks, "FIRST_ITEMS", 64)
    queries, items = vectors(400, 12, 0), vectors(5000, 12, 1)
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 5000, 400)
    targets[:200] = top_k(queries[:200], items, 300)[1][np.arange(200), rng.integers(0, 300, 200)]
    seen = csr_from_lists([rng.integers(0, 5000, 40).tolist() + targets[:5].tolist() for _ in range(400)])
    full = target_ranks(queries, items, targets, seen=seen, path=path)
    stopped = target_ranks(queries, items, targets, seen=seen, path=path, largest_k=largest_k)
    assert numbers(stopped) == numbers(target_ranks(queries, items, targets, seen=seen, path="torch",
                                                    largest_k=largest_k))
    below = full.greater < largest_k
    assert below.any() and not below.all()
    assert np.array_equal(stopped.expected[below], full.expected[below])
    assert (stopped.greater[~below] == largest_k).all() and (stopped.ties[~below] == 0).all()
    few = ranking_metrics(stopped, (1, largest_k))
    assert few == {name: value for name, value in ranking_metrics(full, (1, largest_k)).items() if name in few}
    assert set(few) == {f"{name}@{k}" for name in ("HR", "NDCG") for k in (1, largest_k)}
    with pytest.raises(ValueError, match=f"cut-offs up to {largest_k}"):
        ranking_metrics(stopped, (largest_k + 1,))


@pytest.mark.parametrize("path", PATHS)
def test_early_stop_with_several_targets(path, monkeypatch):
    monkeypatch.setattr(native_ranks, "FIRST_ITEMS", 64)
    queries, items = vectors(50, 12, 0), vectors(3000, 12, 1)
    best = top_k(queries, items, 900)[1]
    targets = csr_from_lists([[best[q, 3 + q % 4], best[q, 500 + q], best[q, 20]] for q in range(50)])
    full, stopped = (target_ranks(queries, items, targets, path=path, largest_k=k) for k in (None, 100))
    below = full.greater < 100
    assert np.array_equal(stopped.greater, np.minimum(full.greater, 100)) and below.sum() == 100
    assert ranking_metrics(stopped, (5, 100))["recall@100"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("path", ["auto", "torch", *PATHS])
def test_ranges_of_the_catalogue_add_up(path):
    queries, items = vectors(70, 20, 0), vectors(5000, 20, 1)
    items[4000:4100] = items[:100]
    targets, seen = np.arange(70), csr_from_lists([range(q, 5000, 170 + q) for q in range(70)])
    whole = target_ranks(queries, items, targets, seen=seen, path=path)
    cuts = [0, 0, 1234, 4096, 4097, 5000]
    for x in (items, Catalogue(items)):
        parts = [target_ranks(queries, x, targets, seen=seen, path=path, item_range=span)
                 for span in zip(cuts, cuts[1:], strict=False)]
        assert numbers(Ranks.sum(parts)) == numbers(whole)
    short = [target_ranks(queries, items, targets, path=path, item_range=span, largest_k=9)
             for span in ((0, 2500), (2500, 5000))]
    assert numbers(Ranks.sum(short)) == numbers(target_ranks(queries, items, targets, path=path, largest_k=9))
    for bad in ((0, 5001), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="item_range: got"):
            target_ranks(queries, items, targets, item_range=bad)


@pytest.mark.parametrize("path", PATHS)
def test_catalogues_beyond_memory_are_packed_part_by_part(path, tmp_path, monkeypatch):
    items = vectors(5000, 24, 1).astype(np.float16)
    np.save(tmp_path / "items.npy", items)
    mapped = np.load(tmp_path / "items.npy", mmap_mode="r")
    queries = vectors(30, 24, 0)
    targets, seen = np.arange(30) * 100, csr_from_lists([[q, 4999] for q in range(30)])
    whole = target_ranks(queries, items, targets, seen=seen, path=path)
    sizes, alive = [], []
    monkeypatch.setattr(catalogue_module, "PART_BYTES", 1)
    real = catalogue_module.pack

    def pack(rows, path, begin, end, threads):
        assert not any(reference() for reference in alive)  # the part before is gone
        sizes.append(end - begin)
        packed = real(rows, path, begin, end, threads)
        alive.append(weakref.ref(packed))
        return packed

    monkeypatch.setattr(catalogue_module, "pack", pack)
    assert numbers(target_ranks(queries, mapped, targets, seen=seen, path=path)) == numbers(whole)
    assert sizes == [1024] * 4 + [904]
    assert_same(top_k(queries, mapped, 50, seen=seen, path=path), top_k(queries, items, 50, seen=seen, path="torch"))


def test_a_catalogue_is_packed_once_and_used_by_threads_together():
    queries, items = vectors(64, 32, 0), vectors(3000, 32, 1)
    catalogue = Catalogue(items, path=PATHS[0])
    held = catalogue.nbytes
    assert len(catalogue) == 3000 and held > 0 and catalogue.holds(PATHS[0])
    expected, found = numbers(target_ranks(queries, items, np.arange(64), path="torch")), []
    work = [threading.Thread(target=lambda: found.append(target_ranks(queries, catalogue, np.arange(64),
                                                                      path=PATHS[0]))) for _ in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert [numbers(f) for f in found] == [expected] * 4 and catalogue.nbytes == held


@pytest.mark.parametrize("path", PATHS)
def test_thread_counts_change_nothing(path):
    queries, items = vectors(500, 17, 0), vectors(6000, 17, 1)
    items[5000:] = items[:1000]
    results = [(target_ranks(queries, items, np.arange(500), path=path, threads=t),
                top_k(queries, items, 33, path=path, threads=t)) for t in (1, 2, 7)]
    for ranks, best in results[1:]:
        assert numbers(ranks) == numbers(results[0][0])
        assert_same(best, results[0][1])


@pytest.mark.parametrize("path", PATHS)
def test_crowded_and_sparse_targets_together(path):
    """A filter hands groups of queries with many undecided pairs over to the exact path, in several blocks."""
    items, queries = vectors(30000, 64, 1), vectors(300, 64, 0)
    queries[150:] = items[150:300] + 0.05 * queries[150:]  # on top; the others lie anywhere
    items[20000:20300] = items[:300]
    targets, seen = csr_from_lists([[q, 25000 + q] for q in range(300)]), csr_from_lists([range(9)] * 300)
    expected = target_ranks(queries, items, targets, seen=seen, path="torch")
    assert numbers(target_ranks(queries, items, targets, seen=seen, path=path)) == numbers(expected)
    spans = [(0, 11), (11, 20011), (20011, 30000)]
    parts = [target_ranks(queries, Catalogue(items), targets, seen=seen, path=path, item_range=s) for s in spans]
    assert numbers(Ranks.sum(parts)) == numbers(expected)


@pytest.mark.parametrize("path", PATHS)
def test_targets_are_crowded_in_different_parts_of_the_catalogue(path):
    """Groups of queries go over to the exact path one after the other, each at its own block."""
    clusters = np.repeat(np.arange(3), 7000)  # of items; more than a block of any path
    middles = np.eye(3, 48, dtype=np.float32)
    items = middles[clusters] + 0.02 * vectors(21000, 48, 0)
    queries = middles[np.repeat(np.arange(3), 100)] + 0.02 * vectors(300, 48, 1)
    targets = np.arange(300) // 100 * 7000 + np.arange(300) * 17
    expected = target_ranks(queries, items, targets, path="torch")
    assert numbers(target_ranks(queries, items, targets, path=path, threads=1)) == numbers(expected)


def test_few_queries_are_not_worth_a_filter():
    items, queries = vectors(3000, 64, 1), vectors(100, 64, 0)
    quick = next((name for meaning in ("bfloat16", "exact") for name in PATHS if paths()[name] == meaning), PATHS[0])
    once = Catalogue.passing(items)
    assert catalogue_module.count_path(once, 3, "auto") == quick
    assert catalogue_module.top_k_path(once, 3, 1, "auto") == quick
    assert catalogue_module.count_path(once, 100, "auto") == PATHS[0]
    deep = next((name for name in PATHS if paths()[name] == "exact"), PATHS[0])
    assert [catalogue_module.top_k_path(once, 100, k, "auto") for k in (10, 11)] == [PATHS[0], deep]
    catalogue = Catalogue(items)
    target_ranks(queries[:3], catalogue, [0, 1, 2])
    assert catalogue.holds(PATHS[0]) and len(catalogue._packed) == 1


def test_torch_is_taken_where_it_is_faster_than_a_portable_filter(monkeypatch):
    calls, items, queries = [], vectors(3000, 64, 1), vectors(32, 64, 0)
    targets, expected = np.arange(32), target_ranks(queries, items, np.arange(32))
    best = top_k(queries, items, 5)
    for name in ("count", "best_items"):
        call = getattr(ranks_module.torch_ranks, name)
        monkeypatch.setattr(ranks_module.torch_ranks, name,
                            lambda *args, call=call, name=name: calls.append(name) or call(*args))
    monkeypatch.setattr(catalogue_module, "paths", lambda: {"portable": "float32"})
    for x in (items, Catalogue(items)):
        assert numbers(target_ranks(queries, x, targets)) == numbers(expected)
        assert all(np.array_equal(a, b) for a, b in zip(top_k(queries, x, 5), best, strict=True))
    assert calls == ["count", "best_items"] * 2
    with pytest.raises(ValueError, match="items: NaN or infinite values in row 7"):
        target_ranks(queries, np.where(np.arange(3000)[:, None] == 7, np.nan, items), targets)
    target_ranks(queries, items, targets, path="portable")  # as it was asked for
    target_ranks(queries[1:], items, targets[1:])
    target_ranks(queries, items, targets, largest_k=10)
    target_ranks(queries, items.astype(np.float16), targets)
    monkeypatch.setattr(catalogue_module, "paths", lambda: {"portable": "exact"})  # on 64-bit ARM
    target_ranks(queries, items, targets)
    top_k(queries, items, 5)
    assert len(calls) == 4


@pytest.mark.parametrize("row", [0, 3000, 4999])
def test_bad_items_are_named(row):
    items, queries = vectors(5000, 8, 1), vectors(2, 8, 0)
    items[row, 5] = np.nan
    for path in ("torch", *PATHS):
        for call in (lambda path=path: target_ranks(queries, items, [1, 2], path=path),
                     lambda path=path: top_k(queries, items, 3, path=path),
                     lambda path=path: Catalogue(items, path=path)):
            with pytest.raises(ValueError, match=f"items: NaN or infinite values in row {row} cannot"):
                call()


def test_refusals():
    queries, items = vectors(2, 8, 0), vectors(5, 8, 1)
    with pytest.raises(ValueError, match="path: got 'gpu'; this machine has auto, torch, "):
        target_ranks(queries, items, [0, 1], path="gpu")
    with pytest.raises(ValueError, match="path: got 'avx'"):
        Catalogue(items, path="avx")
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="largest_k: got"):
            target_ranks(queries, items, [0, 1], largest_k=bad)
    with pytest.raises(ValueError, match="the catalogue is empty"):
        Catalogue(items[:0])
    with pytest.raises(ValueError, match="largest_k differs"):
        Ranks.sum([target_ranks(queries, items, [0, 1], largest_k=k) for k in (None, 2)])
    with pytest.raises(ValueError, match="must rank the same ones"):
        Ranks.sum([target_ranks(queries[:n], items, [0, 1][:n]) for n in (1, 2)])


def test_arrays_of_any_layout():
    queries, items = vectors(9, 16, 0), vectors(50, 16, 1)
    expected = numbers(target_ranks(queries, items, range(9)))
    for other in (np.asfortranarray(items), items[::-1][::-1], items.astype(">f4"), torch.from_numpy(items.T).T,
                  np.repeat(items, 2, axis=1)[:, ::2]):
        assert numbers(target_ranks(queries, other, range(9))) == expected
    items.flags.writeable = False
    assert numbers(target_ranks(queries, items, range(9))) == expected
