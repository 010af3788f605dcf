"""The item index against exact ranking, with and without faiss."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karma_fast.evaluation.csr import csr_from_lists
from karma_fast.evaluation.ranks import top_k
from karma_fast.retrieval import ItemIndex

KINDS = ["flat", "hnsw", "ivf"]


def vectors(rows, width=16, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def no_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    np.testing.assert_array_equal(found[1], expected[1])


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 10**6), st.data())
@settings(max_examples=40, deadline=None)
def test_flat_is_exact(num_items, k, seed, data):
    items, queries = vectors(num_items, seed=seed), vectors(3, seed=seed + 1)
    seen = data.draw(st.none() | st.lists(st.lists(st.integers(0, num_items - 1)), min_size=3, max_size=3))
    seen = None if seen is None else csr_from_lists(seen)
    assert_same(ItemIndex(items).search(queries, k, seen), top_k(queries, items, k, seen=seen))


@pytest.mark.parametrize("kind", KINDS)
def test_seen_items_never_come_back_and_places_fill_up(kind):
    items, queries = vectors(300), vectors(5, seed=1)
    order = top_k(queries, items, 300)[1]
    seen = csr_from_lists([order[0][:250], [], order[2], order[3][:298], order[4][::2]])
    scores, found = ItemIndex(items, kind).search(queries, 10, seen)
    for q, hidden in enumerate([order[0][:250], [], order[2], order[3][:298], order[4][::2]]):
        assert not set(found[q]) & set(hidden)
        filled = min(10, 300 - len(hidden))
        assert (found[q] >= 0).sum() == filled == len(set(found[q][:filled]))
        assert (found[q][filled:] == -1).all() and (scores[q][filled:] == -np.inf).all()
        assert (np.diff(scores[q][:filled]) <= 0).all()
        np.testing.assert_allclose(scores[q][:filled], items[found[q][:filled]] @ queries[q], atol=1e-6)


def test_looks_further_where_a_search_stops_short(monkeypatch):
    items, queries = vectors(300), vectors(2, seed=1)
    index, asked = ItemIndex(items, "ivf"), []
    search = index._fetch

    def half(queries, count):
        asked.append((len(queries), count))
        scores, found = search(queries, count)
        if len(queries) == 2 or count < 300:
            found[0, count // 2:] = -1
        return scores, found

    monkeypatch.setattr(index, "_fetch", half)
    seen = csr_from_lists([[], top_k(queries, items, 20)[1][1]])
    assert_same(index.search(queries, 10, seen), top_k(queries, items, 10, seen=seen))
    assert asked == [(2, 30)]  # 15 of the first query are enough
    asked.clear()
    found = index.search(queries, 200)
    assert asked == [(2, 200), (1, 300)] and (found[1] >= 0).all()


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_approximate_ones_find_most(kind):
    items, queries = vectors(3000), vectors(50, seed=1)
    found, exact = ItemIndex(items, kind).search(queries, 10)[1], top_k(queries, items, 10)[1]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]) > (
        0.95 if kind == "hnsw" else 0.3)  # random vectors have no clusters: the hardest case for ivf


@pytest.mark.parametrize("kind", KINDS)
def test_one_query_and_tensors(kind):
    items, queries = vectors(50), vectors(2, seed=1)
    index = ItemIndex(torch.from_numpy(items), kind)
    batch = index.search(queries, 3, seen=csr_from_lists([[1, 4], []]))
    one = index.search(torch.from_numpy(queries[0]), 3, seen=[1, 4])
    assert one[0].shape == (3,) and one[0].dtype == np.float32 and one[1].dtype == np.int64
    assert_same(one, [x[0] for x in batch])
    assert_same(index.search(queries[0], 3, seen=(1, 4)), one)
    assert_same(index.search(queries[0], 3, seen=([0, 2], [1, 4])), one)
    assert len(index) == 50


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    items, queries = vectors(200), vectors(4, seed=1)
    index = ItemIndex(items, kind)
    index.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["index.faiss", "index.json"]
    other = ItemIndex.load(tmp_path / "new" / "folder")
    assert (other.kind, other.num_items, other.width) == (kind, 200, 16)
    assert_same(other.search(queries, 5), index.search(queries, 5))


def test_load_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="build one with ItemIndex"):
        ItemIndex.load(tmp_path)
    ItemIndex(vectors(20)).save(tmp_path)
    settings_file = tmp_path / "index.json"
    settings_file.write_text(settings_file.read_text().replace("20", "21"))
    with pytest.raises(ValueError, match="save the index again"):
        ItemIndex.load(tmp_path)
    (tmp_path / "index.faiss").unlink()
    with pytest.raises(FileNotFoundError, match="index.faiss: missing"):
        ItemIndex.load(tmp_path)


def test_without_faiss(no_faiss, tmp_path):
    items, queries = vectors(40), vectors(3, seed=1)
    index, seen = ItemIndex(items), csr_from_lists([[0], [1, 2], []])
    assert_same(index.search(queries, 5, seen), top_k(queries, items, 5, seen=seen))
    index.save(tmp_path)
    assert_same(ItemIndex.load(tmp_path).search(queries, 5, seen), index.search(queries, 5, seen))
    for kind in ("hnsw", "ivf"):
        with pytest.raises(ImportError, match="pip install faiss-cpu"):
            ItemIndex(items, kind)


def test_a_saved_faiss_index_names_what_it_needs(tmp_path, monkeypatch):
    ItemIndex(vectors(20)).save(tmp_path)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        ItemIndex.load(tmp_path)


@pytest.mark.parametrize("call,message", [
    (lambda: ItemIndex(vectors(3), "annoy"), "kind: got 'annoy'; flat, hnsw or ivf"),
    (lambda: ItemIndex(vectors(3)[:0]), "empty"),
    (lambda: ItemIndex(vectors(3).astype(np.float64)), "float64"),
    (lambda: ItemIndex(vectors(3) * np.float32(np.nan)), "NaN"),
    (lambda: ItemIndex(vectors(3)).search(vectors(2, 8), 1), "width 8 and items 16"),
    (lambda: ItemIndex(vectors(3)).search(vectors(2) * np.float32(np.inf), 1), "NaN or infinite"),
    (lambda: ItemIndex(vectors(3)).search(vectors(2), 0), "k: got 0"),
    (lambda: ItemIndex(vectors(3)).search(vectors(2), 1, ([0, 1], [0])), "3 are needed for 2 queries"),
    (lambda: ItemIndex(vectors(3)).search(vectors(2), 1, ([0, 1, 1], [3])), "got items 3 to 3"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="gpu: True, but"):
        ItemIndex(vectors(3), gpu=True)
