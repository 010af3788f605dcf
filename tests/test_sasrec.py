"""SASRec: what a state may see, its loss against dense torch, exact resume, and that it learns."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from karma_fast.baselines import SASRec, SASRecConfig, sasrec_training, train_sasrec
from karma_fast.config import ConfigError
from karma_fast.data.schema import Sequences
from karma_fast.data.sequences import split_leave_one_out
from karma_fast.evaluation import ranking_metrics, target_ranks

SMALL = {"dim": 16, "heads": 2, "layers": 2, "dropout": 0.2, "max_history": 12, "batch_windows": 8}


def dataset(lists, items):
    indptr = np.concatenate([[0], np.cumsum([len(part) for part in lists])]).astype(np.int64)
    sequences = Sequences(np.arange(len(lists)).astype(str), indptr, np.concatenate(lists).astype(np.int32))
    return SimpleNamespace(items=range(items), sequences=sequences, split=split_leave_one_out(sequences))


def random_data(seed=0, users=30, items=25):
    rng = np.random.default_rng(seed)
    return dataset([rng.integers(0, items, rng.integers(3, 20)).tolist() for _ in range(users)], items)


def make_model(seed=0, items=25, **changed):
    torch.manual_seed(seed)
    return SASRec(items, SASRecConfig(**(SMALL | changed))).eval()


def states(model, *sequences):
    lengths = torch.tensor([len(part) for part in sequences])
    return model(torch.tensor([item for part in sequences for item in part]), lengths).split(lengths.tolist())


# ---- what a state sees ---------------------------------------------------------------------------------------------


def test_causal():
    model = make_model()
    one, = states(model, [3, 1, 4, 1, 5, 9])
    two, = states(model, [3, 1, 4, 7, 5, 9])
    torch.testing.assert_close(one[:3], two[:3], rtol=0, atol=0)
    assert ((one - two)[3:].abs().amax(1) > 1e-3).all()


def test_padding_and_neighbours_do_not_matter():
    model = make_model()
    parts = [[3, 1], [2, 7, 1, 8, 2, 8, 1, 8], [9], [4, 4, 4]]
    together = states(model, *parts)
    for part, found in zip(parts, together, strict=True):
        torch.testing.assert_close(found, states(model, part)[0], rtol=1e-5, atol=1e-6)


def test_attention_equals_a_loop():
    model = make_model(layers=1, heads=2)
    torch.manual_seed(1)
    for parameter in model.blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    items = torch.tensor([3, 1, 4, 1])
    block = model.blocks[0]
    x = model.items(items) * 4 + model.places(torch.arange(4))
    q, k, v = block.qkv(block.norm_attention(x)).split(16, dim=1)
    mixed = torch.zeros(4, 16)
    for t in range(4):
        for head in (slice(0, 8), slice(8, 16)):
            weights = torch.softmax(q[t, head] @ k[:t + 1, head].T / 8 ** 0.5, dim=0)
            mixed[t, head] = weights @ v[:t + 1, head]
    x = x + block.out(mixed)
    x = x + block.down(F.gelu(block.up(block.norm_feed(x))))
    torch.testing.assert_close(states(model, items.tolist())[0], model.norm(x), rtol=1e-4, atol=1e-5)


# ---- loss and vectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["cosine", "dot"])
def test_loss_and_gradients_equal_dense_cross_entropy(scoring):
    model = make_model(scoring=scoring, items=300, init_scale=9.0).double()
    rng = np.random.default_rng(0)
    lengths = torch.tensor([5, 12, 1, 7])
    items, targets = (torch.from_numpy(rng.integers(0, 300, 25)) for _ in range(2))
    model.loss(items, lengths, targets).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    users, table = model(items, lengths), model.items.weight
    scores = (9.0 * (model.loss_fn.log_scale - np.log(9.0)).exp() * F.normalize(users) @ F.normalize(table).T
              if scoring == "cosine" else users @ table.T)
    dense = F.cross_entropy(scores, targets)
    dense.backward()
    assert model.loss(items, lengths, targets).item() == pytest.approx(dense.item(), rel=1e-7)
    assert ("loss_fn.log_scale" in found) == (scoring == "cosine")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("scoring", ["cosine", "dot"])
def test_vectors_rank_as_the_loss_scores(scoring):
    model = make_model(scoring=scoring, dropout=0.5).train()
    users, items = model.user_vectors([[1, 2, 3], np.array([], int), list(range(20)), [7]]), model.item_vectors()
    assert model.training and users.dtype == items.dtype == torch.float32 and not users[1].any()
    model.eval()
    assert (model.user_vectors([list(range(8, 20))])[0] - users[2]).abs().max() < 1e-6  # the last 12
    last = states(model, [1, 2, 3])[0][-1]
    wanted = F.normalize(last, dim=0) @ F.normalize(model.items.weight).T if scoring == "cosine" else \
        last @ model.items.weight.T
    torch.testing.assert_close(users[0] @ items.T, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the catalogue has 0 to 24"):
        model.user_vectors([[25]])


def test_save_and_load(tmp_path):
    model = make_model()
    model.facts = {"epochs": 3}
    model.save(tmp_path / "m")
    again = SASRec.load(tmp_path / "m")
    assert again.config == model.config and again.facts == {"epochs": 3} and not again.training
    assert torch.equal(again.user_vectors([[1, 2]]), model.user_vectors([[1, 2]]))
    with pytest.raises(ConfigError, match="no saved SASRec"):
        SASRec.load(tmp_path)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="sasrec.dropuot: no such setting; did you mean dropout"):
        SASRecConfig.from_dict({"dropuot": 0.1})
    for bad in ({"heads": 3}, {"dropout": 1.0}, {"dim": 0}, {"learning_rate": 0}, {"init_scale": 101}):
        with pytest.raises(ConfigError, match=f"sasrec.{next(iter(bad))}"):
            SASRecConfig(**bad)


# ---- training ------------------------------------------------------------------------------------------------------


def train(data, folder=None, seed=0, **changed):
    config = SASRecConfig(**(SMALL | {"epochs": 4, "patience": 9} | changed))
    return train_sasrec(data, config, seed=seed, device="cpu", progress=False, folder=folder)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_same_seed_same_weights_and_the_caller_keeps_its_random_state():
    data = random_data()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = train(data)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert same(one, train(data)) and not same(one, train(data, seed=1))


@pytest.mark.parametrize("stopped_in", [1, 2, 4])
def test_resume_gives_the_weights_of_an_uninterrupted_run(stopped_in, tmp_path, monkeypatch):
    data, real, calls = random_data(), sasrec_training.run_epoch, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == stopped_in + 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sasrec_training, "run_epoch", stopping)
    if stopped_in < 4:
        with pytest.raises(KeyboardInterrupt):
            train(data, tmp_path)
        assert not (tmp_path / "sasrec.json").exists()
    else:
        train(data, tmp_path)  # it ended: the second call finds nothing left to do
    monkeypatch.setattr(sasrec_training, "run_epoch", lambda *args: calls.append(2) or real(*args))
    resumed, whole = train(data, tmp_path), train(data)
    assert same(resumed, whole) and same(SASRec.load(tmp_path), whole)
    assert calls.count(2) == 4 - stopped_in + 4
    assert {k: v for k, v in resumed.facts.items() if k != "seconds"} == \
        {k: v for k, v in whole.facts.items() if k != "seconds"}


def test_another_training_in_the_folder_is_refused(tmp_path):
    train(random_data(), tmp_path, epochs=1)
    with pytest.raises(ConfigError, match="seed"):
        train(random_data(), tmp_path, epochs=1, seed=1)
    with pytest.raises(ConfigError, match="data"):
        train(random_data(seed=1), tmp_path, epochs=1)


def test_training_reads_the_training_part_and_validation_alone():
    data, other = random_data(), random_data()
    other.sequences.items[other.split.test] = 0
    assert (data.sequences.items != other.sequences.items).any()
    assert same(train(data), train(other))
    leaked = random_data()
    leaked.split.train_end = leaked.sequences.indptr[1:]
    assert not same(train(data), train(leaked))


def test_a_training_without_time_goes_on_later(tmp_path):
    config = SASRecConfig(dim=8, heads=1, epochs=4, patience=4)
    asked = []
    first = train_sasrec(random_data(), config, seed=0, device="cpu", progress=False, folder=tmp_path,
                         go_on=lambda epoch: asked.append(epoch) or epoch < 2)
    assert asked == [1, 2] and first.facts["epochs"] == 2 and not first.facts["done"]
    assert not (tmp_path / "sasrec.json").exists()
    again = train_sasrec(random_data(), config, seed=0, device="cpu", progress=False, folder=tmp_path)
    whole = train_sasrec(random_data(), config, seed=0, device="cpu", progress=False)
    assert again.facts["done"] and again.facts["epochs"] == whole.facts["epochs"] and same(again, whole)


def test_early_stopping_keeps_the_best_epoch(monkeypatch):
    values = iter([0.1, 0.3, 0.2, 0.25, 0.2, 0.9])
    kept = []

    def scripted(model, data, positions):
        kept.append({name: x.clone() for name, x in model.state_dict().items()})
        return {"NDCG@10": next(values)}

    monkeypatch.setattr(sasrec_training, "validate", scripted)
    model = train(random_data(), epochs=20, patience=3)
    assert model.facts["epochs"] == 5 and model.facts["best_epoch"] == 2 and len(kept) == 5
    assert all(torch.equal(x, kept[1][name]) for name, x in model.state_dict().items())


def test_validation_ranks_at_most_so_many_requests_drawn_once_by_the_seed(monkeypatch):
    data, ranked, real = random_data(), [], sasrec_training.held_out_ranks

    def noting(sequences, positions, *rest, **options):
        ranked.append(tuple(positions.tolist()))
        return real(sequences, positions, *rest, **options)

    monkeypatch.setattr(sasrec_training, "held_out_ranks", noting)
    train(data, epochs=1)
    assert ranked == [tuple(data.split.valid.tolist())]
    monkeypatch.setattr(sasrec_training, "MOST_REQUESTS", 8)
    ranked.clear()
    for seed in (0, 1):
        train(data, seed=seed, epochs=2)
    assert ranked[0] == ranked[1] and ranked[2] == ranked[3] and ranked[0] != ranked[2]
    assert all(len(set(part)) == 8 and set(part) <= set(data.split.valid.tolist()) for part in ranked)


def test_every_training_event_with_a_predecessor_is_a_target_once(monkeypatch):
    data, targets = random_data(), []
    real = SASRec.loss

    def noting(self, items, lengths, wanted):
        targets.extend(wanted.tolist())
        return real(self, items, lengths, wanted)

    monkeypatch.setattr(SASRec, "loss", noting)
    train(data, epochs=1, max_history=4)
    starts, ends = data.sequences.indptr[:-1], data.split.train_end
    wanted = [int(x) for s, e in zip(starts, ends, strict=True) for x in data.sequences.items[s + 1:e]]
    assert sorted(targets) == sorted(wanted)


def test_nothing_to_learn_from():
    with pytest.raises(ValueError, match="no user has two events"):
        train(dataset([[0, 1, 2]], 3))


@pytest.mark.parametrize("scoring", ["cosine", "dot"])
def test_learns_a_cycle(scoring):
    """Item i + 1 follows item i (mod 30), wherever a user starts."""
    rng = np.random.default_rng(0)
    data = dataset([(np.arange(12) + rng.integers(30)) % 30 for _ in range(80)], 30)
    model = train(data, scoring=scoring, epochs=30, learning_rate=1e-2, dropout=0.0, dim=32, max_history=6)
    positions = data.split.test
    users = model.user_vectors([data.sequences.history(p, 6) for p in positions])
    ranks = target_ranks(users, model.item_vectors(), data.sequences.items[positions].astype(np.int64))
    assert ranking_metrics(ranks, (1,))["HR@1"] > 0.9
    assert json.dumps(model.facts)  # what is saved with the model


def test_two_processes_may_write_one_cache(tmp_path, monkeypatch):
    model, save, path = SASRec(5, SASRecConfig(**SMALL)), torch.save, tmp_path / "sasrec.pt"
    optimizer, other = torch.optim.SGD(model.parameters(), lr=0.1), os.getpid() + 1

    def interrupted(*given):  # before this file takes its place, the other process writes its own
        save(*given)
        monkeypatch.setattr(torch, "save", save)
        monkeypatch.setattr("os.getpid", lambda: other)
        sasrec_training.save_checkpoint(path, {"epoch": 2}, model, optimizer)

    monkeypatch.setattr(torch, "save", interrupted)
    sasrec_training.save_checkpoint(path, {"epoch": 1}, model, optimizer)
    assert torch.load(path, weights_only=True)["epoch"] == 1 and [p.name for p in tmp_path.iterdir()] == [path.name]
