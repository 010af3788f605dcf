"""The benchmark of a training step: both sides compute the same, and what is reported was measured."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import wake

from benchmarks.step import __main__ as main
from benchmarks.step import tables as step_tables
from benchmarks.step.build import Inputs, load_trained, make_inputs, make_side, pairs_of, trained_state, trainer_of
from benchmarks.step.cases import CPU_SIDES, GPU_SIDES, Case, cpu_cases, gpu_cases, ours, usual
from benchmarks.step.training import held_bytes, least_flops, loss_of, run_steps, step_memory, timed_steps
from benchmarks.step.usual import Collator
from karma_fast.data import training_windows
from karma_fast.data.batches import log_sampling_probability
from karma_fast.model.karma import KarmaModel

TINY = Case("tiny", 6, "all", 1.0)
BOTH = {"last": {"positions": "last"}, "all": {"positions": "all"},
        "some texts": {"decode_share": 0.5, "decode_positions": 3}, "no gen": {"gen_weight": 0.0},
        "no rec": {"rec_weight": 0.0}, "act alone": {"decode_weight": 0.0}, "no logQ": {"log_q": False}}


def both(config, data, folder, checkpointing=False, **changes):
    """Our model and the usual one with the same weights."""
    def make(config) -> KarmaModel:
        model = KarmaModel.build(config, data.items, data.sequences, data.split, cache=folder, device="cpu")
        wake(model)
        return model

    inputs = Inputs(TINY, data, dataclasses.replace(config.model, **changes), [], make)
    return [make_side(inputs, side)[0] for side in (ours(checkpointing=checkpointing), usual(checkpointing))]


def windows_of(model, data, count: int) -> list[tuple[int, int]]:
    starts, ends = training_windows(data.sequences, data.split, model.config.max_history, model.config.positions)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))[:count]


def assert_same_step(model: KarmaModel, other, data, count: int = 6) -> set[str]:
    """Loss, every term and every gradient; returns the terms."""
    windows = windows_of(model, data, count)
    collate = model.collator(data.sequences, log_sampling_probability(data.sequences, data.split, len(data.items)))
    expected = model(collate(windows))
    found = other(**Collator(collate)(windows))
    loss, terms = found.pop("loss"), expected.parts.present()
    assert set(found) == set(terms)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    for name, value in found.items():
        torch.testing.assert_close(value, terms[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    expected.loss.backward()
    loss.backward()
    theirs = {name.removeprefix("loss.contrastive."): p.grad for name, p in model.named_parameters()
              if p.grad is not None}
    own = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert set(own) == set(theirs) and any("lora_A" in name for name in own)
    for name, grad in own.items():
        tolerance = 2e-5 * float(theirs[name].abs().max())
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    return set(terms)


@pytest.fixture
def in_float32(monkeypatch):
    """As on a CPU without bfloat16 units: no autocast on either side."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})


@pytest.mark.parametrize("name", BOTH)
def test_both_sides_take_the_same_step(tiny_config, tiny_data, tmp_path, in_float32, name):
    changes = {"decode_weight": 1.0} | BOTH[name]
    terms = assert_same_step(*both(tiny_config, tiny_data, tmp_path, **changes), tiny_data, 12)
    off = {"no gen": {"gen"}, "no rec": {"rec"}, "act alone": {"gen", "rec"}}
    assert terms == {"act", "gen", "rec"} - off.get(name, set())


def test_the_same_step_with_checkpointing(tiny_config, tiny_data, tmp_path, in_float32):
    model, other = both(tiny_config, tiny_data, tmp_path, checkpointing=True, decode_weight=1.0)
    assert other.backbone.get_base_model().is_gradient_checkpointing
    assert_same_step(model, other, tiny_data)


def test_the_same_step_with_images_hard_negatives_and_queries(tiny_config, tiny_data, tmp_path, in_float32):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 6)).astype(np.float32)
    vectors[3] = np.nan
    events, plain = len(tiny_data.sequences.items), tiny_data.sequences
    sequences = dataclasses.replace(
        plain, negatives_indptr=np.arange(events + 1, dtype=np.int64) * 2,
        negatives=rng.integers(0, 40, 2 * events).astype(np.int32), query_texts=["red rocket", "a knife"],
        queries=np.arange(events, dtype=np.int32) % 3 - 1)
    data = dataclasses.replace(tiny_data, items=dataclasses.replace(tiny_data.items, image_vectors=vectors),
                               sequences=sequences)
    model, other = both(tiny_config, data, tmp_path, decode_weight=1.0, positions="last")
    assert assert_same_step(model, other, data, 24) == {"act", "gen", "rec", "vis"}


def test_weights_that_do_not_fit_are_refused(tiny_config, tiny_data, tmp_path, in_float32):
    model, other = both(tiny_config, tiny_data, tmp_path)
    state = trained_state(model)
    del state["emb_token"]
    with pytest.raises(ValueError, match=r"missing \['emb_token'\]"):
        load_trained(other, state)
    with pytest.raises(ValueError, match="symmetric"):
        both(tiny_config, tiny_data, tmp_path, symmetric=True)


# ---- cases, and what a step is measured by -----------------------------------------------------------------------

def test_case_names():
    for cases in (cpu_cases(), gpu_cases()):
        assert len({case.name for case in cases}) == len(cases)
        assert [Case.parse(case.name) for case in cases] == cases
    for sides in (CPU_SIDES, GPU_SIDES):
        assert len({side.name for side in sides}) == len(sides) and sides[0].usual
    for bad in ("demo-32-all", "demo-0-all-1", "other-32-all-1", "demo-32-first-1", "demo-32-all-0", "demo-32-all-1.5",
                "demo-32-all-1-8gb", "demo-32-all-1.2.3"):
        with pytest.raises(ValueError, match="demo-32-all-0.25 is the form"):
            Case.parse(bad)
    demo = cpu_cases()[0].config
    assert demo.backbone == "smollm2-135m-instruct" and demo.decode_share == 0.25 and demo.quantization == "4bit"
    for case in gpu_cases():
        assert case.windows * (case.config.max_history if case.positions == "all" else 1) >= 4096


def test_batches_to_try():
    assert main.batches_to_try(205, False) == [205]
    assert main.batches_to_try(205, True)[:5] == [205, 192, 128, 96, 64] and main.batches_to_try(205, True)[-1] == 1
    assert main.batches_to_try(4096, True)[1:3] == [3072, 2048] and main.batches_to_try(1, True) == [1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("random-models")


@pytest.mark.parametrize("case", [TINY, Case("tiny-4bit", 6, "last", 0.5)], ids=lambda case: case.name)
def test_random_models_are_what_they_are_said_to_be(case, folder):
    if case.config.quantization == "4bit":
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit models need bitsandbytes")
    inputs = make_inputs(case, "cpu", folder)
    assert len(inputs.windows) == 6 == len(set(inputs.windows))
    assert pairs_of(inputs.config, inputs.windows) == (30 if case.positions == "all" else 6)
    assert all(end - start == 6 for start, end in inputs.windows)
    for side in (usual(), ours()):
        model, collate = make_side(inputs, side)
        linear = [m for n, m in model.backbone.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n]
        packed = [type(m) for m in linear if case.config.quantization == "4bit"
                  and isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert len(linear) == 15 and len(packed) == (14 if case.config.quantization == "4bit" else 0)
        texts = model.prompts.texts if hasattr(model, "prompts") and not side.usual else collate.prompts.texts
        assert all(7 <= len(text) <= 17 and 0 not in text[:-1] for text in texts)
        found = loss_of(model, collate(inputs.windows)).terms
        assert set(found) == {"act", "gen", "rec"} and all(0.5 < value < 12 for value in found.values())


def test_work_is_that_of_the_tokens(folder):
    inputs = make_inputs(TINY, "cpu", folder)
    model, collate = make_side(inputs, usual())
    found = least_flops(model, collate(inputs.windows))
    texts = sum(len(inputs.start.collate.prompts.texts[inputs.data.sequences.items[end - 1]])
                for _, end in inputs.windows)
    tokens = 6 * (7 + 5 + 1) + texts + 6 * 4 + texts
    layer = 4 * 64 * 64 + 3 * 64 * 128
    assert found == {"tokens": tokens, "flops": 2 * 2 * (2 * layer * tokens + 64 * 512 * 2 * texts)}


def test_steps_are_timed_and_their_memory_counted(folder, tmp_path):
    inputs = make_inputs(TINY, "cpu", folder)
    model, collate = make_side(inputs, usual())
    trainer = trainer_of(inputs, usual(), model, collate, inputs.windows, str(tmp_path))
    first = run_steps(trainer, 1)
    terms = inputs.expected.terms
    assert first == pytest.approx(terms["act"] + 0.1 * (terms["gen"] + terms["rec"]), rel=1e-3)
    clock = timed_steps(trainer, 3, "cpu")
    assert len(clock.milliseconds) == 3 and min(clock.milliseconds) > 1
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert 0 <= held_bytes(trainer) - weights - 2 * trained < 100_000  # features and counters of steps
    logits = 6 * 40 * 512 * 4  # of prompts alone, in float32, if all had 40 tokens
    assert logits < step_memory(trainer) < 40 * logits


# ---- the runner --------------------------------------------------------------------------------------------------

def run_tiny(path: Path, *more: str, cases: tuple[str, ...] = (TINY.name,)) -> dict:
    assert main.main(["--out", str(path), "--device", "cpu", "--quick", "--cases", *cases, *more]) == 0
    return json.loads(path.read_text())


def test_runner_measures_both_sides(tmp_path, capsys):
    results = run_tiny(tmp_path / "out" / "step-cpu.json", cases=(TINY.name, "tiny-12-last-0.5"))
    assert results["benchmark"] == "step" and "peft" in results["machine"]["libraries"]
    assert set(results["peak_flops"]) == {"float32", "bfloat16"} and str(tmp_path) not in json.dumps(results)
    records = {(r["case"], r["implementation"]): r for r in results["records"]}
    assert len(records) == 8
    chunked = records.pop((TINY.name, "karma, 8 windows at once"))
    assert chunked["status"] == "absent" and chunked["reason"] == "there are no more windows than that"
    for (case, name), r in records.items():
        assert r["status"] == "ok" and r["repeats"] == 2 and r["first_loss"] > 0, r
        assert (r["batch"], r["pairs"]) == ((6, 30) if case == TINY.name else (12, 12))
        assert r["total_ms"]["median"] > 0 and r["memory_mib"] > r["held_mib"] > 1 and r["collation_ms"] > 0
        assert r["limit_ms"] == pytest.approx(1e3 * r["flops"] / results["peak_flops"][r["dtype"]])
        assert r["peak_fraction"] == pytest.approx(r["limit_ms"] / r["total_ms"]["median"])
        assert set(r["errors"]) == {"act", "gen", "rec", "first loss", "gradient of adapters",
                                    "gradient of projections"}
        assert max(r["errors"].values()) < 0.05 and (name != "usual" or max(r["errors"].values()) == 0)
    assert len({r["flops"] for (case, _), r in records.items() if case == TINY.name}) == 1
    printed = capsys.readouterr().out
    assert f"{TINY.name} karma " in printed and "against usual" in printed
    assert "negatives" in step_tables.device_table(results)
    assert "Not measured: karma, 8 windows at once: there are" in step_tables.case_table(results, TINY.name)


def test_runner_keeps_to_its_budget_and_resumes(tmp_path, monkeypatch):
    path = tmp_path / "step-cpu.json"
    results = run_tiny(path, "--budget", "0")
    assert {(r["status"], r["reason"]) for r in results["records"]} == {("skipped", "time budget")}
    monkeypatch.setattr(main, "sides_for", lambda device: [usual(), ours()])
    done = run_tiny(path, "--resume")
    assert [r["status"] for r in done["records"]] == ["ok", "ok"]
    assert run_tiny(path, "--resume") == done  # nothing left to do


def test_a_wrong_loss_is_found(tmp_path, monkeypatch):
    plain = KarmaModel.item_embeddings
    monkeypatch.setattr(KarmaModel, "item_embeddings", lambda self, items: -plain(self, items))
    monkeypatch.setattr(main, "sides_for", lambda device: [usual(), ours()])
    other, mine = run_tiny(tmp_path / "step-cpu.json")["records"]
    assert other["status"] == "ok" and mine["status"] == "wrong"
    assert mine["errors"]["gradient of projections"] > 0.5


def test_the_largest_batch_that_fits_is_found(tmp_path, monkeypatch, capsys):
    plain = main.run_steps

    def out_of_memory_beyond_four(trainer, count):  # pretends to be a small GPU, on the usual side only
        if len(trainer.train_dataset) > 4 and "Karma" not in type(trainer).__name__:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(trainer, count)

    monkeypatch.setattr(main, "run_steps", out_of_memory_beyond_four)
    monkeypatch.setattr(main, "sides_for", lambda device: [usual(), usual(shrink=True), ours()])
    results = run_tiny(tmp_path / "step-cpu.json")
    whole, largest, mine = results["records"][:3]
    assert (whole["status"], whole["reason"]) == ("error", "out of memory")
    assert largest["status"] == mine["status"] == "ok"
    assert (largest["batch"], largest["pairs"], mine["pairs"]) == (4, 20, 30)
    assert mine["errors"]["first loss"] == 0  # of another batch than theirs, so there is nothing to compare with
    table = step_tables.case_table(results, TINY.name)
    assert "| usual, largest batch | 4 | 15 |" in table and "| karma | 6 | 25 |" in table
    assert "Not measured: usual: out of memory." in table
    assert "error: tiny-6-all-1 usual out of memory" in capsys.readouterr().out


def record(name, milliseconds, batch=32, pairs=640, mib=1000.0, status="ok", **more):
    return dataclasses.asdict(Case("demo", 32, "all", 0.25)) | {
        "case": "demo-32-all-0.25", "implementation": name, "status": status, "batch": batch, "pairs": pairs,
        "memory_mib": mib, "held_mib": 100.0, "collation_ms": 1.5, "limit_ms": 10.0, "peak_fraction": 0.25,
        "windows_per_second": 1e3 * batch / milliseconds, "errors": {"act": 1e-3, "gradient of adapters": 2e-2},
        "total_ms": {"median": milliseconds, "p20": milliseconds, "p80": milliseconds}} | more


RESULTS = {
    "benchmark": "step", "date": "2026-01-02T03:04:05+00:00", "command": "python -m benchmarks.step",
    "machine": {"device": "cpu", "name": "Test CPU 9", "torch": "2.11.0", "triton": None, "python": "3.12.1",
                "libraries": {"peft": "0.19.1"}},
    "peak_flops": {"float32": 1e8, "bfloat16": 2e8}, "copy_bytes_per_second": None,
    "records": [record("usual", 60.0), record("usual, eager attention", 50.0, mib=1500.0), record("karma", 25.0),
                record("karma, 8 windows at once", 40.0, mib=500.0), record("karma, bad", 1.0, status="wrong"),
                record("usual, largest batch", 1.0, 16, 320)]}


def test_tables_compare_with_the_faster_usual_side():
    table = step_tables.device_table(RESULTS)
    assert "| MovieLens-100K, SmolLM2-135M, 32 windows, positions all, texts of 25% of them (karma) | 25 | " \
           "50 (usual, eager attention) | 2.00x faster | 1000 | 1500 | 0.67 | 620 | 620 | 25% |" in table
    whole = step_tables.case_table(RESULTS, "demo-32-all-0.25")
    assert "| karma, 8 windows at once | 32 | 620 | 40 | 40 to 40 | 10 | 800 | 1.25x faster | 500 | 0.33 |" in whole
    assert "wrong result |" in whole and "| 1.0e-03, 2.0e-02 |" in whole
    assert "Test CPU 9" in step_tables.short_table(RESULTS)
