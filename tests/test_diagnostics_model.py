"""The measures of collapse on tiny models: KARMA with adapters, fully tuned, frozen, and plain language models."""

import dataclasses
import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from karma_fast.cli import main
from karma_fast.config import ConfigError
from karma_fast.data.batches import request
from karma_fast.data.packing import Packed
from karma_fast.diagnostics import PlainModel, diagnose
from karma_fast.diagnostics.attention import attention_statistics, request_attention
from karma_fast.diagnostics.columns import END, HISTORY, INJECTED, INSTRUCTION, QUERY, prompt_parts
from karma_fast.diagnostics.decoder import FrozenDecoder, decoder_entries, trained_projection
from karma_fast.diagnostics.entries import DEFINITIONS
from karma_fast.diagnostics.perplexity import chosen_items, retained_perplexity, text_nats
from karma_fast.diagnostics.states import Untuned, text_states
from karma_fast.evaluation.attention import attention_map
from karma_fast.model.backbone import causal_lm
from karma_fast.model.karma import KarmaModel
from karma_fast.model.reading import decoder_states


def built(config, data, cache, **changes) -> KarmaModel:
    """A tiny model whose tuning did something."""
    config = dataclasses.replace(config.model, **changes)
    model = KarmaModel.build(config, data.items, data.sequences, data.split, cache=cache, device="cpu").eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.backbone.named_parameters():
            if "lora_B" in name or (config.tuning == "full" and "mlp" in name):
                weight += torch.randn(weight.shape, generator=random) * 0.1
    return model


@pytest.fixture
def model(tiny_config, tiny_data, tmp_path):
    return built(tiny_config, tiny_data, tmp_path)


def direct_nats(folder_or_model, folder, texts) -> list[float]:
    """Summed token losses by transformers alone, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = folder_or_model
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits.float().log_softmax(dim=-1)
        out.append(-sum(logits[0, n, ids[0, n + 1]].item() for n in range(ids.shape[1] - 1)))
    return out


TEXTS = ["Red Rocket | space", "Blue Spoon | kitchen", "Opera"]


def test_history_columns_are_the_items(model, tiny_data):
    history = tiny_data.sequences.items[:4]
    parts = prompt_parts(model, history)
    head = len(model.prompts.instruction)
    assert parts.tolist() == [INSTRUCTION] * head + [HISTORY] * 4 + [END]
    asked = prompt_parts(model, history, "red").tolist()
    words = len(model.prompts.query_ids("red"))
    assert asked == [INSTRUCTION] * head + [QUERY] * words + [HISTORY] * 4 + [END] and words > 2
    assert (prompt_parts(model, tiny_data.sequences.items[:30]) == HISTORY).sum() == model.config.max_history
    assert (prompt_parts(model, []) == HISTORY).sum() == 0


def test_attention_statistics_agree_with_the_mean_map(model, tiny_data):
    requests = [request(tiny_data.sequences, p, 6) for p in tiny_data.split.test[:3]]
    found = attention_statistics(model, requests)
    maps = [attention_map(model, *r)[1] for r in requests]
    items = [prompt_parts(model, *r) == HISTORY for r in requests]
    rough = 2e-2  # the language model may compute in bfloat16
    assert found["look_history"]["value"] == pytest.approx(
        np.mean([m[-1][c].sum() for m, c in zip(maps, items, strict=True)]), rel=rough)
    assert found["first_received"]["value"] == pytest.approx(np.mean([m[:, 0].mean() for m in maps]), rel=rough)
    assert sum(found[f"look_{name}"]["value"] for name in ("first", "instruction", "query", "history", "self")) \
        == pytest.approx(1, rel=rough)
    assert found["barcode"]["n"] == 3 and len(found["barcode"]["per_layer"]) == 2
    assert np.shape(found["barcode"]["per_head"]) == (2, 2)
    assert np.mean(found["barcode"]["per_head"]) == pytest.approx(found["barcode"]["value"], abs=1e-4)
    none = attention_statistics(model, [([], "")])
    assert none["barcode"]["value"] is None and none["barcode"]["n"] == 0 and "history" in none["barcode"]["reason"]


def test_attention_of_a_model_that_reports_none_is_null(model, tiny_data, monkeypatch):
    monkeypatch.setattr("karma_fast.diagnostics.attention.request_attention", lambda *args: [])
    found = attention_statistics(model, [request(tiny_data.sequences, tiny_data.split.test[0], 6)])
    assert all(e["value"] is None and "LlamaForCausalLM" in e["reason"] for e in found.values())


def test_attention_leaves_the_model_as_it_was(model, tiny_data):
    before = causal_lm(model.backbone).config._attn_implementation
    history = tiny_data.sequences.items[:4]
    u = model.encode_users([history])
    request_attention(model, history, "", len(prompt_parts(model, history)))
    assert causal_lm(model.backbone).config._attn_implementation == before
    assert torch.equal(model.encode_users([history]), u)


def test_text_loss_is_that_of_transformers_and_adapters_are_really_off(model, tiny_backbone):
    sums, tokens = text_nats(model, TEXTS)
    assert tokens.tolist() == [len(model.tokenizer(t)["input_ids"]) - 1 for t in TEXTS]
    assert sums == pytest.approx(direct_nats(causal_lm(model.backbone), tiny_backbone, TEXTS), rel=3e-2)
    untuned = Untuned(model)
    with untuned.applied():
        before, _ = text_nats(model, TEXTS)
    assert untuned.how == "adapters off"
    assert before == pytest.approx(direct_nats(None, tiny_backbone, TEXTS), rel=3e-2)
    assert abs(sums - before).max() > 0.2
    assert text_nats(model, TEXTS)[0] == pytest.approx(sums)  # and on again
    tuned, plain = retained_perplexity(model, untuned, TEXTS)
    assert tuned["perplexity_ratio"]["value"] == pytest.approx(math.exp((sums - before).sum() / tokens.sum()))
    assert plain["text_nats"]["value"] == pytest.approx(before.sum() / tokens.sum())
    assert plain["text_perplexity"]["value"] == pytest.approx(math.exp(before.sum() / tokens.sum()))


def test_full_tuning_is_compared_with_the_original_weights(tiny_config, tiny_data, tiny_backbone, tmp_path):
    model = built(tiny_config, tiny_data, tmp_path, tuning="full")
    untuned, tuned = Untuned(model), model.backbone
    with untuned.applied():
        assert model.backbone is not tuned
        before, _ = text_nats(model, TEXTS)
    assert model.backbone is tuned and "original" in untuned.how
    assert before == pytest.approx(direct_nats(None, tiny_backbone, TEXTS), rel=3e-2)
    assert abs(text_nats(model, TEXTS)[0] - before).max() > 0.2


def test_a_frozen_language_model_keeps_its_perplexity(tiny_config, tiny_data, tmp_path):
    model = built(tiny_config, tiny_data, tmp_path, tuning="frozen")
    found, _ = retained_perplexity(model, Untuned(model), TEXTS)
    assert found["perplexity_ratio"]["value"] == 1 and "not tuned" in found["perplexity_ratio"]["compared_with"]
    unknown, _ = retained_perplexity(model, None, [], "not known")
    assert unknown["perplexity_ratio"]["value"] is None and unknown["perplexity_ratio"]["reason"] == "not known"
    assert unknown["text_nats"]["value"] is None


def test_texts_are_those_of_unseen_items_where_there_are_enough(tiny_data, monkeypatch):
    items, which = chosen_items(tiny_data, 0)
    assert len(items) == 40 and "all items" in which
    monkeypatch.setattr("karma_fast.diagnostics.perplexity.ENOUGH", 1)
    end = tiny_data.split.train_end.copy()
    end[1:] = tiny_data.sequences.indptr[1:-1]  # only the first user trains
    data = dataclasses.replace(tiny_data, split=dataclasses.replace(tiny_data.split, train_end=end))
    items, which = chosen_items(data, 0)
    trained = tiny_data.sequences.items[:end[0]]
    assert "no event of the training part" in which and not set(items) & set(trained.tolist())


def test_a_fresh_decoder_reads_what_embeddings_say_and_leaves_the_model_alone(tiny_config, tiny_data, tmp_path):
    model = built(tiny_config, tiny_data, tmp_path, rec_weight=0.0)  # no decoder of its own
    weights = {name: p.clone() for name, p in model.named_parameters()}
    items = np.tile(np.arange(40), 2)
    train = np.arange(80) < 40
    x = torch.eye(40)[items]  # which item it is
    with Untuned(model).applied():
        found = decoder_entries(model, x, items, train, 60)
        again = decoder_entries(model, x, items, train, 60)
        noise = decoder_entries(model, torch.randn(80, 40, generator=torch.Generator().manual_seed(0)), items, train,
                                60)
    assert found == again
    assert found["decoder_matched"]["value"] < found["decoder_shuffled"]["value"] - 0.5
    assert found["decoder_matched"]["value"] < found["decoder_mean"]["value"] - 0.3
    assert found["decoder_own_better"]["value"] > 0.9 and found["decoder_matched"]["n"] == 40
    assert abs(noise["decoder_own_better"]["value"] - 0.5) < 0.25
    assert all(torch.equal(weights[name], p) and p.grad is None for name, p in model.named_parameters())
    left_out = decoder_entries(model, x, items, train, 0)
    assert {e["reason"] for e in left_out.values()} == {"left out: 0 steps"}


def test_the_decoder_is_the_untuned_model(model):
    decoder, items = FrozenDecoder.of(model), np.arange(8)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    with Untuned(model).applied():
        projection = trained_projection(decoder, x, items, 2, 0)
        untuned = decoder.losses(projection, x, items)
        assert decoder.loss(projection, x, items).item() == pytest.approx(untuned.mean(), rel=1e-2)
    assert abs(decoder.losses(projection, x, items) - untuned).max() > 0.05


def entries_of(found):
    return [e for state in found["states"].values() for e in state.values()]


def test_diagnose_gives_json_with_sizes_and_definitions(model, tiny_data):
    found = diagnose(model, tiny_data, requests=20, attention_requests=4, decoder_steps=2, untuned=True)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for e in entries_of(found):
        assert e["definition"] in DEFINITIONS and isinstance(e["n"], int)
        assert (e["value"] is None) == ("reason" in e)
    trained, untuned = found["states"]["trained"], found["states"]["untuned"]
    assert set(untuned) <= set(trained) and trained["barcode"] != untuned["barcode"]
    assert trained["u_mean_cosine"] != untuned["u_mean_cosine"]
    assert trained["e_mean_cosine"] == untuned["e_mean_cosine"]  # W_e is the same, and reads frozen features
    assert trained["u_effective_rank"]["n"] == 20 and trained["barcode"]["n"] == 4
    assert untuned["text_nats"]["n"] == 40 and found["untuned"] == "adapters off"
    size = len(found["maps"]["labels"])
    assert np.shape(found["maps"]["untuned"]["layer 2"]) == (size, size)
    same = diagnose(model, tiny_data, requests=20, attention_requests=4, decoder_steps=2, untuned=True)
    assert same["states"] == found["states"]
    alone = diagnose(model, tiny_data, requests=20, attention_requests=1, decoder_steps=0)
    assert set(alone["states"]["untuned"]) == {"text_nats", "text_perplexity"}  # all else of it is left out
    assert alone["maps"]["untuned"]["layer 2"] != alone["maps"]["trained"]["layer 2"]


def test_requests_are_of_different_users(model, tiny_data):
    sequences = tiny_data.sequences
    users = sequences.user_of(np.arange(len(sequences.items)))
    late = np.flatnonzero(np.arange(len(users)) - sequences.indptr[users] >= 3)[:30]  # several of a user, as by time
    assert len(np.unique(users[late])) < 15
    data = dataclasses.replace(tiny_data, split=dataclasses.replace(tiny_data.split, test=late))
    found = diagnose(model, data, requests=20, attention_requests=4, decoder_steps=0, untuned=False)
    first = [min(late[users[late] == user]) for user in np.unique(users[late])]
    assert found["requests"] == len(first) and sequences.first_of_each(late[::-1]).tolist() == first


def test_collapsed_interest_shows(model, tiny_data, monkeypatch):
    monkeypatch.setattr(model, "encode_users", lambda histories, *_, **__: torch.full((len(histories), 16), 0.25))
    found = diagnose(model, tiny_data, attention_requests=1, decoder_steps=2)
    json.dumps(found, allow_nan=False)
    found = found["states"]["trained"]
    assert found["u_effective_rank"]["value"] == pytest.approx(1) == found["u_mean_cosine"]["value"]
    assert "equal" in found["u_effective_rank_centred"]["reason"]
    assert found["u_attributes_probe_map"]["gain"] == 0
    assert found["decoder_own_better"]["value"] == 0.5
    assert found["decoder_matched"]["value"] == found["decoder_shuffled"]["value"] \
        == pytest.approx(found["decoder_mean"]["value"], rel=1e-3)
    assert found["e_effective_rank"]["value"] > 2


def test_vectors_before_the_instruction_are_told_from_the_history(tiny_backbone, tiny_data):
    from karma_fast.recipes import recipe

    ra_rec = recipe("ra_rec")
    config = ra_rec.Config(backbone=str(tiny_backbone), quantization="none", max_history=4, id_dim=8,
                           num_context_tokens=3, max_title_tokens=6, max_text_tokens=8)
    model = ra_rec.model_class().build(config, tiny_data.items, tiny_data.sequences, tiny_data.split, device="cpu")
    history, prompts = tiny_data.sequences.items[:3], model.prompts
    assert prompt_parts(model, history, "red").tolist() == [
        *[INJECTED] * 4, *[INSTRUCTION] * len(prompts.instruction),
        *[HISTORY] * sum(len(prompts.titles[i]) for i in history), *[QUERY] * len(prompts.query_ids("red")),
        *[END] * len(prompts.closing)]
    found = diagnose(model, tiny_data, requests=6, attention_requests=2, decoder_steps=1)["states"]["trained"]
    assert found["look_injected"]["value"] > 0 and found["perplexity_ratio"]["value"] == 1
    assert found["decoder_matched"]["value"] is not None


def test_a_batch_of_texts_is_looked_for_among_as_many_as_fit(tiny_backbone, monkeypatch):
    backbone, looked_at, cumsum = AutoModelForCausalLM.from_pretrained(tiny_backbone), [], np.cumsum

    def counted(x, *rest, **named):
        looked_at.append(len(x))
        return cumsum(x, *rest, **named)

    monkeypatch.setattr(np, "cumsum", counted)
    rows = [[1] * (1 + n % 3) for n in range(40)]
    parts = [part for part, *_ in text_states(backbone, rows, batch_tokens=8)]
    assert max(looked_at) == 8 and sorted(np.concatenate(parts)) == list(range(40))
    assert [len(part) for part in parts] == [8, 7, 4, 4, 4, *[2] * 6, 1]


# ---- plain language models -----------------------------------------------------------------------------------------


def test_plain_model_reads_titles_as_text(tiny_backbone, tiny_data):
    plain = PlainModel.load(tiny_backbone, tiny_data.items, max_history=3, device="cpu")
    history = tiny_data.sequences.items[:5]
    ids, parts = plain.prompt(history, "red things")
    text = plain.tokenizer.decode(ids)
    titles = [tiny_data.items.titles[i] for i in history]
    assert all(t in text for t in titles[2:]) and titles[0] not in text and "red things" in text
    assert text.startswith(plain.config.instruction) and len(parts) == len(ids)
    shown = plain.tokenizer.decode([i for i, part in zip(ids, parts, strict=True) if part == HISTORY])
    assert shown == "".join(f" {t};" for t in titles[2:])
    reference = AutoModelForCausalLM.from_pretrained(tiny_backbone, dtype=torch.float32)
    with torch.no_grad():
        state = reference.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        item = reference.base_model(input_ids=torch.tensor([plain.tokenizer(tiny_data.items.texts[3])["input_ids"]]))
    u = plain.encode_users([history, []], ["red things", ""])
    assert u.shape == (2, 64) and torch.cosine_similarity(u[0], state, dim=0) > 0.999
    assert u.norm(dim=1).tolist() == pytest.approx([1, 1], rel=1e-5)
    e = plain.encode_items()
    assert torch.cosine_similarity(e[3], item.last_hidden_state[0].mean(dim=0), dim=0) > 0.999
    assert torch.allclose(e[[3, 5]], plain.encode_items(np.array([3, 5])), atol=1e-2)


def test_plain_model_is_diagnosed_with_and_without_its_base(tiny_backbone, tiny_data, tmp_path):
    tuned = AutoModelForCausalLM.from_pretrained(tiny_backbone, dtype=torch.float32)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    tuned.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(tmp_path / "tuned")
    alone = PlainModel.load(tmp_path / "tuned", tiny_data.items, device="cpu")
    found = diagnose(alone, tiny_data, requests=8, attention_requests=2, decoder_steps=1)
    ratio = found["states"]["trained"]["perplexity_ratio"]
    assert ratio["value"] is None and "--base" in ratio["reason"] and found["untuned"] is None
    assert found["states"]["trained"]["barcode"]["value"] is not None
    with pytest.raises(ValueError, match="base"):
        diagnose(alone, tiny_data, requests=8, untuned=True)
    known = PlainModel.load(tmp_path / "tuned", tiny_data.items, base=str(tiny_backbone), device="cpu")
    sums, tokens = text_nats(known, TEXTS)
    found, _ = retained_perplexity(known, Untuned(known), TEXTS)
    direct = np.sum(direct_nats(tuned, tiny_backbone, TEXTS)) - np.sum(direct_nats(None, tiny_backbone, TEXTS))
    assert math.log(found["perplexity_ratio"]["value"]) == pytest.approx(direct / tokens.sum(), abs=2e-2)


def test_plain_adapters_name_their_base(tiny_backbone, tiny_data, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_backbone, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    plain = PlainModel.load(tmp_path, tiny_data.items, device="cpu")
    untuned = Untuned(plain)
    with untuned.applied():
        before, _ = text_nats(plain, TEXTS)
    assert untuned.how == "adapters off" and before == pytest.approx(direct_nats(None, tiny_backbone, TEXTS), rel=3e-2)
    assert abs(text_nats(plain, TEXTS)[0] - before).max() > 0.2


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(model, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back what the command sets
    folder = tmp_path / "runs" / "tiny"
    model.save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny_config.to_dict()), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps({"rows": {"karma": {"HR@10": 0.5}}}), encoding="utf-8")
    return folder


def test_command_writes_into_the_run_and_its_report(run_folder, capsys, tmp_path):
    words = ["--requests", "10", "--decoder-steps", "1"]
    assert main(["diagnose", str(run_folder / "model"), *words, "--untuned"]) == 0
    out = capsys.readouterr().out
    assert "barcode index" in out and "adapters off" in out
    found = json.loads((run_folder / "diagnostics.json").read_text(encoding="utf-8"))
    assert found["states"]["untuned"]["barcode"]["value"] is not None
    for name in ("report.html", "report.md"):
        page = (run_folder / name).read_text(encoding="utf-8")
        assert "Collapse, measured" in page and "barcode index" in page and "adapters off" in page
    before = (run_folder / "diagnostics.json").stat().st_mtime_ns
    elsewhere = tmp_path / "else.json"
    assert main(["diagnose", str(run_folder), str(run_folder / "config.yaml"), *words, "--json", "--seed", "1",
                 "--output", str(elsewhere)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(elsewhere.read_text(encoding="utf-8"))
    assert (run_folder / "diagnostics.json").stat().st_mtime_ns == before


def test_command_on_a_plain_folder_and_its_errors(run_folder, tiny_backbone, capsys, tmp_path):
    config = str(run_folder / "config.yaml")
    assert main(["diagnose", str(tiny_backbone), config, "--requests", "6", "--decoder-steps", "0",
                 "--base", str(tiny_backbone)]) == 0
    assert "perplexity, tuned / untuned" in capsys.readouterr().out
    assert not list(tiny_backbone.glob("*diagnostics*"))
    assert main(["diagnose", str(tiny_backbone)]) == 2
    assert "CONFIG.yaml" in capsys.readouterr().err
    assert main(["diagnose", str(run_folder), "--base", "x"]) == 2
    assert main(["diagnose", str(tmp_path / "nothing")]) == 1
    assert main(["diagnose", str(run_folder), "--output", str(tmp_path / "no" / "x.json")]) == 1


def test_broken_diagnostics_are_named_in_the_report(run_folder):
    from karma_fast.evaluation.report import write_report

    (run_folder / "diagnostics.json").write_text("{", encoding="utf-8")
    _, markdown = write_report(run_folder)
    text = markdown.read_text(encoding="utf-8")
    assert "diagnostics.json cannot be read" in text and "Collapse, measured" not in text


def test_a_plain_folder_that_cannot_be_loaded_says_what_to_do(tiny_data, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises((ConfigError, ValueError)):
        PlainModel.load(tmp_path, tiny_data.items)


def test_texts_are_read_as_the_model_embeds_them(monkeypatch):
    """Gemma multiplies the rows of its table."""
    from transformers import GemmaConfig, GemmaForCausalLM

    monkeypatch.setattr("karma_fast.model.reading.compute_dtype", lambda device: torch.float32)
    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0)).eval()
    ids = torch.tensor([3, 9, 4, 17, 6])
    tokens = Packed.of(np.array([2, 3]), ids.numpy(), np.full(5, -1))
    with torch.no_grad():
        found = decoder_states(model, model.get_input_embeddings().weight[ids], tokens)
        expected = [model.base_model(input_ids=part[None]).last_hidden_state[0] for part in ids.split([2, 3])]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("unseen", "chosen"), [(30, 30), (29, 40)])
def test_few_texts_outside_the_training_part_are_enough_for_perplexity(unseen, chosen):
    split = SimpleNamespace(training_items=lambda sequences: np.arange(40 - unseen))
    data = SimpleNamespace(items=SimpleNamespace(texts=["a text"] * 40), split=split, sequences=None)
    items, which = chosen_items(data, 0)
    assert len(items) == chosen and items[-1] == 39
    assert ("no event" in which) == (chosen == unseen) or f"only {unseen}" in which
