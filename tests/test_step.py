"""The chunked backward: the same gradients as the whole loss at once, for every term, whatever is chunked how."""

import copy
import dataclasses

import pytest
import torch
from test_model import wake, with_images

from karma_fast.config import KarmaConfig
from karma_fast.data import training_windows
from karma_fast.data.batches import log_sampling_probability
from karma_fast.model.karma import KarmaModel
from karma_fast.step import OutOfMemory, backward, draws_dropout

TERMS = {"act": {"decode_weight": 0}, "gen": {"act_weight": 0, "rec_weight": 0, "vis_weight": 0},
         "rec": {"act_weight": 0, "gen_weight": 0, "vis_weight": 0},
         "vis": {"act_weight": 0, "gen_weight": 0, "rec_weight": 0}, "all": {}}


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr("karma_fast.model.reading.compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr("karma_fast.model.backbone.compute_dtype", lambda device: torch.float32)


def build(config: KarmaConfig, data, cache, **changes) -> KarmaModel:
    """With images, adapters off their zero, and texts and pictures that weigh as much as retrieval."""
    torch.manual_seed(0)
    model = KarmaModel.build(dataclasses.replace(config, **({"decode_weight": 1.0} | changes)),
                             with_images(data.items), data.sequences, data.split, cache=cache, device="cpu")
    wake(model)
    return model.train()


def batch_of(model: KarmaModel, data, chunk_size=None, count=11):
    starts, ends = training_windows(data.sequences, data.split, model.config.max_history, model.config.positions)
    collate = model.collator(data.sequences, log_sampling_probability(data.sequences, data.split, len(data.items)),
                             chunk_size=chunk_size)
    return collate(list(zip(starts[:count].tolist(), ends[:count].tolist(), strict=True)))


def taken(model: KarmaModel) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(ours: dict, theirs: dict, tolerance=1e-4) -> None:
    assert set(ours) == set(theirs)
    for name, grad in ours.items():
        assert float((grad - theirs[name]).norm()) <= tolerance * float(theirs[name].norm()), name


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_chunks_do_not_change_the_gradient(tiny_config, tiny_data, tmp_path, in_float32, term, positions):
    model = build(tiny_config.model, tiny_data, tmp_path, positions=positions, decode_positions=2, **TERMS[term])
    output = model(batch_of(model, tiny_data))
    output.loss.backward()
    expected = taken(model)
    for chunk_size in (1, 3, 4, 11, None):
        batch = batch_of(model, tiny_data, chunk_size)
        assert len(batch.prompts) == -(-11 // (chunk_size or 11))
        found = backward(model, batch)
        assert set(found.parts.present()) == set(output.parts.present())
        for name, value in output.parts.present().items():
            torch.testing.assert_close(getattr(found.parts, name), value, rtol=1e-5, atol=1e-6)
        assert_same(taken(model), expected)


@pytest.mark.parametrize("changes", [
    {"gradient_checkpointing": True}, {"tuning": "frozen"}, {"tuning": "full"}, {"attention": "eager"},
    {"attention": "sdpa"}, {"decode_share": 0.5}, {"symmetric": True, "log_q": False},
    {"tuning": "full", "gradient_checkpointing": True}])
def test_chunks_under_other_settings(tiny_config, tiny_data, tmp_path, in_float32, changes):
    model = build(tiny_config.model, tiny_data, tmp_path, **changes)
    model(batch_of(model, tiny_data)).loss.backward()
    expected = taken(model)
    backward(model, batch_of(model, tiny_data, 4))
    assert_same(taken(model), expected)


def test_chunks_of_a_4bit_model(tiny_config, tiny_data, tmp_path, in_float32):
    pytest.importorskip("bitsandbytes")
    model = build(tiny_config.model, tiny_data, tmp_path, quantization="4bit")
    model(batch_of(model, tiny_data)).loss.backward()
    expected = taken(model)
    backward(model, batch_of(model, tiny_data, 3))
    assert_same(taken(model), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_replayed_bit_for_bit(tiny_config, tiny_data, tmp_path, in_float32, checkpointing, monkeypatch):
    model = build(tiny_config.model, tiny_data, tmp_path, lora_dropout=0.3, gradient_checkpointing=checkpointing)
    assert draws_dropout(model.backbone)
    batch = batch_of(model, tiny_data, 4)
    torch.manual_seed(5)
    model(batch).loss.backward()  # the same chunks, all of them kept in the graph
    expected, after = taken(model), torch.rand(3)

    seen = []
    read = model.read
    monkeypatch.setattr(model, "read", lambda chunk, **options: seen.append((chunk, read(chunk, **options))) or
                        seen[-1][1])
    torch.manual_seed(5)
    backward(model, batch)
    assert torch.equal(torch.rand(3), after)  # and what comes next draws what it would have drawn
    found, gain = taken(model), "shortcut.gain"
    assert_same({gain: found.pop(gain)}, {gain: expected[gain]}, tolerance=1e-5)  # one number, in which sums cancel
    assert_same(found, {n: g for n, g in expected.items() if n != gain}, tolerance=1e-6)
    for chunk in batch.prompts[:-1]:
        first, second = (u for part, (u, _) in seen if part is chunk)
        assert torch.equal(first, second)
    torch.manual_seed(6)
    model(batch).loss.backward()
    other = taken(model)
    assert any(not torch.allclose(other[n], g) for n, g in expected.items())


def assert_replayed(model: KarmaModel, batch) -> None:
    """With the same seed, the gradients of the same chunks kept in the graph."""
    torch.manual_seed(5)
    model(batch).loss.backward()
    expected = taken(model)
    torch.manual_seed(5)
    backward(model, batch)
    assert_same(taken(model), expected, tolerance=1e-5)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_dropout_of_any_family_is_replayed(tiny_config, tiny_backbone, tiny_data, tmp_path, in_float32, family):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    values = {"opt": {"dropout": 0.3, "word_embed_proj_dim": 32, "ffn_dim": 48}, "gpt2": {"resid_pdrop": 0.3}}[family]
    tokenizer, folder = AutoTokenizer.from_pretrained(tiny_backbone), tmp_path / family
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
                                  num_attention_heads=2, **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = build(tiny_config.model, tiny_data, tmp_path, backbone=str(folder))
    batch = batch_of(model, tiny_data, 4)
    assert_replayed(model, batch)
    assert not draws_dropout(model.eval().backbone)


def test_dropout_of_an_adapted_head_is_replayed(tiny_config, tiny_data, tmp_path, in_float32):
    model = build(tiny_config.model, tiny_data, tmp_path, lora_targets="q_proj,lm_head", lora_dropout=0.3)
    assert model.head_is_trained
    batch = batch_of(model, tiny_data, 4)
    assert_replayed(model, batch)


@pytest.mark.parametrize("share", [1.0, 1e-9])
def test_a_batch_without_any_text(tiny_config, tiny_data, tmp_path, share):
    """Every text empty, or none looked at: nothing to learn from for the text terms, and no fault."""
    data = dataclasses.replace(tiny_data, items=dataclasses.replace(
        tiny_data.items, texts=[""] * 40 if share == 1 else tiny_data.items.texts))
    model = build(tiny_config.model, data, tmp_path, decode_share=share, vis_weight=0)
    found = backward(model, batch_of(model, data, 4))
    assert float(found.parts.act) > 0 and float(found.parts.gen) == 0
    alone = build(tiny_config.model, data, tmp_path, decode_share=share, vis_weight=0, act_weight=0, gen_weight=0)
    batch = batch_of(alone, data, 4)
    assert not any(float(v) for v in backward(alone, batch).parts.present().values()) and not taken(alone)
    alone(batch).loss.backward()
    assert not taken(alone)


def test_no_text_is_read_twice_and_one_chunk_is_read_once(tiny_config, tiny_data, tmp_path, monkeypatch):
    model = build(tiny_config.model, tiny_data, tmp_path)
    tokens = []
    run = model._decoder_states
    monkeypatch.setattr(model, "_decoder_states", lambda x, packed: tokens.append(len(x)) or run(x, packed))
    whole = batch_of(model, tiny_data)
    backward(model, whole)
    assert sum(tokens) == whole.num_tokens
    tokens.clear()
    batch = batch_of(model, tiny_data, 4)
    backward(model, batch)
    again = sum(len(chunk.bare.tokens.token_ids) for chunk in batch.prompts[:-1])
    assert sum(tokens) == whole.num_tokens + again
    with_texts = sum(len(chunk.tokens.token_ids) for chunk in batch.prompts[:-1])
    assert again == with_texts - sum(len(chunk.texts) for chunk in batch.prompts[:-1])


def test_accumulated_batches_add_up(tiny_config, tiny_data, tmp_path, in_float32):
    model = build(tiny_config.model, tiny_data, tmp_path)
    halves = [batch_of(model, tiny_data, 2, count) for count in (5, 7)]
    sum(model(batch).loss / 2 for batch in halves).backward()
    expected = taken(model)
    for batch in halves:
        backward(model, batch, scale=0.5)
    assert_same(taken(model), expected)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_measuring_the_terms_changes_no_gradient(tiny_config, tiny_data, tmp_path, in_float32, tuning):
    model = build(tiny_config.model, tiny_data, tmp_path, tuning=tuning)
    batch = batch_of(model, tiny_data, 4)
    plain = backward(model, batch)
    expected = taken(model)
    found = backward(model, batch, llm_norms=True)
    assert_same(taken(model), expected)
    assert plain.norms_llm == {} and set(found.norms_llm) == {"act", "gen", "rec", "vis"}
    assert set(found.norms_u) == {"act", "rec", "vis"}
    llm = [p for p in model.backbone.parameters() if p.requires_grad]
    output = model(batch)
    for name, term in model.loss.weighted(output.parts).items():
        grads = torch.autograd.grad(term, [output.u, *llm], retain_graph=True, allow_unused=True)
        norm = sum(g.square().sum() for g in grads[1:] if g is not None).sqrt()
        torch.testing.assert_close(found.norms_llm[name], norm, rtol=1e-3, atol=1e-7)
        if name != "gen":
            torch.testing.assert_close(found.norms_u[name], grads[0].norm(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("part, method", [("prompts", "read"), ("contrastive", "contrastive_loss"),
                                          ("reconstruction", "reconstruction_loss")])
def test_running_out_of_memory_names_the_part(tiny_config, tiny_data, tmp_path, part, method, monkeypatch):
    model = build(tiny_config.model, tiny_data, tmp_path)

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(model, method, fails)
    with pytest.raises(OutOfMemory, match="Tried to allocate 2.00 GiB") as caught:
        backward(model, batch_of(model, tiny_data, 4))
    assert caught.value.part == part
    monkeypatch.undo()
    monkeypatch.setattr(model, method, lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(model, batch_of(model, tiny_data, 4))

    def fails_without_a_word(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(model, method, fails_without_a_word)
    with pytest.raises(OutOfMemory, match="MemoryError"):
        backward(model, batch_of(model, tiny_data, 4))


def test_a_batch_moves_as_one(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config.model, tiny_data, tmp_path)
    batch = batch_of(model, tiny_data, 4)
    moved = copy.deepcopy(batch).to("meta")
    assert moved.prompts[0].tokens.places.is_meta and moved.prompts[0].bare.emb.is_meta and moved.keys.is_meta
    assert moved.decode[0].texts.labels.is_meta and moved.num_tokens == batch.num_tokens
    assert len(batch) == 11 and "keys" in batch and "nothing" not in batch
    with pytest.raises(KeyError):
        batch["nothing"]
