"""The benchmark of soft prompts: every implementation is right, and what is reported was measured."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import check, check_soft_prompt, measure, tables
from benchmarks.soft_prompt import __main__ as main
from benchmarks.soft_prompt import implementations as ways
from benchmarks.soft_prompt import tables as prompt_tables
from benchmarks.soft_prompt.cases import VOCABULARY, Case, cpu_cases, gpu_cases, make_inputs
from benchmarks.soft_prompt.exact import errors, exact, too_far
from benchmarks.soft_prompt.implementations import IMPLEMENTATIONS, Implementation, absent, eager
from benchmarks.soft_prompt.measuring import memory, step
from benchmarks.step import tables as step_tables
from benchmarks.step.cases import Case as StepCase
from karma_kernels import embed_prompt

TINY = [Case(48, 12, 16, 24, "float32"), Case(48, 12, 16, 24), Case(5, 12, 16, 24, "float32", 3),
        Case(5, 12, 16, 24, "bfloat16", 4)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Compiling takes long and is torch's own business; nothing here is large enough to be collected."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)
    ways.compiled_prompt.cache_clear()
    yield
    ways.compiled_prompt.cache_clear()


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_implementation_agrees_with_float64(case):
    inputs = make_inputs(case, "cpu")
    truth, ran = exact(inputs), []
    for i in IMPLEMENTATIONS:
        if absent(i, "cpu") is None:
            prompt, gradients, _ = step(i.prompt, inputs)
            assert prompt.shape == (*case.shape, case.hidden) and prompt.dtype == inputs.dtype
            found = errors(prompt, gradients, inputs, truth)
            assert set(found) == {"prompt", "norm_weight", "w1", "b1", "w2",
                                  "vectors" if case.num_tokens > 1 else "learned"}
            assert not too_far(found, inputs.dtype), (i.name, found)
            if case.dtype == "float32":
                assert max(found.values()) < 1e-5, (i.name, found)
            ran.append(i.name)
    assert ran == ["karma auto", "karma chunked", "eager", "torch.compile", "row by row"]
    assert "CUDA" in absent(IMPLEMENTATIONS[2], "cpu")


@pytest.mark.parametrize("case", TINY[::2], ids=lambda case: case.name)
def test_exact_is_the_definition_in_float64(case, monkeypatch):
    inputs = make_inputs(case, "cpu")
    tensors = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.tensors.items()}
    prompt = embed_prompt(inputs.token_ids, inputs.slots, **tensors, embedding_weight=inputs.embedding_weight.double(),
                          num_tokens=case.num_tokens, token_norm=2.0, backend="reference")
    prompt.backward(inputs.upstream.double())
    monkeypatch.setattr("benchmarks.soft_prompt.exact.PIECE_BYTES", 64 * 24 * 7)  # few vectors at a time
    truth, part = exact(inputs), exact(inputs, sample=9)
    torch.testing.assert_close(truth.prompt, prompt.detach().flatten(0, 1))
    assert len(part.positions) == 9
    torch.testing.assert_close(part.prompt, truth.prompt[part.positions])
    for name, x in tensors.items():
        if x.requires_grad:
            torch.testing.assert_close(truth.gradients[name], x.grad)
    assert set(truth.gradients) == {name for name, x in tensors.items() if x.requires_grad}


def test_histories_are_a_third_text_and_repeat_items():
    case = Case(512, 8, 8, 16, "float32")
    one, two, other = make_inputs(case, "cpu"), make_inputs(case, "cpu"), make_inputs(case, "cpu", seed=1)
    assert torch.equal(one.slots, two.slots) and not torch.equal(one.slots, other.slots)
    assert one.slots.numel() == 2 * 512 and not one.tensors["vectors"].requires_grad
    soft = one.slots[one.slots >= 0]
    counts = soft.bincount(minlength=512)
    assert len(counts) == 512 and counts.min() == 1 and counts.max() > 5
    assert 0.3 < (one.slots == -1).float().mean() < 0.34 and (one.slots == -2).sum() == len(one.slots)
    assert one.token_ids.max() < VOCABULARY and len(one.rows) == 32
    rows = [torch.cat([head.new_full((len(head),), -1), items, head.new_tensor([-2]), tail.new_full((len(tail),), -1)])
            for head, items, tail in one.rows]
    assert torch.equal(torch.stack(rows), one.slots)
    decoder = make_inputs(Case(6, 8, 8, 16, num_tokens=4), "cpu")
    assert decoder.slots[2].tolist() == [8, 9, 10, 11] + [-1] * 12 and decoder.tensors["vectors"].requires_grad


def test_case_names_and_limits():
    for cases in (gpu_cases(), cpu_cases()):
        assert [Case.parse(case.name) for case in cases] == cases and len(set(cases)) == len(cases)
    for bad in ("8x8x8-fp32", "40x8x8x8-fp32", "16x8x8x8-fp8", "0x8x8x8-fp32-2tokens", "16x8x8x8-fp32-0tokens"):
        with pytest.raises(ValueError, match="2048x256x256x2048-bf16 is the form"):
            Case.parse(bad)
    history, decoder = Case(32, 3, 5, 7), Case(10, 3, 5, 7, "float32", 2)
    assert history.useful_flops == 2 * 32 * (2 * 15 + 3 * 35) and decoder.useful_flops == 2 * 10 * 3 * (15 + 70)
    assert history.least_bytes == 2 * 7 * (2 * 64 + 20) + 4 * (32 * 3 * 2 + 3 * (3 + 5 * 3 + 5 + 35))
    assert decoder.least_bytes == 4 * 7 * (2 * 140 + 120) + 4 * (10 * 3 * 3 + 3 * (3 + 5 * 3 + 5 + 70))
    assert {(c.vectors, c.hidden) for c in gpu_cases() if c.mid == 256 and c.num_tokens == 1} == {
        (size, hidden) for size in (512, 2048, 8192, 16384) for hidden in (2048, 4096)}


def test_memory_counts_what_is_held_and_kept():
    inputs = make_inputs(Case(16, 8, 8, 16, "float32"), "cpu")

    def prompt(inputs):
        total = sum(x.sum() for x in inputs.leaves)
        kept = total.expand(1 << 20).tanh()  # 4 MiB that the backward needs, beside two gradients of that size
        return kept[0].expand(inputs.upstream.shape).contiguous()

    most, kept = memory(prompt, inputs)
    assert 4 << 20 <= kept < (4 << 20) + 10_000
    assert 12 << 20 <= most < (13 << 20)
    ours, plain = (memory(next(i for i in IMPLEMENTATIONS if i.name == name).prompt,
                          make_inputs(Case(480, 8, 8, 64, "float32"), "cpu"))[1]
                   for name in ("karma chunked", "eager"))
    assert ours < 480 * 8 * 4 + 1000 and plain > 480 * 64 * 4  # (R, mid) numbers, against tokens


# ---- the runner and its tables -----------------------------------------------------------------------------------

def failing(inputs):
    raise RuntimeError("no such kernel\nsecond line")


FEW = (Implementation("karma auto", IMPLEMENTATIONS[0].prompt), Implementation("eager", eager),
       Implementation("wrong", lambda inputs: 1.1 * eager(inputs)),
       Implementation("nan", lambda inputs: float("nan") * eager(inputs)), Implementation("failing", failing),
       IMPLEMENTATIONS[2])


def run_tiny(path: Path, monkeypatch, *more: str) -> dict:
    monkeypatch.setattr(main, "IMPLEMENTATIONS", FEW)
    assert main.main(["--out", str(path), "--device", "cpu", "--quick", "--cases", TINY[0].name, *more]) == 0
    return json.loads(path.read_text())


def test_runner_writes_everything_and_survives_failures(tmp_path, monkeypatch, capsys):
    results = run_tiny(tmp_path / "out" / "cpu.json", monkeypatch)
    assert results["benchmark"] == "soft_prompt" and str(tmp_path) not in json.dumps(results)
    assert results["command"].startswith("python -m benchmarks.soft_prompt --device cpu --cases 48x12x16x24-fp32")
    records = {r["implementation"]: r for r in results["records"]}
    assert {name: r["status"] for name, r in records.items()} == {
        "karma auto": "ok", "eager": "ok", "wrong": "wrong", "nan": "wrong", "failing": "error",
        "karma fused": "absent"}
    assert records["failing"]["reason"] == "RuntimeError: no such kernel"
    assert records["wrong"]["errors"]["prompt"] == pytest.approx(0.1, rel=1e-3)
    assert set(records["nan"]["errors"].values()) == {None}
    for name in ("karma auto", "eager"):
        r = records[name]
        assert (r["vectors"], r["width"], r["mid"], r["hidden"], r["positions"]) == (48, 12, 16, 24, 96)
        assert r["repeats"] >= 5 and r["memory_mib"] > r["kept_mib"] > 0
        for part in ("forward_ms", "backward_ms", "total_ms"):
            assert 0 < r[part]["p20"] <= r[part]["median"] <= r[part]["p80"]
        seconds = 1e-3 * r["total_ms"]["median"]
        operations = TINY[0].useful_flops / results["peak_flops"]["float32"]
        moved = TINY[0].least_bytes / results["copy_bytes_per_second"]
        assert r["flops_ms"] == pytest.approx(1e3 * operations) and r["bytes_ms"] == pytest.approx(1e3 * moved)
        assert r["limit_fraction"] == pytest.approx(max(operations, moved) / seconds)
        assert r["peak_fraction"] == pytest.approx(operations / seconds)
    printed = capsys.readouterr().out
    assert "wrong: 48x12x16x24-fp32 wrong" in printed and "error: 48x12x16x24-fp32 failing" in printed
    table = prompt_tables.case_table(results, TINY[0].name)
    assert "| NaN, NaN |" in table and "Not measured: karma fused: RuntimeError: backend 'fused' needs" in table
    assert table.endswith("; failing: RuntimeError: no such kernel.")


def test_runner_keeps_to_its_budget_and_resumes(tmp_path, monkeypatch):
    path = tmp_path / "cpu.json"
    results = run_tiny(path, monkeypatch, "--budget", "0")
    assert {(r["status"], r["reason"]) for r in results["records"]} == {("skipped", "time budget")}
    done = run_tiny(path, monkeypatch, "--resume")
    assert len(done["records"]) == len(FEW) and "skipped" not in {r["status"] for r in done["records"]}
    assert run_tiny(path, monkeypatch, "--resume") == done  # nothing left to do


def record(name, milliseconds, case=None, status="ok", **more):
    case = case or Case(2048, 256, 256, 2048)
    ms = {"median": milliseconds, "p20": 0.9 * milliseconds, "p80": 1.2 * milliseconds}
    return dataclasses.asdict(case) | {
        "case": case.name, "implementation": name, "status": status, "memory_mib": 10.0, "kept_mib": 2.0,
        "errors": {"prompt": 1e-3, "w1": 2e-3, "w2": 3e-3}, "forward_ms": ms, "backward_ms": ms, "total_ms": ms,
        "flops_ms": 0.25, "bytes_ms": 0.5, "limit_ms": 0.5, "limit_fraction": 0.5 / milliseconds} | more


RESULTS = {
    "benchmark": "soft_prompt", "date": "2026-01-02T03:04:05+00:00", "command": "python -m benchmarks.soft_prompt",
    "machine": {"device": "cuda", "name": "Test GPU 9", "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.1"},
    "peak_flops": {"bfloat16": 7e14}, "copy_bytes_per_second": 3e12,
    "records": [record("karma auto", 1.0), record("karma fused", 0.5), record("eager", 3.0, kept_mib=50.0),
                record("torch.compile", 1.5, kept_mib=40.0), record("row by row", 0.1, status="wrong"),
                record("karma auto", 4.0, Case(512, 256, 256, 2048, num_tokens=4)),
                record("eager", 2.0, Case(512, 256, 256, 2048, num_tokens=4))]}


def test_tables():
    text = prompt_tables.device_table(RESULTS)
    assert "| 2048 × 256 × 256 × 2048 bfloat16 | 1 | 1.5 (torch.compile) | 1.50x faster | 0.5 | 50% | 10 | 10 | 2 | " \
        "40 |" in text
    assert "Ours is slower at: 512 × 256 × 256 × 2048 bfloat16, 4 tokens a vector." in text
    text = prompt_tables.case_table(RESULTS, "2048x256x256x2048-bf16")
    assert "| eager | 3 | 3 | 3 | 2.7 to 3.6 | 2.00 | 17% | 10 | 50 | 1.0e-03, 3.0e-03 |" in text
    assert "| wrong result |" in text and "at least, reading and writing 0.5 ms. Ours (auto) against the best " \
        "alternative: 1.50x faster." in text
    assert "2.00x slower (eager)" in prompt_tables.short_table(RESULTS)


def test_each_file_goes_to_the_tables_of_its_kind():
    of_step = {"batch": 32, "pairs": 640, "held_mib": 1.0, "collation_ms": 1.0, "windows_per_second": 1.0,
               "peak_fraction": 0.5, "errors": {"act": 1e-3, "gradient of adapters": 1e-2}}
    steps = RESULTS | {"benchmark": "step", "records": [record("karma", 9.0, StepCase("demo", 32, "all", 0.25))
                                                        | of_step]}
    files = {"soft-prompt-x": RESULTS, "step-x": steps, "odd": RESULTS | {"benchmark": "odd"}}
    assert tables.table_for("soft-prompt-x", files) == prompt_tables.device_table(RESULTS)
    name = RESULTS["records"][0]["case"]
    assert tables.table_for(f"soft-prompt-x:{name}", files) == prompt_tables.case_table(RESULTS, name)
    assert tables.table_for("step-x", files) == step_tables.device_table(steps)
    assert tables.table_for("step-x:demo-32-all-0.25", files) == step_tables.case_table(steps, "demo-32-all-0.25")
    for missing, said in (("odd", "is of 'odd'; there are info_nce"), ("step-x:short", "has no such case")):
        with pytest.raises(ValueError, match=said):
            tables.table_for(missing, files)


# ---- the check ---------------------------------------------------------------------------------------------------

def judged(problem, monkeypatch, function=embed_prompt, backend="chunked"):
    true, limits = check_soft_prompt.expected(problem)
    monkeypatch.setattr("karma_kernels.embed_prompt", function)
    return check.judge(lambda: check_soft_prompt.run(problem, backend), true, limits)


@pytest.mark.parametrize("kind", check_soft_prompt.KINDS)
@pytest.mark.parametrize("dtypes", check_soft_prompt.DTYPES, ids=str)
def test_check_passes_what_is_right(kind, dtypes, monkeypatch):
    for shape in check_soft_prompt.SHAPES[:3]:
        problem = check_soft_prompt.draw(shape, dtypes, kind, 0, "cpu")
        for backend in ("chunked", "auto"):
            worst, failure = judged(problem, monkeypatch, backend=backend)
            assert failure == "" and worst < 1


def coarse(token_ids, slots, vectors, **options):  # factors with 10 bits, as TF32 has them
    return embed_prompt(token_ids, slots, vectors.half().float(), **options)


def no_learned_gradient(*args, learned, **options):
    return embed_prompt(*args, learned=learned.detach(), **options)


def unwritten(*args, **options):
    noise = torch.empty(21)
    return embed_prompt(*args, **options) + 0 * noise.nan_to_num(1.0, 1.0, 1.0) * noise


def other_places(token_ids, slots, vectors, **options):  # the last soft token stands where the first should
    return embed_prompt(token_ids, torch.where(slots == 0, 9, slots), vectors, **options)


@pytest.mark.parametrize("function,expected", [
    (coarse, "is off by"), (no_learned_gradient, "learned is off by"), (unwritten, "prompt is off by inf"),
    (other_places, "is off by")])
def test_check_finds_what_is_wrong(function, expected, monkeypatch):
    problem = check_soft_prompt.draw((5, 7, 9, 21, 2, 2, 40), check_soft_prompt.DTYPES[0], "plain", 0, "cpu")
    assert expected in judged(problem, monkeypatch, function)[1]


def test_check_covers_every_combination():
    cases = list(check_soft_prompt.combinations(len(check_soft_prompt.SHAPES)))
    assert len({(dtypes, kind) for _, dtypes, kind in cases}) == 30
    assert {shape for shape, _, _ in cases[:30]} == set(check_soft_prompt.SHAPES)
    assert {dtypes for _, dtypes, _ in cases[:12]} == set(check_soft_prompt.DTYPES)
