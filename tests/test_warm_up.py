"""What is learned before training, and ID vectors made without the user who is trained on."""

import dataclasses
import gc
import tracemalloc

import numpy as np
import pytest
import torch

from karma_fast.config import ConfigError, KarmaConfig
from karma_fast.data import training_windows
from karma_fast.data.batches import log_sampling_probability
from karma_fast.data.schema import Sequences, Split
from karma_fast.evaluation.decoding import decoding_check
from karma_fast.model.features import ItemFeatures
from karma_fast.model.id_vectors import groups_of_users, held_out_id_vectors, id_vectors
from karma_fast.model.initialise import item_projection
from karma_fast.model.karma import KarmaModel
from karma_fast.model.warm_up import warm_up_decoder, warm_up_shortcut
from karma_fast.planning.workload import Workload


def build(tiny_config, tiny_data, tmp_path, **changes) -> KarmaModel:
    config = dataclasses.replace(tiny_config.model, **({"shortcut_warmup_epochs": 0.0} | changes))
    return KarmaModel.build(config, tiny_data.items, tiny_data.sequences, tiny_data.split, cache=tmp_path,
                            device="cpu")


def changed_parts(model, before) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_shortcut_warm_up_trains_items_and_shortcut_without_the_language_model(tiny_config, tiny_data, tmp_path,
                                                                               monkeypatch):
    model = build(tiny_config, tiny_data, tmp_path)
    before = weights_of(model)
    monkeypatch.setattr(model, "_prompt_states", None)
    losses = warm_up_shortcut(model, tiny_data.sequences, tiny_data.split, epochs=20)
    assert changed_parts(model, before) >= {"item_projection.weight", "shortcut.projection.weight",
                                            "shortcut.age_logits", "loss.contrastive.log_scale"}
    assert not any(name.startswith(("backbone", "history_projection", "interest_projection", "decode_projection"))
                   for name in changed_parts(model, before))
    assert len(losses) == 20 and np.mean(losses[-3:]) < losses[0] - 0.05
    again = build(tiny_config, tiny_data, tmp_path)
    assert losses == warm_up_shortcut(again, tiny_data.sequences, tiny_data.split, epochs=20)


def test_build_warms_up_before_what_is_fitted_to_the_items(tiny_config, tiny_data, tmp_path):
    cold = build(tiny_config, tiny_data, tmp_path)
    warm = build(tiny_config, tiny_data, tmp_path, shortcut_warmup_epochs=10.0)
    warm_up_shortcut(cold, tiny_data.sequences, tiny_data.split, epochs=10.0)
    assert torch.equal(cold.item_projection.weight, warm.item_projection.weight)
    assert torch.equal(cold.interest_projection.weight, warm.interest_projection.weight)  # drawn small, not fitted
    assert torch.equal(cold.emb_token, warm.emb_token)
    assert all(p.grad is None for p in warm.parameters())
    cold.set_starting_point(tiny_data.sequences, tiny_data.split)
    assert not torch.equal(cold.item_projection.weight, warm.item_projection.weight)  # it begins anew


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_decoder_warm_up_trains_p_rec_alone_and_tells_items_apart(tiny_config, tiny_data, tmp_path, tuning):
    model = build(tiny_config, tiny_data, tmp_path, tuning=tuning)
    before = weights_of(model)
    losses = warm_up_decoder(model, 30, batch_size=16)
    assert {name.split(".")[0] for name in changed_parts(model, before)} == {"decode_projection"}
    assert all(p.grad is None for p in model.parameters())
    assert len(losses) == 30 and np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    found = decoding_check(model, model.encode_items(), np.arange(len(tiny_data.items)))
    assert found["share_better"] > 0.5 and found["matched_loss"] < found["shuffled_loss"]


def test_the_host_reads_no_loss_before_the_last_step(tiny_config, tiny_data, tmp_path, monkeypatch):
    model = build(tiny_config, tiny_data, tmp_path)
    read, item, tolist = [], torch.Tensor.item, torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "item", lambda x: read.append(x.requires_grad) or item(x))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: read.append(len(x)) or tolist(x))
    losses = warm_up_shortcut(model, tiny_data.sequences, tiny_data.split, epochs=6)
    assert not any(x is True for x in read) and read[-1] == len(losses) == 6
    losses = warm_up_decoder(model, 7, batch_size=16)
    assert not any(x is True for x in read) and read[-1] == len(losses) == 7 and min(losses) > 0


@pytest.mark.parametrize("changes", [{"id_folds": 1}, {"id_folds": -2}, {"shortcut_warmup_epochs": -1}])
def test_settings_that_cannot_be(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        KarmaConfig(**changes)


def test_a_group_leaves_no_trace_in_its_own_id_vectors(tiny_data):
    sequences, split, size = tiny_data.sequences, tiny_data.split, len(tiny_data.items)
    onto = id_vectors(sequences, split, size, 8)
    sets = held_out_id_vectors(sequences, split, size, 8, folds=3, onto=onto)
    changed = sequences.items.copy()
    group = groups_of_users(len(sequences), 3)[sequences.user_of(np.arange(len(changed)))]
    changed[group == 1] = np.random.default_rng(0).integers(size, size=int((group == 1).sum()))
    others = held_out_id_vectors(dataclasses.replace(sequences, items=changed), split, size, 8, folds=3, onto=onto)
    np.testing.assert_array_equal(sets[1], others[1])
    assert not np.allclose(np.nan_to_num(sets[0]), np.nan_to_num(others[0]), atol=1e-3)
    assert not np.allclose(np.nan_to_num(sets[1]), np.nan_to_num(onto), atol=1e-3)


def test_held_out_vectors_are_rotated_onto_those_of_all_users(tiny_data):
    sequences, split, size = tiny_data.sequences, tiny_data.split, len(tiny_data.items)
    onto = id_vectors(sequences, split, size, 8)
    (first, _) = held_out_id_vectors(sequences, split, size, 8, folds=2, onto=onto)
    end = np.where(groups_of_users(len(sequences), 2) == 0, sequences.indptr[:-1], split.train_end)
    plain = id_vectors(sequences, dataclasses.replace(split, train_end=end), size, 8)
    there = ~np.isnan(plain).any(axis=1)
    np.testing.assert_array_equal(there, ~np.isnan(first).any(axis=1))
    np.testing.assert_allclose(first[there] @ first[there].T, plain[there] @ plain[there].T, atol=1e-5)
    # nearer than unrotated, and than with another rotation
    distance = lambda x: np.square(x - onto)[there & ~np.isnan(onto).any(axis=1)].sum()  # noqa: E731
    turned = first @ np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0].astype(np.float32)
    assert distance(first) < distance(plain) and distance(first) < distance(turned)


def test_rows_of_held_out_features():
    random = np.random.default_rng(0)
    words, ids = random.standard_normal((5, 3)), random.standard_normal((5, 2))
    held_out = random.standard_normal((2, 5, 2))
    held_out[1, 4] = np.nan
    features = ItemFeatures({"words": words, "id": ids}, held_out)
    plain = ItemFeatures({"words": words, "id": ids})
    assert len(features) == len(plain) == 5
    assert torch.equal(features(torch.arange(5)), plain(torch.arange(5)))
    rows = features(torch.arange(10, 15))
    assert torch.equal(rows[:, :3], plain(torch.arange(5))[:, :3])
    np.testing.assert_allclose(rows[:4, 3:].detach(), held_out[1, :4] * float(features.id_scale), rtol=1e-6)
    assert torch.equal(rows[4, 3:], features.missing["id"])
    saved, expected = features.tensors(), plain.tensors()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    assert torch.equal(ItemFeatures.from_tensors(saved)(torch.arange(5)), plain(torch.arange(5)))
    assert torch.equal(features.known("id"), plain.known("id"))


def peak_bytes(call):
    """What it returns, and the most memory that arrays took while it ran, beyond what was there before."""
    gc.collect()
    tracemalloc.start()
    found = call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, peak


@pytest.mark.parametrize("kind", ["text", "id"])
def test_features_take_little_more_memory_than_their_table(kind):
    random = np.random.default_rng(0)
    vectors = random.standard_normal((20_000, 32)).astype(np.float32) + 1
    vectors[::7, 3] = np.nan
    kept = vectors.copy()
    features, peak = peak_bytes(lambda: ItemFeatures({kind: vectors}))
    assert peak < 1.4 * vectors.nbytes
    np.testing.assert_array_equal(vectors, kept)
    present = ~np.isnan(vectors).any(axis=1)
    known = vectors[present]
    mean = known.mean(axis=0) if kind == "text" else np.zeros(32, np.float32)
    scale = 1 / float(np.sqrt(((known - mean) ** 2).sum(axis=1).mean()))
    expected = np.where(present[:, None], (vectors - mean) * scale, 0)
    assert torch.equal(getattr(features, kind), torch.from_numpy(expected))
    assert torch.equal(features.known(kind, 50), features.known(kind)[:50]) and len(features.known(kind, 50)) == 50
    saved = features.tensors()
    again, peak = peak_bytes(lambda: ItemFeatures.from_tensors(saved))
    assert peak < 0.1 * vectors.nbytes
    assert getattr(again, kind) is saved[kind] and again.widths == {kind: 32} and again.vocabulary is None


def test_held_out_vectors_are_scaled_where_they_are_put_together():
    vectors = np.random.default_rng(0).standard_normal((5, 10_000, 8)).astype(np.float32)
    vectors[2, ::5] = np.nan
    features, peak = peak_bytes(lambda: ItemFeatures({"id": vectors[0]}, vectors[1:]))
    assert peak < 1.4 * vectors.nbytes
    scale = 1 / float(np.sqrt((vectors[0] ** 2).sum(axis=1).mean()))
    assert torch.equal(features.id, torch.from_numpy(np.nan_to_num(vectors.reshape(-1, 8) * scale)))


def test_a_sample_of_the_features_is_all_that_is_taken_from_the_table(monkeypatch):
    features, taken = ItemFeatures({"text": np.random.default_rng(0).standard_normal((300, 8))}), []
    expected = item_projection(features, 4, sample=300)
    known = ItemFeatures.known
    monkeypatch.setattr(ItemFeatures, "known", lambda *args: taken.append(known(*args)) or taken[-1])
    assert torch.equal(item_projection(features, 4, sample=300), expected)
    item_projection(features, 4, sample=20)
    assert [len(block) for block in taken] == [300, 20]


@pytest.mark.parametrize("hard_negatives", [False, True])
def test_a_window_reads_the_vectors_made_without_its_user(tiny_config, tiny_data, tmp_path, hard_negatives):
    sequences, size = tiny_data.sequences, len(tiny_data.items)
    if hard_negatives:
        events = len(sequences.items)
        counts = np.arange(events) % 3
        sequences = dataclasses.replace(sequences, negatives_indptr=np.concatenate([[0], np.cumsum(counts)]),
                                        negatives=(np.arange(counts.sum()) % size).astype(np.int32))
    model, plain = build(tiny_config, tiny_data, tmp_path, id_folds=3), build(tiny_config, tiny_data, tmp_path)
    starts, ends = training_windows(sequences, tiny_data.split, 6, "all")
    windows = list(zip(starts.tolist(), ends.tolist(), strict=True))[:9]
    log_q = log_sampling_probability(sequences, tiny_data.split, size)
    batch, expected = (m.collator(sequences, log_q, chunk_size=4)(windows) for m in (model, plain))
    assert torch.equal(batch.keys, expected.keys) and torch.equal(batch.log_q, expected.log_q)
    assert torch.equal(batch.key_items[batch.key_index] % size, batch.keys)
    groups = groups_of_users(len(sequences), 3)[sequences.user_of(starts[:9])]
    of_pairs = np.repeat(groups, ends[:9] - starts[:9] - 1)
    number = len(of_pairs)
    np.testing.assert_array_equal(batch.key_items[batch.key_index[:number]] // size, of_pairs + 1)
    if hard_negatives:
        targets = np.concatenate([np.arange(start + 1, end) for start, end in windows])
        np.testing.assert_array_equal(batch.key_items[batch.key_index[number:]] // size,
                                      np.repeat(of_pairs, counts[targets]) + 1)
    at = 0
    for chunk, other in zip(batch.prompts, expected.prompts, strict=True):
        slots, plain_slots = chunk.tokens.slots, other.tokens.slots
        assert torch.equal(chunk.history_items[slots[slots >= 0]] % size, other.history_items[plain_slots[slots >= 0]])
        lengths = [end - start - 1 for start, end in windows[at:at + len(chunk.emb)]]
        np.testing.assert_array_equal(chunk.history_items[slots[slots >= 0]] // size,
                                      np.repeat(groups[at:at + len(lengths)], lengths) + 1)
        at += len(chunk.emb)
    assert at == 9


def test_training_alone_sees_the_held_out_vectors(tiny_config, tiny_data, tmp_path):
    model, plain = build(tiny_config, tiny_data, tmp_path, id_folds=2), build(tiny_config, tiny_data, tmp_path)
    histories = [tiny_data.sequences.items[:4], tiny_data.sequences.items[10:13]]
    assert torch.equal(model.encode_users(histories), plain.encode_users(histories))
    assert torch.equal(model.encode_items(), plain.encode_items())
    model.save_pretrained(tmp_path / "saved")
    again = KarmaModel.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.features.folds == 0
    torch.testing.assert_close(again.encode_users(histories), model.encode_users(histories))


def test_the_plan_counts_all_sets(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config.model, id_folds=4)
    assert Workload.of(config, 32, tiny_data).id_folds == Workload.of(config, 32).id_folds == 4
    with_vectors = dataclasses.replace(tiny_data, items=dataclasses.replace(
        tiny_data.items, id_vectors=np.zeros((len(tiny_data.items), 3), np.float32)))
    assert Workload.of(config, 32, with_vectors).id_folds == 0


def test_no_counts_no_vectors():
    sequences = Sequences(np.array(["u"], dtype=object), np.array([0, 3]), np.array([0, 1, 2], dtype=np.int32))
    split = Split(np.array([1]), np.array([1]), np.array([2]), "")
    assert np.isnan(id_vectors(sequences, split, 5, 2)).all()
