"""KarmaModel: what each loss reaches, rows apart from their batch, prompts, decoding, saving."""

import copy
import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from karma_fast.cli import build_parser
from karma_fast.commands.recommend import item_index
from karma_fast.config import ConfigError, KarmaConfig
from karma_fast.data import training_windows
from karma_fast.data.batches import log_sampling_probability
from karma_fast.data.schema import Items, Sequences, Split
from karma_fast.data.words import word_vectors
from karma_fast.evaluation.decoding import decoding_check
from karma_fast.evaluation.decoding import text_losses as held_out_losses
from karma_fast.losses import frozen_decoder_loss
from karma_fast.model.backbone import adapters_off, causal_lm, convert_gguf, default_device, load_backbone
from karma_fast.model.features import cached_text_vectors, encode_texts
from karma_fast.model.id_vectors import id_vectors
from karma_fast.model.karma import KarmaModel
from karma_fast.model.packed_attention import PACKED
from karma_fast.model.recommender import Recommender
from karma_fast.planning.shapes import HUB_IDS, SHAPES
from karma_fast.recipes import RECIPES, recipe
from karma_fast.retrieval import ItemIndex


def build(tiny_config, tiny_data, tmp_path, items=None, **changes) -> KarmaModel:
    config = dataclasses.replace(tiny_config.model, **changes)
    model = KarmaModel.build(config, items or tiny_data.items, tiny_data.sequences, tiny_data.split, cache=tmp_path,
                             device="cpu")
    wake(model)
    return model


def wake(model: KarmaModel) -> None:
    """Adapters start at zero and W_o near it, where gradients behind them vanish; move both off it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
        if model.shortcut is not None:
            model.interest_projection.weight.mul_(30)


def batch_of(model: KarmaModel, data, count=4, sequences=None):
    sequences = sequences or data.sequences
    starts, ends = training_windows(sequences, data.split, model.config.max_history, model.config.positions)
    log_q = log_sampling_probability(sequences, data.split, len(data.items))
    windows = list(zip(starts.tolist(), ends.tolist(), strict=True))
    return model.collator(sequences, log_q)(windows[:count])


def with_images(items: Items) -> Items:
    vectors = np.random.default_rng(0).standard_normal((len(items), 6)).astype(np.float32)
    vectors[3] = np.nan
    return dataclasses.replace(items, image_vectors=vectors)


def reached(model: KarmaModel, loss: torch.Tensor) -> dict[str, bool]:
    """Which groups of parameters a loss has a non-zero gradient for."""
    model.zero_grad()
    loss.backward()
    groups = {"lora": "lora_", "P_in": "history_projection", "W_o": "interest_projection", "W_e": "item_projection",
              "P_rec": "decode_projection", "g": "image_head", "emb": "emb_token", "scale": "log_scale",
              "shortcut": "shortcut.gain", "W_s": "shortcut.projection", "ages": "age_logits"}
    out = {}
    for group, part in groups.items():
        grads = [p.grad for n, p in model.named_parameters() if part in n]
        out[group] = any(g is not None and bool(g.abs().sum() > 0) for g in grads)
    for name, p in model.backbone.named_parameters():
        assert "lora_" in name or p.grad is None, f"{name} is frozen but has a gradient"
    return out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_loss_reaches_exactly_its_parameters(tiny_config, tiny_data, tmp_path, checkpointing):
    model = build(tiny_config, tiny_data, tmp_path, with_images(tiny_data.items), gradient_checkpointing=checkpointing)
    model.train()
    output = model(batch_of(model, tiny_data))
    base = {"lora": True, "P_in": True, "W_o": True, "W_e": False, "P_rec": False, "g": False, "emb": True,
            "scale": False, "shortcut": True, "W_s": True, "ages": True}
    expected = {"act": base | {"scale": True, "W_e": True},
                "gen": base | {"W_o": False, "shortcut": False, "W_s": False, "ages": False},
                "rec": base | {"P_rec": True},
                "vis": base | {"g": True}}
    parts = output.parts.present()
    assert set(parts) == set(expected)
    without = build(tiny_config, tiny_data, tmp_path, history_shortcut=False, gradient_checkpointing=checkpointing)
    found = reached(without, without(batch_of(without, tiny_data)).parts.rec)
    assert not found["W_e"] and found["W_o"] and without.shortcut is None
    for name in expected:
        fresh = model(batch_of(model, tiny_data)).parts.present()[name]
        assert reached(model, fresh) == expected[name], name


def sequences_of(packed, *values):
    """The parts of (N, ...) tensors that belong to each sequence."""
    return zip(*(x.split(np.diff(packed.offsets).tolist()) for x in values), strict=True)


def plain_loss(model: KarmaModel, batch) -> torch.Tensor:
    """The loss as one would first write it: prompt by prompt, text by text, logits whole, dense softmax."""
    lm = causal_lm(model.backbone)
    table, cross_entropy = lm.get_input_embeddings(), torch.nn.functional.cross_entropy
    lm.set_attn_implementation("eager")
    (chunk,) = batch.prompts
    soft = model.history_projection(model.features(chunk.history_items))[:, 0]
    states, gen = [], []
    for ids, slots in sequences_of(chunk.tokens, chunk.tokens.token_ids, chunk.tokens.slots):
        inputs = torch.stack([soft[s] if s >= 0 else model.emb_token if s == -2 else table(i)
                              for i, s in zip(ids, slots, strict=True)])
        states.append(lm.base_model(inputs_embeds=inputs[None]).last_hidden_state[0])
        emb = slots.tolist().index(-2)
        gen.append(cross_entropy(lm.lm_head(states[-1][emb:-1]), ids[emb + 1:]))
    means, start = {}, 0
    for slots in sequences_of(chunk.tokens, chunk.tokens.slots):
        seen = []
        for place, slot in enumerate(slots[0].tolist(), start):
            if slot >= 0:
                features = model.features(chunk.history_items[slot:slot + 1])[0]
                seen.insert(0, torch.nn.functional.normalize(model.shortcut.projection(features), dim=0))
            if seen:
                ages = model.shortcut.age_logits.softmax(0)[:len(seen)]
                means[place] = sum(w * e for w, e in zip(ages / ages.sum(), seen, strict=False))
        start += len(slots[0])
    means = torch.stack([means[place] for place in chunk.pairs.tolist()])
    u = torch.nn.functional.normalize(
        model.interest_projection(torch.nn.functional.normalize(torch.cat(states)[chunk.pairs], dim=-1))
        + model.shortcut.gain * means, dim=-1)
    e = model.item_embeddings(batch.keys)
    logits = u @ e.T * model.loss.contrastive.scale - batch.log_q
    left_out = (batch.keys[:len(u), None] == batch.keys) | (batch.key_users[:len(u), None] == batch.key_users)
    left_out &= ~torch.eye(len(u), len(e), dtype=torch.bool)
    act = cross_entropy(logits.masked_fill(left_out, -torch.inf), torch.arange(len(u)))

    decoder = copy.deepcopy(lm)  # one that never had adapters
    for module in decoder.modules():
        if hasattr(module, "base_layer"):
            module.scaling = dict.fromkeys(module.scaling, 0.0)
    (texts,), rec = batch.decode, []
    k = model.config.num_soft_tokens
    for row, (ids, _) in enumerate(sequences_of(texts.tokens, texts.tokens.token_ids, texts.tokens.slots)):
        inputs = torch.cat([model.decode_projection(u[texts.pairs[row]][None])[0], table(ids[k:])])
        hidden = decoder.base_model(inputs_embeds=inputs[None]).last_hidden_state[0]
        rec.append(cross_entropy(decoder.lm_head(hidden[k - 1:-1]), ids[k:]))
    return act + torch.stack(gen).mean() + torch.stack(rec).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_and_all_gradients_equal_the_plain_step(tiny_config, tiny_data, tmp_path, checkpointing, monkeypatch):
    monkeypatch.setattr("karma_fast.model.reading.compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr("karma_fast.model.backbone.compute_dtype", lambda device: torch.float32)
    model = build(tiny_config, tiny_data, tmp_path, gradient_checkpointing=checkpointing, decode_weight=1.0)
    assert causal_lm(model.backbone).config._attn_implementation == PACKED
    model.train()
    batch = batch_of(model, tiny_data)
    loss = model(batch).loss
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = build(tiny_config, tiny_data, tmp_path, gradient_checkpointing=False, decode_weight=1.0)
    plain.train()
    expected = plain_loss(plain, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs)
    for name, grad in ours.items():
        assert (grad - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


def test_weight_zero_switches_a_term_off_and_leaves_its_modules_out(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config, tiny_data, tmp_path, decode_weight=0.0)
    batch = batch_of(model, tiny_data)
    assert model.decode_projection is None and not batch.decode and not len(batch.prompts[0].texts)
    output = model(batch)
    assert set(output.parts.present()) == {"act"}
    torch.testing.assert_close(output.loss, output.parts.act)
    with pytest.raises(ValueError, match="without L_rec"):
        model.decode(output.u[:1])


def test_total_is_the_weighted_sum(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config, tiny_data, tmp_path, act_weight=2.0, decode_weight=0.5, gen_weight=3.0, rec_weight=0.25)
    output = model(batch_of(model, tiny_data))
    parts = output.parts
    torch.testing.assert_close(output.loss, 2 * parts.act + 0.5 * (3 * parts.gen + 0.25 * parts.rec))


@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_row_does_not_depend_on_its_batch(tiny_config, tiny_data, tmp_path, positions):
    model = build(tiny_config, tiny_data, tmp_path, positions=positions).eval()
    batch = batch_of(model, tiny_data, 6)
    whole = model(batch)
    starts, ends = training_windows(tiny_data.sequences, tiny_data.split, model.config.max_history, positions)
    at = 0
    texts = []
    for row in range(6):
        one = model.collator(tiny_data.sequences)([(int(starts[row]), int(ends[row]))])
        alone = model(one)
        torch.testing.assert_close(whole.u[at:at + len(alone.u)], alone.u, rtol=2e-2, atol=2e-2)
        assert torch.equal(batch.keys[at:at + len(alone.u)], one.keys)
        at += len(alone.u)
        texts.append((alone.parts.gen, alone.parts.rec))
    assert at == len(whole.u)
    torch.testing.assert_close(whole.parts.gen, torch.stack([g for g, _ in texts]).mean(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(whole.parts.rec, torch.stack([r for _, r in texts]).mean(), rtol=1e-2, atol=1e-2)


def test_serving_gives_the_vector_that_training_saw(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config, tiny_data, tmp_path, positions="last").eval()
    batch = batch_of(model, tiny_data, 5)
    trained = model(batch).u
    starts, ends = training_windows(tiny_data.sequences, tiny_data.split, model.config.max_history, "last")
    histories = [tiny_data.sequences.items[starts[w]:ends[w] - 1] for w in range(5)]
    torch.testing.assert_close(model.encode_users(histories), trained.detach(), rtol=2e-2, atol=2e-2)


def test_inner_positions_see_no_later_item_and_no_target_text(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config, tiny_data, tmp_path).eval()
    sequences = copy.deepcopy(tiny_data.sequences)
    batch = batch_of(model, tiny_data, 1)
    before = model(batch).u
    end = int(training_windows(sequences, tiny_data.split, model.config.max_history, "all")[1][0])
    sequences.items[end - 1] = (sequences.items[end - 1] + 7) % len(tiny_data.items)  # another target
    after = model(batch_of(model, tiny_data, 1, sequences)).u
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)  # not even the last query sees it
    sequences.items[end - 2] = (sequences.items[end - 2] + 7) % len(tiny_data.items)  # another last history item
    changed = model(batch_of(model, tiny_data, 1, sequences)).u
    torch.testing.assert_close(before[:-1], changed[:-1], rtol=1e-3, atol=1e-3)
    assert (before[-1] - changed[-1]).abs().max() > 1e-2


def test_items_without_vectors_share_a_learned_one(tiny_config, tiny_data, tmp_path):
    items = with_images(tiny_data.items)
    items = dataclasses.replace(items, texts=["", *items.texts[1:]])
    model = build(tiny_config, tiny_data, tmp_path, items)
    assert model.features.kinds == ["text", "image", "id"]
    z = model.features(torch.tensor([0, 3]))
    text, image = model.features.widths["text"], model.features.widths["image"]
    torch.testing.assert_close(z[0, :text], model.features.missing["text"])
    torch.testing.assert_close(z[1, text:text + image], model.features.missing["image"])
    z.sum().backward()
    assert model.features.missing["text"].grad is not None


@pytest.mark.parametrize(("chosen", "kinds"), [("states", ["text", "id"]), ("words", ["words", "id"]),
                                              ("both", ["text", "words", "id"])])
def test_text_vectors_are_the_chosen_ones(tiny_config, tiny_data, tmp_path, chosen, kinds):
    model = build(tiny_config, tiny_data, tmp_path, text_vectors=chosen, word_dim=6)
    assert model.features.kinds == kinds
    if "words" in kinds:
        found, _, _ = word_vectors(tiny_data.items.texts, 6)
        length = np.sqrt(np.square(found - found.mean(axis=0)).sum(axis=1).mean())
        np.testing.assert_allclose(model.features.words, (found - found.mean(axis=0)) / length, rtol=1e-4, atol=1e-5)
    model(batch_of(model, tiny_data)).loss.backward()
    assert (model.item_projection.weight.grad.abs().sum(dim=0) > 0).all()  # of every kind
    model.save_pretrained(tmp_path / "model")
    again = KarmaModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again.encode_items(), model.encode_items())


def test_the_window_of_id_vectors_is_a_setting(tiny_config, tiny_data, tmp_path):
    near = build(tiny_config, tiny_data, tmp_path, id_window=1).features
    width = tiny_config.model.id_dim
    one, twenty = (id_vectors(tiny_data.sequences, tiny_data.split, len(tiny_data.items), width, window=window)
                   for window in (1, 20))
    present = ~np.isnan(one).any(axis=1)
    assert not np.allclose(one[present], twenty[present])
    np.testing.assert_allclose(near.id[near.id_present], one[present], rtol=1e-5)  # unit rows stay as they are


def test_id_vectors_never_see_held_out_events(tiny_data):
    split, sequences = tiny_data.split, tiny_data.sequences
    before = id_vectors(sequences, split, 40, 8)
    changed = copy.deepcopy(sequences)
    held_out = np.concatenate([split.valid, split.test])
    changed.items[held_out] = (changed.items[held_out] + 11) % 40
    np.testing.assert_array_equal(before, id_vectors(changed, split, 40, 8))
    inside = copy.deepcopy(sequences)
    inside.items[0] = (inside.items[0] + 11) % 40
    assert not np.array_equal(before, id_vectors(inside, split, 40, 8))


def test_id_vectors_put_companions_together():
    rng = np.random.default_rng(0)
    rows = [rng.permutation(5) + 5 * (u % 2) for u in range(40)]
    sequences = Sequences(np.arange(40).astype(str).astype(object), np.arange(41) * 5,
                          np.concatenate(rows).astype(np.int32))
    split = Split(sequences.indptr[1:], np.array([]), np.array([]), "")
    e = id_vectors(sequences, split, 10, 4)
    inner = e @ e.T
    assert inner[:5, :5].min() > 0.5 and np.abs(inner[:5, 5:]).max() < 0.1
    np.testing.assert_allclose(np.linalg.norm(e, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("shortcut", [True, False])
def test_starting_point_ranks_by_the_latest_items(tiny_config, tiny_data, tmp_path, shortcut):
    config = dataclasses.replace(tiny_config.model, history_shortcut=shortcut)
    model = KarmaModel.build(config, tiny_data.items, tiny_data.sequences, tiny_data.split, cache=tmp_path,
                             device="cpu").eval()
    e = model.encode_items()
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(40), rtol=1e-5, atol=1e-5)
    batch = batch_of(model, tiny_data, 20)
    (chunk,) = batch.prompts
    slots = chunk.tokens.slots[chunk.pairs]
    u = model(batch).u[slots >= 0].detach()
    read = chunk.history_items[slots[slots >= 0]]
    scores = u @ e.T
    rank = (scores > scores.gather(1, read[:, None])).sum(dim=1).float()
    assert rank.mean() < 10  # of 40; chance is 20


def test_states_count_by_direction_and_begin_small_beside_the_shortcut(tiny_config, tiny_data, tmp_path):
    model = KarmaModel.build(tiny_config.model, tiny_data.items, tiny_data.sequences, tiny_data.split, cache=tmp_path,
                             device="cpu").eval()
    (chunk,) = batch_of(model, tiny_data, 8).prompts
    with torch.no_grad():
        states = model._prompt_states(chunk)[chunk.pairs].float()
        u = model.interest(states, chunk)
        assert torch.allclose(model.interest(100 * states, chunk), u, atol=1e-5)
        alone = model.interest_projection(torch.nn.functional.normalize(states, dim=-1)).norm(dim=-1)
        assert 0.002 < alone.mean() < 0.05  # of the shortcut's g, 1
        model.interest_projection.weight.mul_(100)
        assert not torch.allclose(model.interest(states, chunk), u, atol=0.1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_model_serves_without_its_catalogue_in_tokens(tiny_config, tiny_data, tmp_path, name):
    of = recipe(name)
    config = of.Config(backbone=tiny_config.model.backbone, quantization="none", max_history=4, id_dim=8)
    of.model_class().build(config, tiny_data.items, tiny_data.sequences, tiny_data.split,
                           device="cpu").save_pretrained(tmp_path / name)
    again = of.model_class().from_pretrained(tmp_path / name, device="cpu")
    again.encode_users([tiny_data.sequences.items[:4], np.array([], np.int64)], ["red", ""])
    if name == "karma":
        again.encode_items()
        again.decode(again.encode_users([[1]]))
    assert not {"texts", "item_texts"} & set(vars(again.prompts))
    batch = again.collator(tiny_data.sequences)([(0, 3), (4, 7)])
    assert "texts" in vars(again.prompts) or "item_texts" in vars(again.prompts)
    assert len(batch.prompts[0].pairs)


def test_item_texts_are_tokenised_in_blocks(tiny_config, tiny_data, tmp_path, monkeypatch):
    model = build(tiny_config, tiny_data, tmp_path)
    expected = encode_texts(tiny_data.items.texts, model.backbone, model.tokenizer, "An item: ")
    given, tokenizer = [], model.tokenizer

    def counted(texts, **options):
        given.append(texts)
        return tokenizer(texts, **options)

    monkeypatch.setattr("karma_fast.data.tokens.BLOCK", 15)
    found = encode_texts(tiny_data.items.texts, model.backbone, counted, "An item: ")
    np.testing.assert_array_equal(found, expected)
    assert [len(texts) for texts in given[1:]] == [15, 15, 10]


def test_save_and_load_give_the_same_model(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config, tiny_data, tmp_path, with_images(tiny_data.items)).eval()
    history = [tiny_data.sequences.items[:4], np.array([], dtype=np.int64)]
    model.save_pretrained(tmp_path / "model", {"protocol": "how", "rows": {"karma": {"HR@10": 0.5}}, "data": "tiny"})
    again = KarmaModel.from_pretrained(tmp_path / "model", device="cpu")
    assert torch.equal(model.encode_items(), again.encode_items())
    assert torch.equal(model.encode_users(history), again.encode_users(history))
    assert model.decode(model.encode_users(history)) == again.decode(model.encode_users(history))
    assert again.items.texts == model.items.texts and list(again.items.ids) == list(model.items.ids)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| karma | 0.5000 |" in card and "how" in card and "data: tiny" in card and "transformers" in card
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "items.safetensors", "items.jsonl", "README.md"}
    from safetensors.torch import load_file

    held = load_file(tmp_path / "model" / "model.safetensors")
    assert not any("embed_tokens" in n or "lm_head" in n for n in held)  # the frozen language model is not copied


def test_saving_a_model_removes_the_index_of_the_one_before(tiny_config, tiny_data, tmp_path):
    model, folder = build(tiny_config, tiny_data, tmp_path), tmp_path / "model"
    ItemIndex(model.encode_items().flip(0)).save(folder)
    (folder / "index.faiss").touch()
    (folder / "index.safetensors").touch()
    model.save_pretrained(folder)
    assert not list(folder.glob("index.*"))
    u = model.encode_items()[:5]
    assert item_index(model, folder).search(u, 3)[1].tolist() == (u @ model.encode_items().T).topk(3).indices.tolist()


def test_a_local_backbone_is_found_from_any_folder(tiny_config, tiny_data, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_backbone.parent)
    for name in RECIPES:
        assert recipe(name).Config(backbone=tiny_backbone.name).backbone == str(tiny_backbone.resolve())
        assert recipe(name).Config(backbone="some/hub-id").backbone == "some/hub-id"
    build(tiny_config, tiny_data, tmp_path, backbone=f"./{tiny_backbone.name}").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    KarmaModel.from_pretrained(tmp_path / "model", device="cpu")


def test_items_with_rare_line_ends_are_saved(tiny_config, tiny_data, tmp_path):
    items = dataclasses.replace(tiny_data.items, ids=tiny_data.items.ids.copy(), titles=[*tiny_data.items.titles])
    items.ids[3], items.titles[4] = "a\u2028b\x85c", "one\u2029two\r\nthree"
    build(tiny_config, tiny_data, tmp_path, items).save_pretrained(tmp_path / "model")
    again = KarmaModel.from_pretrained(tmp_path / "model", device="cpu").items
    assert list(again.ids) == list(items.ids) and again.titles == items.titles


def test_loading_refuses_what_is_no_model(tmp_path, tiny_config, tiny_data):
    with pytest.raises(ConfigError, match="holds no saved model"):
        KarmaModel.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build(tiny_config, tiny_data, tmp_path, backbone=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="lora_targets"):
        build(tiny_config, tiny_data, tmp_path, lora_targets="no_such_layer")
    with pytest.raises(ConfigError, match="token embeddings"):
        build(tiny_config, tiny_data, tmp_path, lora_targets="q_proj,embed_tokens")


@pytest.mark.parametrize(("name", "advice"), [
    ("qwen2.5-1.5b", "this short name is for `karma-fast plan` alone; give the hub id Qwen/Qwen2.5-1.5B, a "),
    ("Qwen2.5-7B-Instruct", "give the hub id Qwen/Qwen2.5-7B-Instruct, a local folder, or "),
    ("Qwen/Qwen2.5-1.5B", "give a hub id that this machine can reach, a local folder, or smollm2-135m-instruct")])
def test_a_short_name_of_plan_that_cannot_be_loaded_is_told_its_hub_id(name, advice, monkeypatch):
    def unknown(name):
        raise OSError(f"{name} is not a local folder")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unknown)
    with pytest.raises(ConfigError) as caught:
        load_backbone(KarmaConfig(backbone=name, quantization="none"), "cpu")
    assert f"model.backbone: {name!r} cannot be loaded: {name} is not a local folder; " in str(caught.value)
    assert advice in str(caught.value)


def test_every_short_name_of_plan_has_a_hub_id_and_help_says_whose_it_is():
    assert [full.rpartition("/")[2].lower() for full in HUB_IDS.values()] == [*HUB_IDS] == [*SHAPES]
    text = next(action.help for action in build_parser()[1]["plan"]._actions if action.dest == "model")
    assert "(for plan alone; training takes the hub id, such as Qwen/Qwen2.5-1.5B)" in text


def test_text_vectors_are_cached_by_model_and_text(tiny_config, tiny_data, tmp_path, monkeypatch):
    build(tiny_config, tiny_data, tmp_path)
    files = list((tmp_path / "text-vectors").iterdir())
    assert len(files) == 1
    monkeypatch.setattr("karma_fast.model.features.encode_texts", lambda *a, **k: pytest.fail("encoded again"))
    build(tiny_config, tiny_data, tmp_path)
    monkeypatch.undo()
    build(tiny_config, tiny_data, tmp_path,
          dataclasses.replace(tiny_data.items, texts=["other", *tiny_data.items.texts[1:]]))
    assert len(list((tmp_path / "text-vectors").iterdir())) == 2


def test_stopped_text_vectors_go_on_where_they_were(tiny_config, tiny_data, tmp_path, monkeypatch):
    model = build(tiny_config, tiny_data, tmp_path / "model")
    texts, left = [f"{text} {'red ' * 40 * n}" for n, text in enumerate(tiny_data.items.texts)], [2]
    given = (texts, model.backbone, model.tokenizer, "a model", tmp_path / "cache")
    expected = encode_texts(texts, model.backbone, model.tokenizer, batch_tokens=128)
    monkeypatch.setattr("karma_fast.model.features.encode_texts", functools.partial(encode_texts, batch_tokens=128))

    def stopping(*_, **__):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    with causal_lm(model.backbone).base_model.register_forward_pre_hook(stopping):
        with pytest.raises(KeyboardInterrupt):
            cached_text_vectors(*given, progress=False)
        left[0] = batches = 10 ** 6
        np.testing.assert_array_equal(cached_text_vectors(*given, progress=False), expected)
        rest = batches - left[0]
        encode_texts(texts, model.backbone, model.tokenizer, batch_tokens=128)
    assert 0 < rest == batches - rest - left[0] - 2  # all but the two that were done
    assert [path.suffixes for path in (tmp_path / "cache" / "text-vectors").iterdir()] == [[".npy"]]


def test_full_and_frozen_tuning(tiny_config, tiny_data, tmp_path):
    frozen = build(tiny_config, tiny_data, tmp_path, tuning="frozen")
    frozen(batch_of(frozen, tiny_data)).loss.backward()
    assert all(p.grad is None for p in frozen.backbone.parameters())
    assert frozen.history_projection.down.weight.grad.abs().sum() > 0
    full = build(tiny_config, tiny_data, tmp_path, tuning="full", quantization="none")
    full(batch_of(full, tiny_data)).loss.backward()
    assert all(p.grad is not None for p in full.backbone.parameters())
    with pytest.raises(ConfigError, match="full tuning needs"):
        KarmaConfig(tuning="full", quantization="4bit")


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_4bit_gradients_equal_those_of_the_dequantised_model(tiny_config, tiny_data, tmp_path):
    import bitsandbytes

    model = build(tiny_config, tiny_data, tmp_path, quantization="4bit")
    model.eval().encode_users([tiny_data.sequences.items[:4]])  # some CPUs repack weights here, and lose the backward
    batch = batch_of(model, tiny_data)
    ours = gradients(model, batch)  # first, as reading the state undoes the repacking
    plain = build(tiny_config, tiny_data, tmp_path)
    plain.features = model.features
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if n in model.trained_names()}, strict=False)
    layers = dict(plain.backbone.named_modules())
    count = 0
    for name, module in model.backbone.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            getattr(layers[name], "base_layer", layers[name]).weight.data.copy_(weight)
            count += 1
    assert count == 14
    theirs = gradients(plain, batch)
    assert set(ours) == set(theirs)
    for name, grad in ours.items():
        if theirs[name].norm() > 1e-4:
            assert torch.cosine_similarity(grad.flatten(), theirs[name].flatten(), dim=0) > 0.98, name


def test_8bit_trains(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config, tiny_data, tmp_path, quantization="8bit")
    assert "Linear8bitLt" in {type(m).__name__ for m in model.backbone.modules()}
    assert gradients(model, batch_of(model, tiny_data))["history_projection.down.weight"].abs().sum() > 0


def test_adapters_come_back_after_the_decoder_pass(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config, tiny_data, tmp_path).train()
    history = [tiny_data.sequences.items[:4]]
    before = model.encode_users(history)
    model(batch_of(model, tiny_data))
    assert torch.equal(before, model.encode_users(history))
    assert all(p.requires_grad for n, p in model.backbone.named_parameters() if "lora_" in n)
    with adapters_off(model.backbone):
        assert not torch.equal(before, model.encode_users(history))


def test_the_decoders_loss_has_no_second_derivative():
    x = torch.ones(2, requires_grad=True)
    loss = frozen_decoder_loss(x, lambda x: (x * x).sum()) ** 2
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_more_decoded_pairs_than_a_window_has_change_nothing(tiny_config, tiny_data, tmp_path):
    found = []
    for count in (1, 4):
        model = build(tiny_config, tiny_data, tmp_path, positions="last", decode_positions=count).eval()
        with torch.no_grad():
            found.append(model(batch_of(model, tiny_data)).parts)
    assert float(found[0].rec) > 0.1
    torch.testing.assert_close(found[0].rec, found[1].rec, rtol=1e-6, atol=0)


def test_decoding_check_sums_up_text_by_text(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config, tiny_data, tmp_path).eval()
    u, targets = model.encode_items(np.arange(20)), np.arange(20)
    each = held_out_losses(model, u, targets)
    with torch.no_grad():
        whole = model.reconstruction_loss(u, model.prompts.decode_chunk(targets, targets)) / 20
        alone = torch.stack([model.reconstruction_loss(u[i:i + 1], model.prompts.decode_chunk(targets[:1],
                                                                                             targets[i:i + 1]))
                             for i in range(20)])
    torch.testing.assert_close(each.mean(), whole, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(each, alone, rtol=3e-2, atol=3e-2)
    other = held_out_losses(model, u.roll(1, dims=0), targets)
    found = decoding_check(model, u, targets)
    assert found["shuffled_loss"] == pytest.approx(other.mean().item(), rel=1e-5)
    middle = u.mean(dim=0, keepdim=True)
    one = held_out_losses(model, (middle / middle.norm() * u.norm(dim=1).mean()).repeat(20, 1), targets)
    assert found["mean_loss"] == pytest.approx(one.mean().item(), rel=1e-4)
    assert found["share_better"] == pytest.approx((each < other).float().mean().item())


def test_a_seed_gives_the_same_model_with_and_without_caches(tiny_config, tiny_data, tmp_path, monkeypatch):
    def build_with(cache):
        return KarmaModel.build(tiny_config.model, tiny_data.items, tiny_data.sequences, tiny_data.split, cache=cache,
                                device="cpu", seed=3).state_dict()

    def converting(name):
        torch.rand(5)  # as making the weights of a converted model does
        return name

    first = build_with(tmp_path / "a")
    again = build_with(tmp_path / "a")
    monkeypatch.setattr("karma_fast.model.karma.resolve_backbone", converting)
    empty = build_with(tmp_path / "b")
    for name, value in first.items():
        assert torch.equal(value, again[name]) and torch.equal(value, empty[name]), name


def test_a_conversion_leaves_that_of_a_faster_process(tiny_backbone, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm, tokenizer = (kind.from_pretrained(tiny_backbone) for kind in (AutoModelForCausalLM, AutoTokenizer))
    folder, save = tmp_path / "models" / "tiny", tokenizer.save_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: lm)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: tokenizer)
    (folder / "broken").mkdir(parents=True)
    convert_gguf(tmp_path / "tiny.gguf", folder)
    assert (folder / "config.json").exists() and not (folder / "broken").exists()

    def saved_later(part):
        (folder / "of the other").touch()
        save(part)

    monkeypatch.setattr(tokenizer, "save_pretrained", saved_later)
    convert_gguf(tmp_path / "tiny.gguf", folder)
    assert (folder / "of the other").exists() and (folder / "model.safetensors").exists()
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(("process", "gpus", "device"), [(None, 2, "cuda"), ("1", 2, "cuda:1"), ("3", 1, "cuda:0"),
                                                         ("1", 0, "cpu")])
def test_each_process_of_torchrun_takes_its_own_gpu(process, gpus, device, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if process is not None:
        monkeypatch.setenv("LOCAL_RANK", process)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert default_device() == torch.device(device)


class Counted(np.ndarray):
    """Counts the entries that are taken out of it."""

    taken = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        Counted.taken += np.size(found)
        return np.asarray(found)


def test_cutting_requests_into_batches_costs_as_much_as_there_are_requests():
    parts, count = [], 3000
    lengths = np.random.default_rng(0).integers(1, 40, count).view(Counted)

    def build(part):
        parts.append(part)
        return torch.as_tensor(part)

    reader = SimpleNamespace(width=1, training=False, eval=lambda: None, train=lambda mode: None, device="cpu",
                             read=lambda rows, gen: (rows[:, None], None))
    found = Recommender.encode(reader, build, lengths, 64)
    assert found[:, 0].tolist() == list(range(count))
    assert Counted.taken <= 3 * 64 * len(parts)  # of the lengths, of their order, and the parts themselves
    ordered = np.asarray(lengths)
    sizes = [len(part) * ordered[part[-1]] for part in parts]
    assert max(sizes) <= 64 and len(parts) > 500
    # each is full: the next request would not have fitted
    assert all((len(part) + 1) * ordered[after[0]] > 64 for part, after in zip(parts, parts[1:], strict=False))
