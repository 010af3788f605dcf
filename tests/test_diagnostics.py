"""The measures of collapse on attention, embeddings and words that were made to have known values."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karma_fast.data.schema import Items
from karma_fast.diagnostics.attention import barcode, head_statistics, uniform_attention
from karma_fast.diagnostics.attributes import attribute_texts, list_likeness, word_matrix
from karma_fast.diagnostics.columns import END, HISTORY, INSTRUCTION, QUERY
from karma_fast.diagnostics.embeddings import effective_rank, embedding_statistics, mean_cosine
from karma_fast.diagnostics.entries import entry, finite, mean_entry
from karma_fast.diagnostics.probe import STRENGTHS, found_words, probe_entries, ridge_probe
from karma_fast.diagnostics.section import collapse_blocks, summary

PARTS = np.array([INSTRUCTION] * 4 + [QUERY] * 2 + [HISTORY] * 20 + [END])
T = len(PARTS)


def attention(columns: dict[int, float], rest: torch.Tensor | None = None) -> torch.Tensor:
    """(1, T, T): rows that spend fixed shares on the columns they see and the rest as ``rest`` says, or on themselves.
    """
    weights = torch.eye(T) if rest is None else rest.clone()
    for row in range(T):
        seen = {column: share for column, share in columns.items() if column <= row}
        weights[row] *= 1 - sum(seen.values())
        for column, share in seen.items():
            weights[row, column] += share
    return weights[None]


# ---- attention -----------------------------------------------------------------------------------------------------


def test_received_attention_is_the_mean_over_the_rows_that_see_a_column():
    random = np.random.default_rng(0)
    weights = np.tril(random.exponential(size=(3, T, T)))
    weights /= weights.sum(axis=2, keepdims=True)
    found = head_statistics(torch.from_numpy(weights), PARTS)
    for head in range(3):
        alpha = [np.mean([weights[head, i, k] for i in range(k, T)]) for k in range(T)]
        assert found["first_received"][head].item() == pytest.approx(alpha[0], rel=1e-5)
        assert found["history_sink"][head].item() == pytest.approx(max(alpha[6:T - 3]), rel=1e-5)
        assert found["sink_first"][head] == (alpha[0] > 0.3)
        assert found["sink_any"][head] == (max(alpha[:T - 3]) > 0.3)


def test_a_first_token_sink_and_an_item_sink_are_told_apart():
    first = head_statistics(attention({0: 0.8}), PARTS)
    assert first["sink_first"] == 1 and first["sink_any"] == 1 and first["sink_history"] == 0
    assert first["look_first"].item() == pytest.approx(0.8) and first["look_self"].item() == pytest.approx(0.2)
    item = head_statistics(attention({9: 0.7, 12: 0.2}), PARTS)
    assert item["sink_first"] == 0 and item["sink_history"] == 1 and item["look_history"].item() == pytest.approx(0.9)
    assert item["history_sink"].item() == pytest.approx((0.7 * (T - 9) + 0.1 * 0) / (T - 9), abs=0.05)
    identity = head_statistics(torch.eye(T)[None], PARTS)
    assert identity["sink_any"] == 0  # a position that only looks at itself is no sink, however few rows see it
    assert identity["history_sink"] == pytest.approx(0.25)


def test_an_item_at_the_first_position_is_no_sink_of_the_history():
    bare = np.array([HISTORY] * (T - 1) + [END])  # a prompt without an instruction
    found = head_statistics(attention({0: 0.8}), bare)
    assert found["sink_first"] == 1 and found["sink_history"] == 0 and found["look_history"].item() < 1e-6


def test_looks_of_the_last_row_add_up_to_one():
    found = head_statistics(uniform_attention(T)[None], PARTS)
    looks = {name: value.item() for name, value in found.items() if name.startswith("look_")}
    assert looks == pytest.approx({"look_first": 1 / T, "look_injected": 0, "look_instruction": 3 / T,
                                   "look_query": 2 / T, "look_history": 20 / T, "look_self": 1 / T})


def test_barcode_of_stripes_is_one_and_of_rows_that_differ_is_low():
    stripes = head_statistics(attention({7: 0.5, 10: 0.3}), PARTS)
    assert stripes["barcode"].item() == pytest.approx(1, abs=1e-5)
    assert stripes["stripe_concentration"].item() == pytest.approx(1 - 0.6616 / math.log(10), abs=1e-3)
    one = head_statistics(attention({8: 0.9}), PARTS)
    assert one["barcode"].item() == pytest.approx(1) and one["stripe_concentration"].item() == pytest.approx(1)
    even = head_statistics(uniform_attention(T)[None], PARTS)  # the same rows too, but no stripe stands out
    assert even["barcode"].item() == pytest.approx(1, abs=1e-5)
    assert even["stripe_concentration"].item() == pytest.approx(0, abs=1e-5)
    random, weights = np.random.default_rng(0), torch.zeros(1, T, T)
    for row in range(T):
        weights[0, row, random.integers(6, 16) if row >= 16 else row] = 1  # each row looks at an item of its own
    apart = head_statistics(weights, PARTS)
    assert apart["barcode"] < 0.4 and apart["stripe_concentration"] < 0.4 and apart["barcode_mass"] == 1


def test_barcode_is_one_minus_the_mean_divergence_in_bits():
    places, weights = torch.arange(4), torch.zeros(1, 6, 6)
    weights[0, 2:, 0], weights[0, 4:, 0], weights[0, 4:, 1] = 0.5, 0.0, 0.25
    # columns 0 and 1, rows 2..5: two look at column 0 alone, two at column 1 alone
    p, q = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    m = (p + q) / 2
    divergence = sum(x * math.log2(x / y) / 2 for a in (p, q) for x, y in zip(a, m, strict=True) if x)
    assert barcode(weights, places)["barcode"].item() == pytest.approx(1 - divergence, abs=1e-6)


def test_short_prompts_and_rows_without_weight_there_have_no_barcode():
    short = np.array([INSTRUCTION] * 3 + [HISTORY] * 3 + [END])
    assert "barcode" not in head_statistics(uniform_attention(7)[None], short)
    assert "history_sink" not in head_statistics(uniform_attention(2)[None], np.array([INSTRUCTION, END]))
    nowhere = head_statistics(attention({0: 1.0}), PARTS)
    assert nowhere["barcode"].isnan() and nowhere["barcode_mass"] == 0


# ---- embeddings ----------------------------------------------------------------------------------------------------


def test_effective_rank_of_known_spectra():
    basis = torch.linalg.qr(torch.randn(32, 8, dtype=torch.float64))[0]
    for singular in ([5.0] * 8, [4.0, 4.0, 0, 0, 0, 0, 0, 0], [3.0, 1.0, 0, 0, 0, 0, 0, 0]):
        found = embedding_statistics(basis * torch.tensor(singular, dtype=torch.float64))["effective_rank"]["value"]
        shares = [s / sum(singular) for s in singular if s]
        assert found == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert effective_rank(torch.zeros(3)) != effective_rank(torch.zeros(3))


def test_mean_cosine_is_that_of_all_pairs():
    x = torch.randn(40, 6, dtype=torch.float64) + 0.5
    unit = x / x.norm(dim=1, keepdim=True)
    pairs = [(unit[i] @ unit[j]).item() for i in range(40) for j in range(i)]
    assert mean_cosine(x) == pytest.approx(np.mean(pairs))
    assert mean_cosine(torch.cat([x, torch.zeros(3, 6)])) == pytest.approx(np.mean(pairs))


def test_collapsed_embeddings():
    one = torch.nn.functional.normalize(torch.randn(1, 16), dim=-1)
    found = embedding_statistics(one.expand(50, 16))
    assert found["effective_rank"]["value"] == pytest.approx(1) and found["mean_cosine"]["value"] == pytest.approx(1)
    for name in ("effective_rank_centred", "first_component"):
        assert found[name]["value"] is None and "equal" in found[name]["reason"] and found[name]["n"] == 50
    line = torch.outer(torch.randn(50), torch.randn(16)) + one
    assert embedding_statistics(line)["first_component"]["value"] == pytest.approx(1)
    assert embedding_statistics(line)["effective_rank_centred"]["value"] == pytest.approx(1, abs=1e-3)
    for few in (torch.zeros(0, 4), torch.ones(1, 4), torch.zeros(3, 4)):
        json.dumps(embedding_statistics(few), allow_nan=False)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 30), st.integers(1, 12))
def test_effective_rank_lies_between_one_and_the_rank(seed, n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    found = embedding_statistics(x)["effective_rank"]
    assert 1 - 1e-9 <= found["value"] <= found["at_most"] + 1e-9 == min(n, d) + 1e-9
    assert embedding_statistics(x @ torch.linalg.qr(torch.randn(d, d))[0] * 3)["effective_rank"]["value"] \
        == pytest.approx(found["value"], rel=1e-3)  # neither turns nor sizes change it


# ---- words and probes ----------------------------------------------------------------------------------------------


def test_attributes_are_what_follows_the_title():
    items = Items(np.array(list("abcd")), ["A | B | red x", "A", "", "red"], ["A | B", "A", "", ""])
    assert attribute_texts(items) == ["red x", "", "", "red"]


def test_likeness_of_lists():
    words, _ = word_matrix(["red shoe", "red hat", "", "shoe red"])
    lists = np.array([[1, 3], [2, -1], [0, 1], [-1, -1]])
    found = list_likeness(words, lists, np.array([0, 0, 2, 0]))
    assert found[:2].tolist() == pytest.approx([(1 / 3 + 1) / 2, 0.0]) and np.isnan(found[2:]).all()


def fitted(x, y, new, level):
    """Ridge regression by its normal equations."""
    gram = (x - x.mean(axis=0)).T @ (x - x.mean(axis=0)) + level * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, (x - x.mean(axis=0)).T @ (y - y.mean(axis=0)))
    return y.mean(axis=0) + (new - x.mean(axis=0)) @ weights


@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0])
def test_ridge_probe_takes_the_strength_that_leaving_one_out_prefers(signal):
    chosen = set()
    for seed in range(12):
        random = np.random.default_rng(seed)
        x, y, new = random.normal(size=(20, 4)), random.normal(size=(20, 3)), random.normal(size=(7, 4))
        y += signal * x @ random.normal(size=(4, 3))
        scores, strength = ridge_probe(x, y, new)
        scale = np.square(np.linalg.svd(x - x.mean(axis=0), compute_uv=False)).mean()
        errors = {s: sum(np.square(y[i] - fitted(np.delete(x, i, 0), np.delete(y, i, 0), x[i:i + 1], s * scale)).sum()
                         for i in range(20)) for s in (*STRENGTHS, 1e15)}  # the last is no more than the mean
        best = min(errors, key=errors.get)
        assert strength == (math.inf if best == 1e15 else best)
        assert scores == pytest.approx(fitted(x, y, new, best * scale), abs=1e-9)
        chosen.add(best)
    assert len(chosen) > 1 and (1e15 in chosen or signal > 0)


def planted(n=400, d=12, seed=0):
    """Embeddings that say which of 12 words each row's item has, one or two of them."""
    random = np.random.default_rng(seed)
    truth = random.random((n, d)) < 0.12
    texts = [" ".join(f"w{w}" for w in np.flatnonzero(row)) for row in truth]
    turn = np.linalg.qr(random.normal(size=(d, d)))[0]
    return (truth + random.normal(0, 0.1, truth.shape)) @ turn, word_matrix(texts)[0], np.arange(n), \
        random.random(n) < 0.5


def test_probe_recovers_planted_words_and_nothing_from_shuffled_embeddings():
    x, words, rows, train = planted()
    own, control = probe_entries(x, words, rows, train), probe_entries(x, words, rows, train, shuffle=1)
    assert own["probe_map"]["value"] > 0.95 and own["probe_recall@10"]["value"] > 0.99
    assert own["probe_map"]["gain"] > 0.5 > 10 * own["probe_map"]["gain_standard_error"]
    assert abs(control["probe_map"]["gain"]) < 0.05
    assert control["probe_map"]["baseline"] == own["probe_map"]["baseline"] < 0.5
    assert own["probe_map"]["words"] == 12 and own["probe_map"]["trained_on"] == train.sum()


def test_probe_of_collapsed_embeddings_is_the_popularity_of_the_words():
    x, words, rows, train = planted()
    found = probe_entries(np.repeat(x[:1].astype(np.float32), len(x), axis=0), words, rows, train)
    assert found["probe_map"]["gain"] == 0 and found["probe_map"]["ridge_strength"] is None
    few = probe_entries(x[:6], words, rows[:6], train[:6])
    assert few["probe_map"]["value"] is None and few["probe_map"]["reason"]
    json.dumps([found, few], allow_nan=False)


def test_average_precision_by_hand():
    scores, truth = np.array([[0.1, 0.9, 0.5], [0.0, 0.0, 0.0]]), np.array([[1, 0, 1], [0, 0, 0]])
    hit, wanted, average = found_words(scores, truth, top=2)
    assert hit.tolist() == [1, 0] and wanted.tolist() == [2, 0]
    assert average[0] == pytest.approx((1 / 2 + 2 / 3) / 2) and np.isnan(average[1])


# ---- entries and the report ----------------------------------------------------------------------------------------


def test_entries_have_a_value_or_a_reason_and_a_known_definition():
    with pytest.raises(KeyError, match="definition"):
        entry("made_up", 1.0, 1)
    found = mean_entry("barcode", [1.0, math.nan, 3.0], per_layer=np.array([1.0, math.inf]))
    assert found["value"] == 2 and found["n"] == 2 and found["standard_error"] == pytest.approx(1)
    assert found["per_layer"] == [1.0, None]
    assert mean_entry("barcode", [], "nobody")["reason"] == "nobody" and finite(float("nan")) is None


@pytest.mark.parametrize("broken", [{}, {"states": 3}, {"states": {"trained": {"barcode": 1}}}, [], None,
                                    {"states": {"trained": {"barcode": {"value": "x"}}}, "maps": 7}])
def test_report_survives_what_it_cannot_read(broken):
    assert collapse_blocks(broken) == []


def test_section_says_untuned_and_trained_side_by_side():
    layers = {"per_layer": [0.5, None, 0.7]}
    found = {"states": {"trained": {"barcode": mean_entry("barcode", [0.9, 0.8], uniform=1.0) | layers,
                                    "u_mean_cosine": entry("mean_cosine", math.nan, 1, "needs two rows")},
                        "untuned": {"barcode": mean_entry("barcode", [0.5, 0.5])}},
             "compared": "adapters off", "requests": 2,
             "maps": {"labels": ["a", "b"], "trained": {"layer 1": [[1, 0], [0.5, 0.5]], "layer 2": [[1]]}}}
    table, lines, heat, note = collapse_blocks(found)
    assert table.rows == [["barcode index", "0.500", "0.850", "0.050", "1.000 (even attention)", "2"]]
    assert "0.500 to 0.700" in lines.text and list(heat.maps) == ["layer 1, mean over heads, trained"]
    assert "adapters off" in note.text
    assert "not measured: needs two rows" in summary(found)
