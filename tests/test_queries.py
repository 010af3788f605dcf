"""Requests with queries: their words reach u past the language model."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from karma_fast.config import ConfigError, KarmaConfig
from karma_fast.data import training_windows
from karma_fast.data.batches import log_sampling_probability
from karma_fast.data.schema import Dataset
from karma_fast.data.words import tf_idf_vectors, vocabulary, word_vectors, words_of
from karma_fast.model.karma import KarmaModel
from karma_fast.model.warm_up import warm_up_shortcut
from karma_fast.planning import plan_memory
from karma_fast.planning.workload import Workload
from karma_fast.recipes.ra_rec import Config as RaRecConfig
from karma_fast.recipes.ra_rec.model import RaRecModel
from karma_fast.run_setup import how_queries_are_read

WORDS = {"text_vectors": "words", "word_dim": 12, "positions": "last", "shortcut_warmup_epochs": 0.0}


@pytest.fixture(scope="module")
def searches(tiny_data) -> Dataset:
    """`tiny_data` in which every event but the first third was found by the second word of its item's title."""
    events = np.arange(len(tiny_data.sequences.items))
    texts = sorted({title.split()[1] for title in tiny_data.items.titles})
    asked = np.array([texts.index(tiny_data.items.titles[item].split()[1]) for item in tiny_data.sequences.items])
    queries = np.where(events % 3 > 0, asked, -1).astype(np.int32)
    sequences = dataclasses.replace(tiny_data.sequences, queries=queries, query_texts=texts)
    return dataclasses.replace(tiny_data, sequences=sequences)


def build(tiny_config, data: Dataset, tmp_path, **changes) -> KarmaModel:
    config = dataclasses.replace(tiny_config.model, **(WORDS | changes))
    return KarmaModel.build(config, data.items, data.sequences, data.split, cache=tmp_path, device="cpu").eval()


def build_ra_rec(tiny_config, data: Dataset, query_dropout: float) -> RaRecModel:
    config = RaRecConfig(backbone=tiny_config.model.backbone, quantization="none", id_dim=8,
                         query_dropout=query_dropout)
    return RaRecModel.build(config, data.items, data.sequences, data.split, device="cpu")


def batch_of(model: KarmaModel, data: Dataset, count: int = 12):
    starts, ends = training_windows(data.sequences, data.split, model.config.max_history, "last")
    log_q = log_sampling_probability(data.sequences, data.split, len(data.items))
    return model.collator(data.sequences, log_q)(list(zip(starts.tolist(), ends.tolist(), strict=True))[:count])


@pytest.mark.parametrize("dim", [3, 40])
def test_word_rows_add_up_to_the_direction_of_their_text(tiny_data, dim):
    texts = ["red red shoe", "blue tea", "", "red | tea pot", *tiny_data.items.texts[:9]]
    of_texts, of_words, words = word_vectors(texts, dim)
    assert words == vocabulary(texts)
    assert of_words.shape == (len(words), dim) and of_words.dtype == np.float32
    for row, text in zip(of_texts, texts, strict=True):
        if text:
            whole = sum(of_words[words[word]] for word in text.replace("|", " ").lower().split())
            np.testing.assert_allclose(whole / np.linalg.norm(whole), row, atol=1e-5)
    assert np.isnan(of_texts[2]).all()
    found = of_texts[[0, 3]] @ of_texts[[0, 3]].T
    if dim == 40:  # every direction is there
        vectors = tf_idf_vectors(texts)[[0, 3]].toarray()
        np.testing.assert_allclose(found, vectors @ vectors.T, atol=1e-5)


@pytest.mark.parametrize(("text", "words"), [
    ("रोटी। तवा", ["रोटी", "तवा"]), ("ルイ・ヴィトン", ["ルイ", "ヴィ", "ィト", "トン"]), ("בית־ספר", ["בית", "ספר"]),
    ("cafe\u0301 À_b", ["café", "à_b"]), ("฿500 男", ["500", "男"])])
def test_words_of_other_scripts(text, words):
    assert words_of(text) == words


def test_the_vocabulary_keeps_the_words_that_most_texts_have():
    texts = ["a b c", "b c", "c d d d d", "e"]
    assert vocabulary(texts) == {"c": 0, "b": 1, "a": 2, "d": 3, "e": 4}
    assert vocabulary(texts, 2) == {"c": 0, "b": 1}


def test_a_search_begins_at_the_items_that_have_its_words(tiny_config, searches, tmp_path):
    model = build(tiny_config, searches, tmp_path)
    nothing = np.array([], np.int64)
    u = model.encode_users([nothing, nothing, nothing], ["Knife", "a blue KNIFE, please", "violin"])
    best = (u @ model.encode_items().T).topk(2).indices.tolist()
    titles = [[searches.items.titles[item] for item in row] for row in best]
    assert sorted(titles[0]) == ["Blue Knife", "Red Knife"] and titles[1][0] == "Blue Knife"
    assert sorted(titles[2]) == ["Blue Violin", "Red Violin"]


def test_u_is_the_sum_of_state_history_and_query(tiny_config, searches, tmp_path):
    model = build(tiny_config, searches, tmp_path)
    with torch.no_grad():
        model.query_shortcut.gain.fill_(0.7)
        (chunk,) = batch_of(model, searches).prompts
        states = model._prompt_states(chunk)[chunk.pairs].float()
        shown = model.interest(states, chunk)
        starts, ends = training_windows(searches.sequences, searches.split, model.config.max_history, "last")
        of_words = torch.from_numpy(word_vectors(searches.items.texts, 12)[1])
        words = vocabulary(searches.items.texts)
        expected = model.interest_projection(F.normalize(states, dim=-1))
        expected = expected + model.shortcut(model.features(chunk.history_items), chunk.latest)
        asked = 0
        for row, end in enumerate(ends[:12]):
            number = searches.sequences.queries[end - 1]
            if number >= 0:
                word = of_words[words[searches.sequences.query_texts[number].lower()]]
                expected[row] += 0.7 * F.normalize(model.query_shortcut.projection.weight @ word, dim=0)
                asked += 1
    assert 3 < asked < 12
    torch.testing.assert_close(shown, F.normalize(expected, dim=-1))


def test_unknown_words_and_no_query_add_nothing(tiny_config, searches, tmp_path):
    model = build(tiny_config, searches, tmp_path)
    histories = [searches.sequences.items[:3].astype(np.int64)] * 2
    before = model.encode_users(histories, ["", "zeppelin"])
    with torch.no_grad():
        model.query_shortcut.gain.fill_(5.0)
    assert torch.equal(model.encode_users(histories, ["", "zeppelin"]), before)
    assert not torch.allclose(model.encode_users(histories, ["", "flute"])[1], before[1], atol=0.1)


def test_a_script_without_spaces_is_searched_by_pairs_of_characters(tiny_config, searches, tmp_path):
    titles = ["男士跑鞋", "女士跑鞋", "红茶", "रोटी तवा", *searches.items.titles[4:]]
    items = dataclasses.replace(searches.items, titles=titles, texts=titles)
    model = build(tiny_config, dataclasses.replace(searches, items=items), tmp_path, word_dim=30, embedding_dim=40)
    u = model.encode_users([np.array([], np.int64)] * 3, ["跑鞋", "茶", "तवा"])
    best = (u @ model.encode_items().T).topk(2).indices.tolist()
    assert sorted(best[0]) == [0, 1] and best[2][0] == 3
    assert model.prompts.query_ids("跑鞋") == build(tiny_config, searches, tmp_path).prompts.query_ids("跑鞋")


def test_what_is_kept_of_queries_is_bounded(tiny_config, searches, tmp_path, monkeypatch):
    prompts = build(tiny_config, searches, tmp_path).prompts
    found = prompts.query_ids("red oven")
    monkeypatch.setattr("karma_fast.data.batches.KEPT_QUERIES", 3)
    for n in range(7):
        prompts.query_ids(f"search {n}")
    assert len(prompts._queries) <= 3 and prompts.query_ids("red oven") == found


def test_losses_reach_the_path_of_queries(tiny_config, searches, tmp_path):
    model = build(tiny_config, searches, tmp_path).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    for term, reached in (("act", True), ("rec", True), ("gen", False)):
        model.zero_grad()
        model(batch_of(model, searches)).parts.present()[term].backward()
        for p in model.query_shortcut.parameters():
            assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == reached, term
    assert model.features.query_words.grad is None


def test_warm_up_learns_from_queries(tiny_config, searches, tmp_path):
    model = build(tiny_config, searches, tmp_path)
    blind = build(tiny_config, searches, tmp_path, query_shortcut=False)
    before = model.query_shortcut.projection.weight.clone()
    seen, unseen = (warm_up_shortcut(m, searches.sequences, searches.split, epochs=10) for m in (model, blind))
    assert not torch.equal(model.query_shortcut.projection.weight, before)
    assert np.mean(seen[-3:]) < np.mean(unseen[-3:]) - 0.3


@pytest.mark.parametrize("recipe", ["karma", "ra_rec"])
def test_training_leaves_out_a_share_of_the_queries(tiny_config, searches, tmp_path, recipe):
    def prompts_of(share: float, seed: int = 0) -> list[list[int]]:
        model = build(tiny_config, searches, tmp_path, query_dropout=share) if recipe == "karma" else \
            build_ra_rec(tiny_config, searches, share)
        starts, ends = training_windows(searches.sequences, searches.split, model.config.max_history, "last")
        chunk = model.collator(searches.sequences, seed=seed)(list(zip(starts.tolist(), ends.tolist(), strict=True)))
        tokens = chunk.prompts[0].tokens
        return [tokens.token_ids[start:end].tolist() for start, end in pairwise(tokens.offsets.tolist())]

    whole, half, none = prompts_of(0.0), prompts_of(0.5), prompts_of(1 - 1e-12)
    asked = [n for n, (one, other) in enumerate(zip(whole, none, strict=True)) if one != other]
    kept = [n for n in asked if half[n] == whole[n]]
    assert len(asked) > 20 and 0.3 < len(kept) / len(asked) < 0.7
    assert all(half[n] in (whole[n], none[n]) for n in asked)
    assert prompts_of(0.5) == half != prompts_of(0.5, seed=1)
    assert searches.sequences.without_queries(0.0) is searches.sequences  # what serving and evaluation read


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_share_of_queries_to_leave_out_is_below_one(share):
    with pytest.raises(ConfigError, match=f"model.query_dropout: got {share}; at least 0 and below 1 is needed"):
        KarmaConfig(query_dropout=share)


@pytest.mark.parametrize(("changes", "said"), [
    ({"query_shortcut": False}, "in the prompt alone"),
    ({"query_shortcut": False, "text_vectors": "states"}, "in the prompt alone"),
    ({"text_vectors": "states"}, "in the prompt alone; model.text_vectors words (or both) would lead "
                                     "their words past the language model too")])
def test_without_word_vectors_or_switched_off_there_is_none(tiny_config, searches, tmp_path, changes, said):
    model = build(tiny_config, searches, tmp_path, **changes)
    assert model.query_shortcut is None and model.features.query_words is None
    assert batch_of(model, searches).prompts[0].words is None
    assert how_queries_are_read(model) == said
    usual = build(tiny_config, searches, tmp_path)
    assert how_queries_are_read(usual) == "in the prompt, and their words past the language model"


def test_data_without_queries_and_texts_without_words_have_none(tiny_config, tiny_data, searches, tmp_path):
    assert build(tiny_config, tiny_data, tmp_path).query_shortcut is None
    signs = dataclasses.replace(searches.items, texts=["-"] * len(searches.items))
    assert build(tiny_config, dataclasses.replace(searches, items=signs), tmp_path).query_shortcut is None


def test_a_saved_model_reads_queries_alike(tiny_config, searches, tmp_path, monkeypatch):
    model = build(tiny_config, searches, tmp_path, shortcut_warmup_epochs=1.0)
    model.save_pretrained(tmp_path / "model")
    again = KarmaModel.from_pretrained(tmp_path / "model", device="cpu")
    histories, queries = [np.array([1, 2]), np.array([], np.int64)], ["red oven", "spoon"]
    assert torch.equal(again.encode_users(histories, queries), model.encode_users(histories, queries))
    assert not torch.equal(again.encode_users(histories), model.encode_users(histories, queries))
    monkeypatch.setattr("karma_fast.data.words.vocabulary", None)  # what was saved counts, not how words are cut now
    again = KarmaModel.from_pretrained(tmp_path / "model", device="cpu")
    assert again.prompts.words == vocabulary(searches.items.texts)


def test_a_plan_counts_the_words(tiny_config, tiny_data, searches):
    config = dataclasses.replace(tiny_config.model, **WORDS)
    assert Workload.of(config, 64, searches).query_words == len(vocabulary(searches.items.texts)) == 26
    assert Workload.of(config, 64).query_words == 65_536
    for other, data in ((config, tiny_data), (dataclasses.replace(config, query_shortcut=False), searches),
                        (dataclasses.replace(config, text_vectors="states"), searches)):
        assert Workload.of(other, 64, data).query_words == 0


def test_a_plan_is_of_batches_whose_queries_are_all_there(tiny_config, searches):
    config = dataclasses.replace(tiny_config.model, **WORDS)
    peaks = [plan_memory(dataclasses.replace(config, query_dropout=share), batch_size=8, chunk_size=4,
                         device_type="cpu", data=searches).peak for share in (0.0, 0.9)]
    assert peaks[0] == peaks[1]
