"""RA-Rec: what is injected where, its losses, exact chunks, frozen weights, saving, and a run from end to end."""

import dataclasses
import json
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from test_batches import Letters, assert_reaches_another_process
from torch.nn import functional as F

from karma_fast import KarmaTrainer, KarmaTrainingArguments
from karma_fast.config import ConfigError
from karma_fast.data.schema import Items
from karma_fast.losses import bpr
from karma_fast.losses.bpr import BPRLoss
from karma_fast.model.backbone import causal_lm, decoder_layers
from karma_fast.recipes import load_model
from karma_fast.recipes.ra_rec import Config
from karma_fast.recipes.ra_rec.id_models import Als, MeanOfItems, load_id_model, save_id_model
from karma_fast.recipes.ra_rec.injection import Given
from karma_fast.recipes.ra_rec.model import RaRecModel
from karma_fast.recipes.ra_rec.prompts import HybridPrompts
from karma_fast.recipes.ra_rec.select import BUCKETS, select_requests
from karma_fast.step import backward


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """So that what is left of a difference is a fault and not rounding."""
    monkeypatch.setattr("karma_fast.model.reading.compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr("karma_fast.model.backbone.compute_dtype", lambda device: torch.float32)


@pytest.fixture
def config(tiny_backbone) -> Config:
    return Config(backbone=str(tiny_backbone), quantization="none", max_history=4, id_dim=8, num_context_tokens=3,
                  max_title_tokens=6, max_text_tokens=8)


def build(config: Config, data, **changes) -> RaRecModel:
    return RaRecModel.build(dataclasses.replace(config, **changes), data.items, data.sequences, data.split,
                            device="cpu")


def batch_of(model: RaRecModel, data, chunk_size=None, count=9):
    starts, ends = model.training_windows(data.sequences, data.split)
    chosen = np.linspace(0, len(ends) - 1, count).astype(int)
    return model.collator(data.sequences, chunk_size=chunk_size)([(int(starts[w]), int(ends[w])) for w in chosen])


def gradients(model: RaRecModel, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    backward(model, batch)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model: RaRecModel, chunk, row: int) -> torch.Tensor:
    """The last state of one prompt: layer after layer, with the reserved places overwritten before each."""
    lm = causal_lm(model.backbone).base_model
    kind = "item" if chunk.of_items else "user"
    values = model.injected[kind](chunk.vectors * getattr(model, f"{kind}_scale"))[:, row]
    start, end = chunk.tokens.offsets[row:row + 2].tolist()
    reserved = model.prompts.reserved
    hidden = F.embedding(chunk.tokens.token_ids[start:end], lm.embed_tokens.weight)[None]
    places = torch.arange(end - start)[None]
    for number, layer in enumerate(decoder_layers(causal_lm(model.backbone))):
        if number < len(values):
            hidden = torch.cat([values[number][None], hidden[:, reserved:]], dim=1)
        mask = torch.full((end - start, end - start), float("-inf")).triu(1)[None, None]
        hidden = layer.layer(hidden, attention_mask=mask, position_ids=places,
                             position_embeddings=lm.rotary_emb(hidden, places))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return lm.norm(hidden)[0, -1]


@pytest.mark.parametrize("injection", ["layers", "input"])
@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_every_layer_sees_its_own_vectors_at_the_reserved_places(config, tiny_data, injection, attention):
    model = build(config, tiny_data, injection=injection, attention=attention).eval()
    for chunk in batch_of(model, tiny_data).prompts:
        found = model._last_states(chunk)
        for row in range(len(chunk.pairs)):
            torch.testing.assert_close(found[row], by_hand(model, chunk, row), rtol=1e-4, atol=1e-4)
    chunk = batch_of(model, tiny_data).prompts[0]
    before = model._last_states(chunk)
    with torch.no_grad():
        model.injected["user"].context[-1] += 1  # of the last layer that is injected into
    assert not torch.allclose(model._last_states(chunk), before, atol=1e-3)


def test_a_prompt_is_a_context_a_vector_and_the_titles(config, tiny_data):
    model = build(config, tiny_data)
    history = np.array([3, 0])
    chunk = model.prompts.build([history], [""])
    text = "".join(model.tokenizer.decode(chunk.text.token_ids))
    assert text.startswith(config.instruction) and text.endswith("Next:")
    for place, item in enumerate(history):  # oldest first, as far as it fits
        title = model.tokenizer.decode(chunk.tokens.token_ids[chunk.tokens.slots == place]).strip()
        assert len(title) > 3 and f"{tiny_data.items.titles[item]};".startswith(title)
    assert (chunk.tokens.slots[chunk.tokens.slots >= 0].diff() >= 0).all()
    assert chunk.places.tolist() == [0, 1, 2, 3] and int(chunk.pairs) == len(chunk.tokens.token_ids) - 1
    assert len(model.prompts.labels(history, "", tiny_data.items)) == len(chunk.tokens.token_ids)
    assert chunk.tokens.slots[:4].tolist() == [-2] * 4 and set(chunk.tokens.slots.tolist()) == {-2, -1, 0, 1}
    with_query = model.prompts.build([history], ["red"])
    assert len(with_query.tokens.token_ids) > len(chunk.tokens.token_ids)


@pytest.mark.parametrize("changes", [{}, {"injection": "input"}, {"gradient_checkpointing": True},
                                     {"attention": "eager"}, {"align_weight": 0.0}, {"act_weight": 0.0}])
def test_chunks_do_not_change_the_gradient(config, tiny_data, changes):
    model = build(config, tiny_data, **({"align_weight": 1.0} | changes))
    whole = gradients(model, batch_of(model, tiny_data))
    assert whole and not any(name.startswith("backbone") for name in whole)
    for chunk_size in (1, 4):
        parts = gradients(model, batch_of(model, tiny_data, chunk_size))
        assert parts.keys() == whole.keys()
        for name, g in whole.items():
            torch.testing.assert_close(parts[name], g, rtol=2e-3, atol=2e-5 * float(g.abs().max()) + 1e-7)


def test_batches_reach_another_process(config, tiny_data):
    model = build(config, tiny_data)
    model.prompts.item_vectors[5] = torch.nan
    assert_reaches_another_process(batch_of(model, tiny_data, chunk_size=2))


def test_all_that_is_trained_learns_and_the_language_model_does_not(config, tiny_data):
    model = build(config, tiny_data)
    found = gradients(model, batch_of(model, tiny_data))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name in trained - {"injected.user.missing", "injected.item.missing"}:  # every item here has a vector
        assert found[name].abs().sum() > 0, name
    chunks = batch_of(model, tiny_data).prompts
    read = sum(len(c.tokens.token_ids) for c in chunks)
    assert batch_of(model, tiny_data).num_tokens == read + sum(len(c.text.token_ids) for c in chunks)
    assert batch_of(build(config, tiny_data, align_weight=0.0), tiny_data).num_tokens == read
    lengths = model.prompts.of_items(np.arange(40)).tokens.offsets.diff()
    assert model.prompts.item_lengths.tolist() == lengths.tolist()  # what a pass over the catalogue is cut by
    for kind in ("user", "item"):  # every layer
        assert (found[f"injected.{kind}.weight"].flatten(1).norm(dim=1) > 0).all()
    assert model.trained_names() == {name for name in model.state_dict() if not name.startswith("backbone.")}


def test_titles_and_texts_are_tokenised_in_blocks_and_when_they_are_asked_for(monkeypatch):
    monkeypatch.setattr("karma_fast.data.tokens.BLOCK", 3)
    config, tokenizer = Config(max_title_tokens=4, max_text_tokens=5, item_instruction="I"), Letters()
    items = Items(np.arange(5), ["", "text", "longer text", "b", "c"], ["a", "", "a long title", "b", "c"])
    prompts = HybridPrompts(config, tokenizer, items, None, torch.zeros(5, 2))
    assert tokenizer.given == []
    assert prompts.length(np.array([0, 1, 2])) == prompts.length(np.array([], int)) + 3 + 0 + 4
    assert tokenizer.given == [3, 2]
    cut = lambda texts, most: [list(map(ord, text[:most])) for text in texts]  # noqa: E731
    assert list(prompts.titles) == cut([" a;", "", " a long title;", " b;", " c;"], 4)
    for found in (prompts, pickle.loads(pickle.dumps(prompts))):
        texts = cut(["", " text", " longer text", " b", " c"], 5)
        assert list(found.item_texts) == [[ord("I"), *ids, *found.closing] for ids in texts]
        assert found.item_lengths.tolist() == [prompts.reserved + len(text) for text in prompts.item_texts]
        assert found.tokenizer.given == [3, 2, 3, 2]


def test_items_and_users_without_a_vector_get_a_learned_one(config, tiny_data):
    model = build(config, tiny_data)
    vectors = model.prompts.item_vectors
    vectors[5] = torch.nan
    chunk = model.prompts.of_items(np.array([5, 6]))
    before = model.eval().read(chunk)[0]
    assert before.isfinite().all()
    with torch.no_grad():
        model.injected["item"].missing += 1
    after = model.read(chunk)[0]
    assert not torch.allclose(before[0], after[0], atol=1e-4) and torch.allclose(before[1], after[1])
    assert model.encode_users([np.array([], int)]).isfinite().all()


def test_requests_and_items_are_read_at_the_same_token_and_begin_in_one_space(config, tiny_data):
    model = build(config, tiny_data)
    requests, items = batch_of(model, tiny_data).prompts
    read = torch.cat([chunk.tokens.token_ids[chunk.pairs] for chunk in (requests, items)])
    assert len(set(read.tolist())) == 1
    user, item = (model.injected[kind] for kind in ("user", "item"))
    assert torch.equal(user.weight, item.weight) and user.weight is not item.weight
    assert not torch.equal(user.start, item.start)


def test_injected_vectors_are_as_far_apart_as_states_of_single_tokens(config, tiny_data):
    model = build(config, tiny_data).eval()
    lm, chunk = causal_lm(model.backbone), model.prompts.of_items(np.arange(40))
    with torch.no_grad():
        read = [lm(chunk.text.token_ids[None, a:b], output_hidden_states=True).hidden_states[:-1]
                for a, b in pairwise(chunk.text.offsets.tolist())]
        states = [torch.stack(layers)[:, 0, 1:] for layers in read]  # (layers, tokens, hidden) of each text
        mean = torch.stack([x.mean(dim=1) for x in states]).mean(dim=0)
        squares = torch.stack([(x - mean[:, None]).square().sum(dim=2).mean(dim=1) for x in states])
        expected = squares.mean(dim=0).sqrt()
        pooled = torch.stack([(x.mean(dim=1) - mean).square().sum(dim=1) for x in states]).mean(dim=0).sqrt()
    found = model.injected["item"].spread
    assert ((found / expected - 1).abs() < 0.2).all()  # one drawn token of each text
    assert (found > 1.5 * pooled).all()


def test_sasrec_says_nothing_of_items_without_a_training_event(config, tiny_data, tmp_path):
    from karma_fast.baselines import SASRec, SASRecConfig

    torch.manual_seed(0)
    SASRec(41, SASRecConfig(dim=8)).save(tmp_path / "sasrec")
    items = Items(np.append(tiny_data.items.ids, "new"), [*tiny_data.items.texts, "Green Comet"],
                  [*tiny_data.items.titles, "Green Comet"])
    model = build(config, dataclasses.replace(tiny_data, items=items), id_model=str(tmp_path / "sasrec"))
    never = tiny_data.split.training_counts(tiny_data.sequences, 41) == 0
    assert never[40] and model.prompts.item_vectors.isnan().all(dim=1).tolist() == never.tolist()
    model.eval().save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", "cpu")
    assert torch.equal(again.prompts.item_vectors.isnan(), model.prompts.item_vectors.isnan())
    torch.testing.assert_close(again.encode_items(), model.encode_items())


def test_items_without_any_text_are_told_apart_by_their_vectors(config, tiny_data):
    items = dataclasses.replace(tiny_data.items, titles=[""] * 40, texts=[""] * 40)
    e = build(config, dataclasses.replace(tiny_data, items=items)).encode_items()
    torch.testing.assert_close(e.norm(dim=1), torch.ones(40))
    assert torch.unique(e.round(decimals=3), dim=0).shape[0] > 30


def test_texts_are_read_as_the_model_embeds_them(config, tiny_data, tiny_backbone, tmp_path):
    """Gemma multiplies the rows of its table."""
    from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    GemmaForCausalLM(GemmaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, eos_token_id=0, pad_token_id=0, bos_token_id=0)).save_pretrained(tmp_path)
    model = build(config, tiny_data, backbone=str(tmp_path)).eval()
    chunk = model.prompts.of_items(np.array([3]))
    with torch.no_grad():
        states = causal_lm(model.backbone)(chunk.text.token_ids[None], output_hidden_states=True).hidden_states
    for found, expected in zip(model.text_states(chunk)[:, 0], states, strict=False):
        torch.testing.assert_close(found, expected[0, 1:].mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_states_are_pooled_without_a_look_at_the_owners(device):
    """On a GPU the host would wait for such a look; a meta tensor has nothing to look at."""
    given, owner = Given(), torch.tensor([0, 0, 2, 3, 3], device=device)
    hidden = torch.arange(10.0, device=device).view(1, 5, 2)
    with given.collecting(owner, 3) as means:
        for layer in range(2):
            given.at(layer, hidden)
    assert [x.shape for x in means] == [(3, 2)] * 2
    if device == "cpu":
        assert means[0].tolist() == [[1, 2], [0, 0], [4, 5]]


def test_alignment_is_info_nce_of_pooled_vectors_and_frozen_text(config, tiny_data):
    model = build(config, tiny_data)
    batch = batch_of(model, tiny_data)
    chunk = batch.prompts[1]
    values = model.injected["item"](chunk.vectors * model.item_scale).mean(dim=2)
    lm, expected = causal_lm(model.backbone), []
    for row in range(len(chunk.pairs)):
        start, end = chunk.text.offsets[row:row + 2].tolist()
        states = lm(chunk.text.token_ids[None, start:end], output_hidden_states=True).hidden_states[:-1]
        expected.append(torch.stack([x[0, 1:].mean(dim=0) for x in states]))
    texts = torch.stack(expected, dim=1)
    losses = []
    for mean, text, start, center in zip(values, texts, model.item_injected, model.item_texts, strict=True):
        logits = F.normalize(mean - start, dim=-1) @ F.normalize(text - center, dim=-1).T * config.align_scale
        losses.append(F.cross_entropy(logits, torch.arange(len(logits))))
    found = model.alignment_loss(batch, "item")
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)
    found.backward()
    assert model.injected["item"].weight.grad.abs().sum() > 0 and model.injected["user"].weight.grad is None


def test_bpr_is_its_definition():
    torch.manual_seed(0)
    query, key = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 6))
    labels, ids = torch.tensor([0, 1, 2, 5, 5]), torch.tensor([1, 2, 3, 4, 1, 6])
    loss = BPRLoss(scale=2.0).double()
    scores = loss.scale * query @ key.T
    rows = []
    for i, label in enumerate(labels):
        negatives = [j for j in range(6) if ids[j] != ids[label]]
        losses = torch.stack([-F.logsigmoid(scores[i, label] - scores[i, j]) for j in negatives])
        weights = torch.tensor([1 / ids.tolist().count(ids[j]) for j in negatives], dtype=torch.float64)
        rows.append((losses * weights).sum() / weights.sum())  # two keys of one item count as one
    torch.testing.assert_close(loss(query, key, labels, ids), torch.stack(rows).mean(), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(lambda *x: loss(*x, labels, ids), (query, key))


def test_bpr_in_blocks_gives_the_same(monkeypatch):
    torch.manual_seed(0)
    query, key, labels = torch.randn(7, 4, requires_grad=True), torch.randn(9, 4), torch.arange(7)
    loss, found = BPRLoss(), []
    for size in (1 << 20, 80):
        monkeypatch.setattr("karma_fast.losses.bpr.BLOCK_BYTES", size)
        query.grad = None
        value = loss(query, key, labels, torch.arange(9))
        value.backward()
        found.append((value.detach(), query.grad.clone()))
    torch.testing.assert_close(found[0], found[1])
    alone = loss(query[:1], key[:1], labels[:1], torch.zeros(1, dtype=torch.int64))
    assert alone.item() == 0
    for wrong in ((query, key[:, :2], labels, torch.arange(9)), (query, key, labels[:2], torch.arange(9)),
                  (query, key, labels - 1, torch.arange(9)), (query, key, labels + 3, torch.arange(9)),
                  (query, key, labels, torch.zeros(9, 2, dtype=torch.int64))):
        with pytest.raises(ValueError, match="needed"):
            loss(*wrong)


@pytest.mark.parametrize("wrong", [-1, 9])
def test_a_wrong_label_of_bpr_is_no_item_of_another_process(wrong, monkeypatch):
    """As on a GPU, where the values of labels are not looked at; the other process has as many queries and keys."""
    torch.manual_seed(0)
    query, key, ids = torch.randn(7, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True), torch.arange(9)
    monkeypatch.setattr(bpr, "check_inputs", lambda *_: None, raising=False)
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 0)):
        monkeypatch.setattr(bpr.dist, name, lambda value=value: value)
    monkeypatch.setattr(bpr, "batch_sizes", lambda *_: torch.tensor([[7, 9], [7, 9]]))
    monkeypatch.setattr(bpr, "gather_rows", lambda x, sizes: torch.cat([x, x]))
    loss, labels = BPRLoss(gather=True), torch.arange(7)
    assert loss(query, key, labels, ids).isfinite()
    found = loss(query, key, labels.where(labels != 3, wrong), ids)
    assert found.isnan() and all(x.isnan().all() for x in torch.autograd.grad(found, (query, key)))


def test_bpr_under_autocast():
    torch.manual_seed(0)
    query, key, labels, ids = torch.randn(7, 4), torch.randn(9, 4), torch.arange(7), torch.arange(9)
    loss, half = BPRLoss(), query.bfloat16().requires_grad_()
    exact = loss(half.double(), key.bfloat16().double(), labels, ids)  # products are not rounded to bfloat16
    torch.testing.assert_close(loss(half, key.bfloat16(), labels, ids).double(), exact, rtol=1e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        found, mixed = loss(query, key, labels, ids), loss(half, key, labels, ids)
    assert torch.equal(found, loss(query, key, labels, ids))
    assert torch.equal(mixed, loss(half.float(), key, labels, ids))
    mixed.backward()
    assert half.grad.dtype == torch.bfloat16
    assert torch.equal(loss(half, key, labels, ids), mixed)  # as towers of two dtypes are without autocast


def test_selection_filters_and_draws_evenly(config, tiny_data):
    from karma_fast.data import training_windows

    starts, ends = training_windows(tiny_data.sequences, tiny_data.split, 4, "last")
    everything = select_requests(tiny_data.sequences, tiny_data.split, tiny_data.items, starts, ends)
    assert everything.chosen.tolist() == list(range(len(ends))) and everything.buckets.sum() == len(ends)
    shared = select_requests(tiny_data.sequences, tiny_data.split, tiny_data.items, starts, ends, overlap=True)
    words = [set(title.lower().split()) for title in tiny_data.items.titles]
    events = tiny_data.sequences.items
    kept = set(shared.chosen.tolist())
    assert 0 < shared.without_overlap == len(ends) - len(kept)
    for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
        seen = set().union(*(words[i] for i in events[start:end - 1]))
        assert bool(words[events[end - 1]] & seen) == (n in kept)
    few = select_requests(tiny_data.sequences, tiny_data.split, tiny_data.items, starts, ends, share=0.3, seed=1)
    assert len(few.chosen) == round(0.3 * len(ends)) and len(set(few.chosen.tolist())) == len(few.chosen)
    least = few.drawn.max() - 1  # a bucket gives fewer than another only if it is empty then
    assert ((few.drawn >= least) | (few.drawn == few.buckets)).all() and few.drawn.shape == (BUCKETS, BUCKETS)
    again = select_requests(tiny_data.sequences, tiny_data.split, tiny_data.items, starts, ends, share=0.3, seed=1)
    other = select_requests(tiny_data.sequences, tiny_data.split, tiny_data.items, starts, ends, share=0.3, seed=2)
    assert np.array_equal(few.chosen, again.chosen) and not np.array_equal(few.chosen, other.chosen)
    whole = select_requests(tiny_data.sequences, tiny_data.split, tiny_data.items, tiny_data.sequences.indptr[
        tiny_data.sequences.user_of(starts)], ends)
    assert np.array_equal(everything.buckets, whole.buckets)  # a window is cut, a history is not
    assert (everything.buckets.sum(axis=1) > 0).all()
    plain = dataclasses.replace(tiny_data.items, titles=[""] * 40)
    with pytest.raises(ConfigError, match="select_overlap"):
        build(config, dataclasses.replace(tiny_data, items=plain), select_overlap=True)
    with pytest.raises(ValueError, match="share"):
        select_requests(tiny_data.sequences, tiny_data.split, tiny_data.items, starts, ends, share=0.0)


def test_a_user_folded_into_als_minimises_its_loss():
    torch.manual_seed(0)
    model = Als(torch.randn(6, 3))
    history = np.array([1, 4, 4])
    (x,) = model.user_vectors([history]).double().requires_grad_()
    rated, weights = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    rated[[1, 4]], weights[4] = 1, 2
    y = model.item_vectors().double()
    loss = (weights * (rated - y @ x).square()).sum() + 0.01 * x.square().sum()
    (g,) = torch.autograd.grad(loss, x)
    assert g.abs().max() < 1e-5
    assert model.user_vectors([np.array([], int)]).isnan().all()
    model = Als(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))  # no user of the training part had item 0
    assert model.item_vectors().isnan().all(dim=1).tolist() == [True, False]
    assert model.user_vectors([np.array([0]), np.array([0, 1])]).isnan().all(dim=1).tolist() == [True, False]


def test_id_models_are_saved_and_chosen_by_name(config, tiny_data, tmp_path):
    for model in (MeanOfItems(torch.randn(40, 3)), Als(torch.randn(40, 3))):
        save_id_model(model, tmp_path / model.kind)
        again = load_id_model(tmp_path / model.kind)
        assert type(again) is type(model)
        torch.testing.assert_close(again.user_vectors([np.array([2, 3])]), model.user_vectors([np.array([2, 3])]))
    from karma_fast.baselines import SASRec, SASRecConfig

    torch.manual_seed(0)
    SASRec(40, SASRecConfig(dim=8)).save(tmp_path / "sasrec")
    model = build(config, tiny_data, id_model=str(tmp_path / "sasrec"))
    assert model.prompts.item_vectors.shape == (40, 8)
    # it is frozen: neither among the trained weights, nor decayed or moved with them
    assert not any("id_model" in name for name in model.state_dict())
    chunk = model.prompts.build([np.array([2, 3]), np.array([], int)], ["", ""])
    assert chunk.vectors.isnan().all(dim=1).tolist() == [False, True]
    model.eval().save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", "cpu")
    torch.testing.assert_close(again.encode_users([np.array([2, 3])]), model.encode_users([np.array([2, 3])]))
    SASRec(39, SASRecConfig(dim=8)).save(tmp_path / "other")
    for name, message in ((str(tmp_path / "other"), "39 items"), ("nothing", "is needed"), ("items", "no ID vectors")):
        with pytest.raises(ConfigError, match=message):
            build(config, tiny_data, id_model=name)


def test_training_learns_resumes_and_is_saved(config, tiny_data, tmp_path):
    def trained(folder, steps, resume=False):
        args = KarmaTrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=16, save_steps=6,
            logging_steps=1, warmup_steps=1, disable_tqdm=True, use_cpu=True, projection_learning_rate=1e-2,
            chunk_size=8, lr_scheduler_type="constant")
        model = build(config, tiny_data)
        KarmaTrainer(model, args, tiny_data).train(resume_from_checkpoint=resume)
        return model

    model = trained("whole", 12)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    rows = [row for row in log if "act" in row]
    assert {"act", "user", "item", "scale", "share_u/act"} <= rows[0].keys()
    assert rows[-1]["act"] < 0.95 * rows[0]["act"] and rows[-1]["item"] < rows[0]["item"]
    trained("parts", 6)
    resumed = trained("parts", 12, resume=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)

    model.save_pretrained(tmp_path / "model", {"data": "tiny"})
    again = load_model(tmp_path / "model", "cpu")
    assert isinstance(again, RaRecModel)
    histories = [np.array([1, 2, 3]), np.array([], int)]
    torch.testing.assert_close(again.encode_users(histories), model.encode_users(histories))
    torch.testing.assert_close(again.encode_items(), model.encode_items())
    assert "RA-Rec" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(ValueError, match="no decoder"):
        model.decode(torch.zeros(1, model.width))
    from karma_fast import KarmaModel

    with pytest.raises(ConfigError, match="recipe ra_rec"):
        KarmaModel.from_pretrained(tmp_path / "model")


def test_a_model_without_context_tokens_is_saved(config, tiny_data, tmp_path):
    args = KarmaTrainingArguments(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, save_steps=1,
                                  disable_tqdm=True, use_cpu=True)
    KarmaTrainer(build(config, tiny_data, num_context_tokens=0), args, tiny_data).train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def test_item_embeddings_are_kept_until_a_weight_changes(config, tiny_data, monkeypatch):
    model = build(config, tiny_data).eval()
    first = model.encode_items()
    torch.testing.assert_close(model.encode_items([3, 30]), first[[3, 30]])
    monkeypatch.setattr(model, "read", None)
    assert torch.equal(model.encode_items(), first)
    monkeypatch.undo()
    with torch.no_grad():
        model.injected["item"].weight.mul_(1.5)
    assert not torch.allclose(model.encode_items(), first)
    torch.testing.assert_close(model.encode_items([3, 30]), model.encode_items()[[3, 30]])


GRADIENTS = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from karma_fast.config import DataConfig
from karma_fast.data import load_dataset
from karma_fast.model import backbone, reading
from karma_fast.processes import average_gradients
from karma_fast.recipes.ra_rec import Config
from karma_fast.recipes.ra_rec.model import RaRecModel
from karma_fast.step import backward

backbone.compute_dtype = reading.compute_dtype = lambda device: torch.float32
processes, (settings, files) = int(sys.argv[2]), eval(Path("settings.txt").read_text())
data = load_dataset(DataConfig(**files))
model = RaRecModel.build(Config(**settings), data.items, data.sequences, data.split, device="cpu").train()
if processes > 1:
    dist.init_process_group("gloo")
rank = dist.get_rank() if processes > 1 else 0
starts, ends = model.training_windows(data.sequences, data.split)
share, windows = 12 // processes, list(zip(starts.tolist(), ends.tolist()))
windows = (windows[:9] + windows[:3])[rank * share:][:share]  # the processes have items in common
backward(model, model.collator(data.sequences, chunk_size=3 if processes > 1 else None)(windows))
trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
average_gradients(list(trained.values()))
if rank == 0:
    torch.save({n: p.grad for n, p in trained.items()}, f"out-{processes}.pt")
if processes > 1:
    dist.destroy_process_group()
"""


def test_gradients_do_not_depend_on_processes(config, tiny_dataset, tmp_path):
    from test_processes import run_with

    (tmp_path / "settings.txt").write_text(
        repr((config.to_dict() | {"align_weight": 1.0, "num_negatives": 0}, tiny_dataset.to_dict())))
    one, two = (run_with(processes, GRADIENTS, tmp_path) for processes in (1, 2))
    assert set(one) == set(two) and one["injected.item.weight"].abs().sum() > 0
    for name, grad in one.items():
        assert (two[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-9, name


def test_bad_settings_are_refused(config):
    for changes, message in (({"select_share": 0.0}, "select_share"), ({"num_context_tokens": -1}, "num_context"),
                             ({"act_weight": 0.0, "align_weight": 0.0}, "every loss weight"),
                             ({"instruction": ""}, "empty prompt"), ({"id_dim": 0}, "id_dim")):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config, **changes)


def test_home_is_known_in_the_folder_of_an_id_model(config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert dataclasses.replace(config, id_model="~/sasrec").id_model == "/home/someone/sasrec"


@pytest.fixture
def config_file(config, tiny_dataset, tmp_path, monkeypatch):
    import yaml

    monkeypatch.chdir(tmp_path)
    values = {"recipe": "ra_rec", "data": tiny_dataset.to_dict(), "model": config.to_dict(), "training": {
        "max_steps": 3, "per_device_train_batch_size": 8, "logging_steps": 1, "warmup_steps": 1, "save_steps": 2,
        "output_dir": "runs/tiny", "use_cpu": True}}
    (tmp_path / "ra.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return "ra.yaml"


def test_a_run_from_end_to_end(config_file, capsys):
    from karma_fast.cli import main

    assert main(["train", config_file]) == 0
    out = capsys.readouterr().out
    assert "RA-Rec" in out and "not predicted for this recipe" in out
    metrics = json.loads(Path("runs/tiny/metrics.json").read_text())
    assert metrics["recipe"] == "ra_rec" and {"ra_rec", "ra_rec_start", "item_knn"} <= metrics["rows"].keys()
    report = Path("runs/tiny/report.md").read_text()
    assert report.startswith("# RA-Rec run") and "| RA-Rec at the start |" in report and "RA-Rec loses" in report
    assert main(["evaluate", "runs/tiny", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"]["ra_rec"]
    assert row["MRR"] == pytest.approx(metrics["rows"]["ra_rec"]["MRR"], abs=1e-6)
    assert main(["recommend", "runs/tiny", "--history", "Red Rocket, Blue Moon", "--k", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 3
    assert main(["recommend", "runs/tiny", "--history", "Red Rocket", "--explain"]) == 1
    assert "no decoder" in capsys.readouterr().err
    assert main(["embed", "runs/tiny", "--items", "items.npy"]) == 0
    assert np.load("items.npy").shape == (40, 64)
    assert main(["train", config_file, "--resume", "--recipe", "karma", "--model.select_share", "0.5"]) == 2
    assert "no such setting" in capsys.readouterr().err
    assert main(["train", config_file, "--recipe", "rarec"]) == 2
    assert "did you mean ra_rec" in capsys.readouterr().err


def test_the_select_command_writes_what_was_chosen(config_file, capsys):
    from karma_fast.cli import main

    assert main(["select", config_file, "--share", "0.2", "--overlap", "--output", "chosen.csv"]) == 0
    assert "share no word" in capsys.readouterr().out
    lines = Path("chosen.csv").read_text().splitlines()
    assert lines[0] == "user_id,item_id,event" and len(lines) > 10
    assert all(int(line.split(",")[2]) >= 1 for line in lines[1:])
    assert main(["select", config_file, "--share", "2"]) == 2


def test_a_trained_sasrec_is_kept_for_the_same_data_and_seed(config, tiny_data, tmp_path, monkeypatch):
    from karma_fast import baselines

    trained = []

    def counted(data, **options):
        trained.append(options["seed"])
        return train(data, baselines.SASRecConfig(dim=8, epochs=1), **options)

    train = baselines.train_sasrec
    monkeypatch.setattr(baselines, "train_sasrec", counted)

    def vectors(seed):
        model = RaRecModel.build(dataclasses.replace(config, id_model="sasrec"), tiny_data.items, tiny_data.sequences,
                                 tiny_data.split, seed=seed, device="cpu", cache=tmp_path)
        return model.prompts.item_vectors

    first, again, other = vectors(0), vectors(0), vectors(1)
    assert trained == [0, 1] and torch.equal(first, again) and not torch.equal(first, other)


def test_drawn_negatives_are_items_of_the_whole_catalogue(config, tiny_data):
    plain, more = (build(config, tiny_data, num_negatives=n) for n in (0, 30))
    before, batch, again = batch_of(plain, tiny_data), batch_of(more, tiny_data), batch_of(more, tiny_data)
    targets = before.keys[before.labels]
    assert torch.equal(batch.keys[batch.labels], targets) and torch.equal(batch.keys, again.keys)
    drawn = sorted(set(batch.keys.tolist()) - set(before.keys.tolist()))
    assert len(drawn) > 10 and set(before.keys.tolist()) < set(batch.keys.tolist())
    assert not torch.equal(batch_of(more, tiny_data, count=8).keys, batch.keys)
    # evenly: what few users chose is drawn as often as what many did
    starts, ends = more.training_windows(tiny_data.sequences, tiny_data.split)
    counts = tiny_data.split.training_counts(tiny_data.sequences, len(tiny_data.items))
    collate, seen = more.collator(tiny_data.sequences), np.zeros(len(tiny_data.items))
    for window in zip(starts.tolist(), ends.tolist(), strict=True):
        found = collate([window])
        seen[np.setdiff1d(found.keys.numpy(), found.keys[found.labels].numpy())] += 1
    common = counts > np.median(counts)
    assert 0.9 < seen[common].mean() / seen[~common].mean() < 1.1
    # every request is compared with each of them
    u = F.normalize(torch.randn(len(targets) + len(batch.keys), more.width), dim=-1)
    requests, items = u[:len(targets)], u[len(targets):]
    scores = more.loss.scale * (requests @ items.T)
    wanted = torch.stack([F.softplus(row[torch.arange(len(row)) != label] - row[label]).mean()
                          for row, label in zip(scores, batch.labels, strict=True)]).mean()
    losses = dict(more.embedding_losses(u, batch))
    torch.testing.assert_close(losses["act"](), wanted)
