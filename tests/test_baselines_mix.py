"""The tuned mix: its formula, that the search finds what it should, and what it may look at."""

from types import SimpleNamespace

import numpy as np
import pytest

from karma_fast.baselines import MixWeights, mix_scorer, score_row, tune_mix
from karma_fast.baselines.mix import GRID, MixParts, search_metrics
from karma_fast.baselines.rows import request_scorer
from karma_fast.data.schema import Items, Sequences, Split


def dataset(lists, texts):
    indptr = np.concatenate([[0], np.cumsum([len(part) for part in lists])]).astype(np.int64)
    sequences = Sequences(np.arange(len(lists)).astype(str), indptr, np.concatenate(lists).astype(np.int32))
    split = Split(train_end=indptr[1:] - 2, valid=indptr[1:] - 2, test=indptr[1:] - 1, description="leave one out")
    return SimpleNamespace(items=Items(np.arange(len(texts)).astype(str), texts, texts), sequences=sequences,
                           split=split)


def random_data(seed=0, users=60, items=30):
    rng = np.random.default_rng(seed)
    words = ["red", "blue", "shoe", "tea", "pot", "new"]
    texts = [" ".join(rng.choice(words, 2)) for _ in range(items)]
    return dataset([rng.integers(0, items, rng.integers(4, 10)).tolist() for _ in range(users)], texts)


def by_text(users=60, seed=0):
    """Users go on with items of a word of their own, hidden in other words, among popular items that all share."""
    rng = np.random.default_rng(seed)
    lists, texts = [], [f"popular{n}" for n in range(15)]
    for user in range(users):
        own = list(range(len(texts), len(texts) + 5))
        texts += [f"word{user} " + " ".join(f"noise{n}x{k}" for k in range(6)) for n in own]
        lists.append([*own[:1], *rng.choice(15, 4, replace=False), *own[1:]])
    return dataset(lists, texts)


def test_scores_are_the_formula():
    data, weights = random_data(), MixWeights(text=0.5, next=0.2, pop=0.1, knn_decay=0.6, text_decay=0.8)
    found = mix_scorer(data, weights)(data.split.test)
    size = len(data.items)
    cosine = {name: np.stack([request_scorer(unit(data, item), name)(np.array([1]))[0] for item in range(size)])
              for name in ("item-kNN", "title TF-IDF")}
    counts = np.zeros((size, size))
    popular = np.zeros(size)
    for start, end in zip(data.sequences.indptr[:-1], data.split.train_end, strict=True):
        part = data.sequences.items[start:end]
        np.add.at(counts, (part[:-1], part[1:]), 1)
        np.add.at(popular, part, 1)
    for row, position in zip(found, data.split.test, strict=True):
        history = data.sequences.history(position, 99)
        age = np.arange(len(history))[::-1]
        knn, text = ((d ** age / (d ** age).sum()) @ cosine[name][history]
                     for name, d in (("item-kNN", 0.6), ("title TF-IDF", 0.8)))
        following = np.log1p(counts[history[-1]])
        np.testing.assert_allclose(row, knn + 0.5 * text + 0.2 * following + 0.1 * popular / popular.max(), atol=1e-6)


def unit(data, item):
    """The same training part, and a request behind ``item`` alone."""
    sequences = data.sequences
    shifted = Sequences(np.append(["new"], sequences.user_ids), np.concatenate([[0], sequences.indptr + 2]),
                        np.concatenate([[item, item], sequences.items]).astype(np.int32))
    split = Split(np.concatenate([[0], data.split.train_end + 2]), np.array([]), np.array([1]), "")
    return SimpleNamespace(items=data.items, sequences=shifted, split=split)


def test_search_finds_the_part_that_tells():
    data, start = by_text(), MixWeights()
    at_start = search_metrics(MixParts.fit(data), data.split.valid, [start], True)[0]
    found = tune_mix(data)
    assert at_start["NDCG@10"] == 0 and found.weights.text > start.text
    assert found.metrics["HR@10"] == 1 and found.metrics["NDCG@10"] > 0.7  # items of the same text tie
    # what was chosen on validation serves the test
    before, after = (score_row(data, data.split.test, mix_scorer(data, weights), (10,))
                     for weights in (start, found.weights))
    assert before["HR@10"] < 0.1 and after["HR@10"] == 1


def test_search_is_at_least_as_good_as_every_single_change():
    data = random_data()
    found = tune_mix(data)
    parts = MixParts.fit(data)
    for name, values in GRID.items():
        others = [MixWeights(**{**vars(found.weights), name: value}) for value in values]
        scores = search_metrics(parts, data.split.valid, others, True)
        assert max(score["NDCG@10"] for score in scores) <= found.metrics["NDCG@10"]


def test_search_never_looks_at_the_test():
    data, other = random_data(), random_data()
    other.sequences.items[other.split.test] = 0
    assert (data.sequences.items != other.sequences.items).any()
    assert tune_mix(data) == tune_mix(other)
    before = tune_mix(data)
    other.sequences.items[other.split.valid] = (data.sequences.items[data.split.valid] + 7) % 30
    assert tune_mix(other).metrics != before.metrics  # while it does look at the validation targets


def test_sample_follows_the_seed_and_the_rule_of_masking():
    data = random_data()
    one, again, two = (tune_mix(data, users=20, seed=seed) for seed in (0, 0, 1))
    assert one == again and one.requests == 20 and one.metrics != two.metrics
    assert tune_mix(data, mask_seen=False).metrics != tune_mix(data).metrics


def test_blocks_change_nothing(monkeypatch):
    data = random_data()
    whole = tune_mix(data)
    monkeypatch.setattr("karma_fast.baselines.mix.SEARCH_BYTES", 7 * 4 * 30)
    assert tune_mix(data).weights == whole.weights


def test_no_validation_request():
    data = random_data()
    data.split.valid = data.split.valid[:0]
    with pytest.raises(ValueError, match="no validation request"):
        tune_mix(data)
