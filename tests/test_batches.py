"""Batches: where a pair is read, what stands in a prompt, which texts are looked at, chunks, streams."""

import dataclasses
import os
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import batch_of, build

from karma_fast.config import ConfigError, KarmaConfig
from karma_fast.data import training_windows
from karma_fast.data.batches import KarmaCollator, Prompts, log_sampling_probability, request
from karma_fast.data.packing import EMB, TEXT, OfTensors, Packed

ROOT = Path(__file__).resolve().parent.parent


def test_pairs_read_the_item_before_their_target(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config, tiny_data, tmp_path)
    batch = batch_of(model, tiny_data, 3)
    starts, ends = training_windows(tiny_data.sequences, tiny_data.split, model.config.max_history, "all")
    (chunk,), at = batch.prompts, 0
    rows = torch.arange(3).repeat_interleave(chunk.tokens.offsets.diff())
    for row in range(3):
        window = tiny_data.sequences.items[starts[row]:ends[row]]
        for place, target in enumerate(window[1:]):
            assert rows[chunk.pairs[at]] == row and batch.keys[at] == target
            assert batch.key_users[at] == tiny_data.sequences.user_of(starts[row])
            if place == len(window) - 2:
                assert chunk.pairs[at] == chunk.emb[row] and chunk.tokens.slots[chunk.pairs[at]] == EMB
            else:
                assert chunk.history_items[chunk.tokens.slots[chunk.pairs[at]]] == window[place]
            at += 1
    assert at == len(chunk.pairs)


def test_queries_enter_the_prompt_and_are_refused_at_inner_positions(tiny_config, tiny_data, tmp_path):
    sequences = dataclasses.replace(tiny_data.sequences, query_texts=["red rocket", "a knife"],
                                    queries=np.arange(len(tiny_data.sequences.items), dtype=np.int32) % 3 - 1)
    model = build(tiny_config, tiny_data, tmp_path, positions="last").eval()
    with pytest.raises(ConfigError, match="positions last, or data.query_column false"):
        KarmaCollator(KarmaConfig(positions="all"), model.prompts, sequences, None)
    batch = batch_of(model, tiny_data, 3, sequences)
    (chunk,) = batch.prompts
    decoded = [model.tokenizer.decode(chunk.tokens.token_ids[start:emb][chunk.tokens.slots[start:emb] == TEXT])
               for start, emb in zip(chunk.tokens.offsets, chunk.emb, strict=False)]
    ends = training_windows(sequences, tiny_data.split, model.config.max_history, "last")[1]
    for text, end in zip(decoded, ends, strict=False):
        query = request(sequences, end - 1, 1)[1]
        assert query in text and ("searches" in text) == bool(query)
    history = [tiny_data.sequences.items[:3]] * 2
    u = model.encode_users(history, ["red rocket", ""])
    assert (u[0] - u[1]).abs().max() > 1e-3


def test_hard_negatives_are_extra_keys_with_their_log_q_and_raise_the_loss(tiny_config, tiny_data, tmp_path):
    plain = tiny_data.sequences
    events = len(plain.items)
    shown = dataclasses.replace(plain, negatives_indptr=np.arange(events + 1, dtype=np.int64) * 2,
                                negatives=np.random.default_rng(0).integers(0, 40, 2 * events).astype(np.int32))
    model = build(tiny_config, tiny_data, tmp_path).eval()
    without, with_them = batch_of(model, tiny_data, 3), batch_of(model, tiny_data, 3, shown)
    pairs = len(without.keys)
    assert len(with_them.keys) == 3 * pairs and torch.equal(with_them.keys[:pairs], without.keys)
    log_q = torch.from_numpy(log_sampling_probability(plain, tiny_data.split, 40))
    assert torch.equal(with_them.log_q, log_q[with_them.keys])
    assert model(with_them).parts.act > model(without).parts.act
    # what its user takes elsewhere in the window is a target of his like any other, and no negative of his
    starts, ends = training_windows(plain, tiny_data.split, model.config.max_history, model.config.positions)
    window = np.repeat(np.arange(3), ends[:3] - starts[:3] - 1)
    taken = set(zip(window.tolist(), with_them.keys[:pairs].tolist(), strict=True))
    wanted = [user if (place, item) in taken else -1 for user, place, item in
              zip(np.repeat(with_them.key_users[:pairs], 2).tolist(), np.repeat(window, 2).tolist(),
                  with_them.keys[pairs:].tolist(), strict=True)]
    assert with_them.key_users[pairs:].tolist() == wanted and len(set(wanted)) > 1 and -1 in wanted
    limited = KarmaCollator(model.config, model.prompts, shown, None, max_hard_negatives=1)
    starts, ends = training_windows(plain, tiny_data.split, model.config.max_history, "all")
    assert len(limited([(int(starts[0]), int(ends[0]))]).keys) == 2 * (ends[0] - starts[0] - 1)


def test_decode_share_and_positions_choose_by_window_alone(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config, tiny_data, tmp_path, decode_share=0.4, decode_positions=3)
    starts, ends = training_windows(tiny_data.sequences, tiny_data.split, model.config.max_history, "all")
    windows = list(zip(starts.tolist(), ends.tolist(), strict=True))
    collate = model.collator(tiny_data.sequences)
    whole, twice = collate(windows), collate(windows)
    assert torch.equal(whole.decode_pairs, twice.decode_pairs) and whole.num_texts == 0.4 * len(windows)
    pairs = np.minimum(ends - starts - 1, 3)
    assert pairs.min() < 3 and whole.num_decoded == pytest.approx(0.4 * pairs.sum())
    single = [collate([w]) for w in windows]
    assert sum(len(b.decode_pairs) for b in single) == len(whole.decode_pairs)
    chosen = sum(len(b.decode_pairs) > 0 for b in single) / len(windows)
    assert 0.15 < chosen < 0.65
    assert max(len(b.decode_pairs) for b in single) == 3
    for b in single:
        assert not len(b.decode_pairs) or b.decode_pairs[-1] == len(b.prompts[0].pairs) - 1


def test_prompts_cut_texts_and_leave_empty_ones_out(tiny_backbone):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    prompts = Prompts(KarmaConfig(max_text_tokens=5), tokenizer, ["a very long text about rockets", "", "x"])
    assert [len(t) for t in prompts.texts] == [5, 0, len(prompts.texts[2])]
    assert prompts.texts[0][-1] == prompts.texts[2][-1] == tokenizer.eos_token_id
    chunk = prompts.build([np.array([0]), np.array([], dtype=int)], ["", ""], np.array([1, 2]))
    head = len(prompts.instruction)
    assert chunk.emb.tolist() == [head + 1, 2 * head + 2]
    assert chunk.texts.rows.unique().tolist() == [1] and chunk.texts.labels.tolist() == prompts.texts[2]
    assert chunk.texts.index.tolist() == list(range(2 * head + 2, 2 * head + 2 + len(prompts.texts[2])))
    assert chunk.tokens.token_ids[chunk.texts.index[:-1] + 1].tolist() == prompts.texts[2][:-1]
    assert chunk.texts.weights.sum() == 1


class Letters:
    """A tokenizer with a token for each letter, which remembers how many texts it was given at once."""

    eos_token_id = 0

    def __init__(self):
        self.given = []

    def __call__(self, texts, **options):
        if isinstance(texts, str):
            return {"input_ids": [ord(letter) for letter in texts]}
        self.given.append(len(texts))
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_texts_are_tokenised_in_blocks_and_when_they_are_asked_for(monkeypatch):
    monkeypatch.setattr("karma_fast.data.tokens.BLOCK", 10)
    texts = ["x" * (n % 4) + "y" * (n % 3) for n in range(40)]
    tokenizer, history = Letters(), [np.array([3, 4])]
    prompts = Prompts(KarmaConfig(max_text_tokens=4, num_soft_tokens=2), tokenizer, texts)
    prompts.build(history, ["tea"])
    assert tokenizer.given == []
    sent = pickle.loads(pickle.dumps(prompts))
    expected = [[*map(ord, text[:3]), 0] if text else [] for text in texts]
    for found in (prompts, sent, pickle.loads(pickle.dumps(prompts))):
        assert list(found.texts) == expected and found.texts[-1] == expected[-1] and len(found.texts) == 40
        assert found.texts.ids.dtype == np.int32 and len(found.texts.ids) == sum(map(len, expected))
        assert found.tokenizer.given == [10, 10, 10, 6]  # of 36 that are not empty
    chunk = prompts.build([*history, *history], ["", ""], np.array([-1, 7]))
    assert chunk.texts.labels.tolist() == expected[7] and chunk.texts.labels.dtype == torch.int64
    assert prompts.decode_chunk(np.arange(3), np.array([7, 0, 5])).texts.labels.tolist() == expected[7] + expected[5]
    assert len(Prompts(KarmaConfig(), tokenizer, []).texts) == 0


def test_workers_are_given_the_tokens_of_texts_that_are_trained_on(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config, tiny_data, tmp_path, decode_weight=0.0)
    model.collator(tiny_data.sequences)
    assert "texts" not in vars(model.prompts)
    model.config = dataclasses.replace(model.config, decode_weight=0.1)
    assert "texts" in vars(model.collator(tiny_data.sequences).prompts)


def tokens_of(chunks):
    """Prompt after prompt: what stands at each place, whatever chunk it is in."""
    for chunk in chunks:
        tokens = chunk.tokens
        items = [int(chunk.history_items[s]) if s >= 0 else None for s in tokens.slots]
        flat = list(zip(tokens.token_ids.tolist(), tokens.slots.clamp(max=0).tolist(), items, strict=True))
        for start, end in zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True):
            yield flat[start:end]


@pytest.mark.parametrize("positions", ["all", "last"])
def test_chunks_hold_the_same_prompts_pairs_and_texts(tiny_config, tiny_data, tmp_path, positions):
    model = build(tiny_config, tiny_data, tmp_path, positions=positions, decode_share=0.7, decode_positions=2)
    starts, ends = training_windows(tiny_data.sequences, tiny_data.split, model.config.max_history, positions)
    windows = list(zip(starts[:7].tolist(), ends[:7].tolist(), strict=True))
    whole = model.collator(tiny_data.sequences)(windows)
    for chunk_size in (1, 2, 3, 5, 7, 100):
        parts = model.collator(tiny_data.sequences, chunk_size=chunk_size)(windows)
        sizes = [len(c.emb) for c in parts.prompts]
        assert len(sizes) == -(-7 // chunk_size) and max(sizes) <= chunk_size and max(sizes) - min(sizes) <= 1
        assert list(tokens_of(whole.prompts)) == list(tokens_of(parts.prompts))
        assert torch.equal(whole.keys, parts.keys) and torch.equal(whole.decode_pairs, parts.decode_pairs)
        assert torch.equal(parts.key_items[parts.key_index], parts.keys)
        assert sum(len(c.pairs) for c in parts.prompts) == len(whole.prompts[0].pairs)
        assert [x for c in parts.decode for x in c.pairs.tolist()] == whole.decode_pairs.tolist()
        assert parts.num_tokens == whole.num_tokens
        for chunk in parts.prompts:
            if len(parts.prompts) == 1 or not len(chunk.texts):
                assert chunk.bare is None
                continue
            assert len(chunk.bare.pairs) == len(chunk.pairs) and not len(chunk.bare.texts)
            for with_text, without in zip(tokens_of([chunk]), tokens_of([chunk.bare]), strict=True):
                assert with_text[:len(without)] == without and without[-1][1] == EMB


def test_padding_and_unpadding_undo_each_other():
    packed = Packed.of(np.array([3, 0, 5, 1]), np.arange(9), np.full(9, TEXT))
    x = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    block = packed.padded(x)
    assert block.shape == (4, 5, 2) and torch.equal(packed.unpadded(block), x)
    assert torch.equal(block[2], x[3:8]) and not block[0, 3:].any() and not block[1].any()
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0] and packed.offsets.tolist() == [0, 3, 3, 8, 9]
    assert torch.autograd.gradcheck(packed.padded, (x,))
    assert torch.autograd.gradcheck(packed.unpadded, (block.detach().requires_grad_(),))
    empty = Packed.of(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert empty.longest == 0 and len(empty) == 0


def assert_reaches_another_process(batch):
    """As it is, and without a file that stays open until it is there."""
    before = len(os.listdir("/proc/self/fd"))
    sent = ForkingPickler.dumps(batch)
    assert len(os.listdir("/proc/self/fd")) == before
    assert_same(ForkingPickler.loads(sent), batch)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, OfTensors):
        for field in dataclasses.fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)  # and the same dtype
    else:
        assert found == expected


@pytest.mark.parametrize("changes", [{"decode_share": 0.5}, {"decode_weight": 0.0}])  # without texts: empty tensors
def test_batches_reach_another_process(tiny_config, tiny_data, tmp_path, changes):
    model = build(tiny_config, tiny_data, tmp_path, **changes)
    windows = list(zip(*(x[:9].tolist() for x in training_windows(
        tiny_data.sequences, tiny_data.split, model.config.max_history, "all")), strict=True))
    log_q = log_sampling_probability(tiny_data.sequences, tiny_data.split, 40)
    batch = model.collator(tiny_data.sequences, log_q, chunk_size=2)(windows)
    assert any(not len(chunk.texts) for chunk in batch.prompts)
    assert_reaches_another_process(batch)
    assert_reaches_another_process(model.collator(tiny_data.sequences)(windows))  # no log_q, one chunk


WORKER = """
import resource
from dataclasses import dataclass
import torch
from torch.utils.data import DataLoader
from karma_fast.data.packing import OfTensors, TextTargets

@dataclass
class Batch(OfTensors):
    texts: list

def collate(rows):
    return Batch([TextTargets(*(torch.full((2,), row + n) for n in range(4))) for row in range(500)])

resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
for batch in DataLoader(range(3), num_workers=1, collate_fn=collate, timeout=20):
    print(len(batch.texts), sum(int(x.labels.sum()) for x in batch.texts))
"""


def test_a_worker_needs_fewer_open_files_than_a_batch_has_tensors():
    done = subprocess.run([sys.executable, "-c", WORKER], text=True, capture_output=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])})
    assert done.stdout.splitlines() == [f"500 {2 * sum(range(1, 501))}"] * 3, done.stderr[-2000:]
