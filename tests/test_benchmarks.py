"""The benchmarks: every implementation is right, and what is reported is what was measured."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import check, check_info_nce, check_ranks, check_soft_prompt, measure, plot, run, session, tables
from benchmarks.cases import Case, cpu_cases, gpu_cases, make_inputs, tiny_cases
from benchmarks.exact import errors, exact, too_far
from benchmarks.implementations import IMPLEMENTATIONS, Implementation, absent, dense, dense_loss
from benchmarks.machine import file_name
from benchmarks.ranking import cases as ranking
from benchmarks.ranking.implementations import IMPLEMENTATIONS as rankers
from benchmarks.soft_prompt import cases as prompts
from benchmarks.soft_prompt.implementations import IMPLEMENTATIONS as prompters
from benchmarks.step import cases as step
from karma_kernels import info_nce
from karma_kernels.ranks import count_ranks

ROOT = Path(__file__).parents[1]
CASE = Case(12, 20, 8, "float32")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Compiling takes half a minute and is torch's own business; nothing here is large enough to be collected."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)


@pytest.mark.parametrize("case", tiny_cases(), ids=lambda case: case.name)
def test_every_implementation_agrees_with_float64(case):
    inputs = make_inputs(case, "cpu")
    truth, ran = exact(inputs), []
    for i in IMPLEMENTATIONS:
        if absent(i, case, "cpu") is None:
            loss, _ = measure.step(i.loss, inputs)
            found = errors(loss, inputs, truth)
            assert not too_far(found, inputs.query.dtype), (i.name, found)
            if case.dtype == "float32":
                assert max(found.values()) < 1e-5, (i.name, found)
            ran.append(i.name)
    assert {"karma auto", "karma chunked", "karma reference", "dense", "dense, torch.compile"} <= set(ran)


@pytest.mark.parametrize("flags", [{}, {"symmetric": True}, {"ids": True, "log_q": True},
                                   {"symmetric": True, "ids": True, "log_q": True}], ids=str)
def test_exact_is_the_dense_loss_in_float64(flags):
    case = Case(30, 44, 8, "float32", **flags)
    inputs = make_inputs(case, "cpu")
    query, key = (x.detach().double().requires_grad_() for x in (inputs.query, inputs.key))
    log_q = None if inputs.log_q is None else inputs.log_q.double()
    loss = dense_loss(query, key, None, inputs.scale, key_ids=inputs.key_ids, log_q=log_q, symmetric=inputs.symmetric)
    loss.backward()
    whole, part = exact(inputs), exact(inputs, sample=7)
    assert whole.loss == pytest.approx(loss.item(), rel=1e-12) and part.loss == whole.loss
    torch.testing.assert_close(whole.query, query.grad)
    torch.testing.assert_close(whole.key, key.grad)
    assert len(part.rows) == len(part.keys) == 7
    torch.testing.assert_close(part.query, query.grad[part.rows])
    torch.testing.assert_close(part.key, key.grad[part.keys])


def test_inputs_are_those_of_the_seed_and_have_repeated_ids():
    case = Case(64, 300, 16, "bfloat16", ids=True, log_q=True)
    one, two, other = make_inputs(case, "cpu"), make_inputs(case, "cpu"), make_inputs(case, "cpu", seed=1)
    assert torch.equal(one.query, two.query) and not torch.equal(one.query, other.query)
    assert one.query.dtype == torch.bfloat16 and one.query.shape == (64, 16) and one.key.shape == (300, 16)
    assert one.key_ids.unique().numel() < 300
    lengths = one.key.detach().float().norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(300), atol=1e-2, rtol=0)


def test_case_names():
    for case in gpu_cases() + cpu_cases():
        assert dataclasses.replace(Case.parse(case.name), workspaces=case.workspaces) == case
    assert len({case.name for case in gpu_cases()}) == len(gpu_cases())
    for bad in ("8x8-fp32", "8x8x8", "8x8x8-fp8", "8x8x8-fp32-idz"):
        with pytest.raises(ValueError, match="48x80x32-fp32 is the form"):
            Case.parse(bad)
    assert Case(2, 3, 5).useful_flops == 180 and Case(2, 3, 5, symmetric=True).useful_flops == 240


def test_absent_says_why():
    by_name = {i.name: i for i in IMPLEMENTATIONS}
    assert absent(by_name["memeff"], CASE, "cpu") == "does not offer: CPU, more keys than queries"
    assert absent(by_name["open_clip"], CASE, "cuda") == "does not offer: more keys than queries, one direction"

    def probe(device):
        raise ImportError("No module named 'rival'")

    assert absent(Implementation("rival", dense, probe=probe), CASE, "cpu") == "ImportError: No module named 'rival'"


def test_peak_memory_counts_what_is_held():
    inputs = make_inputs(Case(64, 64, 8, "float32"), "cpu")

    def loss(inputs):
        extra = torch.empty(1 << 20, dtype=torch.uint8)
        del extra
        extra = torch.empty(3 << 20, dtype=torch.uint8)
        return inputs.query.sum() + inputs.key.sum() + 0 * extra[0]

    assert 3 << 20 <= measure.peak_memory(loss, inputs) < (3 << 20) + 20_000


def test_times_are_medians_and_percentiles():
    times = measure.Times.of([(1.0, 10.0), (2.0, 20.0), (3.0, 30.0), (4.0, 40.0), (100.0, 50.0), (2.0, 20.0)])
    assert times.total == measure.Spread(27.5, 22.0, 44.0) and times.repeats == 6
    assert times.forward.median == 2.5 and times.backward.median == 25.0


def failing(inputs):
    raise RuntimeError("no such kernel\nsecond line")


FEW = (Implementation("karma auto", dense, ours=True, workspace=True), Implementation("dense", dense),
       Implementation("wrong", lambda inputs: 1.1 * dense(inputs)),
       Implementation("nan", lambda inputs: float("nan") * dense(inputs)), Implementation("failing", failing),
       Implementation("elsewhere", dense, frozenset()))


def run_tiny(path: Path, monkeypatch, *more: str) -> dict:
    monkeypatch.setattr(run, "IMPLEMENTATIONS", FEW)
    assert run.main(["--out", str(path), "--device", "cpu", "--quick", "--cases", CASE.name, *more]) == 0
    return json.loads(path.read_text())


def test_runner_writes_everything_and_survives_failures(tmp_path, monkeypatch, capsys):
    results = run_tiny(tmp_path / "out" / "cpu.json", monkeypatch)
    assert {"machine", "date", "command", "peak_flops", "copy_bytes_per_second", "records"} <= set(results)
    assert {"name", "torch", "triton", "python", "libraries"} <= set(results["machine"])
    assert results["peak_flops"]["float32"] > 0 and results["copy_bytes_per_second"] > 0
    assert CASE.name in results["command"] and str(tmp_path) not in results["command"]
    records = {r["implementation"]: r for r in results["records"]}
    assert {name: r["status"] for name, r in records.items()} == {
        "karma auto": "ok", "dense": "ok", "wrong": "wrong", "nan": "wrong", "failing": "error", "elsewhere": "absent"}
    assert records["failing"]["reason"] == "RuntimeError: no such kernel"
    assert records["elsewhere"]["reason"].startswith("does not offer: CPU")
    assert records["wrong"]["errors"]["loss"] == pytest.approx(0.1, rel=1e-3)
    assert set(records["nan"]["errors"].values()) == {None}
    assert "| NaN, NaN, NaN |" in tables.case_table(results, CASE.name)
    for name in ("karma auto", "dense"):
        r = records[name]
        assert r["rows"] == 12 and r["keys"] == 20 and r["width"] == 8 and r["dtype"] == "float32"
        assert r["repeats"] >= 5 and r["memory_mib"] > 0 and set(r["errors"]) == {"loss", "query", "key"}
        for part in ("forward_ms", "backward_ms", "total_ms"):
            assert 0 < r[part]["p20"] <= r[part]["median"] <= r[part]["p80"]
        seconds = 1e-3 * r["total_ms"]["median"]
        assert r["peak_fraction"] == pytest.approx(CASE.useful_flops / seconds / results["peak_flops"]["float32"])
    printed = capsys.readouterr().out
    assert CASE.name in printed and "wrong: 12x20x8-fp32 wrong" in printed and "error: 12x20x8-fp32 failing" in printed


def test_runner_keeps_to_its_budget_and_resumes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu.json"
    results = run_tiny(path, monkeypatch, "--budget", "0")
    assert {(r["status"], r["reason"]) for r in results["records"]} == {("skipped", "time budget")}
    assert f"skipped for time: {CASE.name}" in capsys.readouterr().out
    done = run_tiny(path, monkeypatch, "--resume")
    assert len(done["records"]) == len(FEW) and "skipped" not in {r["status"] for r in done["records"]}
    again = run_tiny(path, monkeypatch, "--resume")  # nothing left to do
    assert again == done


def test_a_resumed_file_is_of_one_machine_and_says_who_measured_what(tmp_path, monkeypatch):
    path, other = tmp_path / "cpu.json", "4x6x8-fp32"
    before = run_tiny(path, monkeypatch)
    after = run_tiny(path, monkeypatch, "--cases", other, "--resume")
    assert after["records"][:len(FEW)] == before["records"] and after["command"] == before["command"]
    first, second = (tables.case_table(after, case) for case in (CASE.name, other))
    assert f"--cases {CASE.name} " in first and f"--cases {other} " not in first
    assert f"--cases {other} " in second and f"--cases {CASE.name} " not in second
    assert all(f"--cases {case} " in tables.device_table(after) for case in (CASE.name, other))
    path.write_text(json.dumps(after | {"machine": after["machine"] | {"torch": "1.0"}}))
    with pytest.raises(SystemExit, match=r"torch 1\.0, and now 2.*--out"):
        run_tiny(path, monkeypatch, "--resume")


def test_inputs_that_do_not_fit_are_recorded(tmp_path, monkeypatch):
    def full(case, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "make_inputs", full)
    results = run_tiny(tmp_path / "cpu.json", monkeypatch)
    reasons = {r["reason"] for r in results["records"] if r["status"] == "error"}
    assert reasons == {"before it started: out of memory"}


def test_a_lost_gpu_is_left_behind_in_a_new_process(tmp_path, monkeypatch):
    def lost(device):
        if sys.exc_info()[0] is not None:
            raise session.DeviceLost

    class Replaced(Exception):
        """os.execv does not come back."""

    def execv(program, arguments):
        raise Replaced(arguments)

    monkeypatch.setattr(run, "tidy", lost)
    monkeypatch.setattr(session.os, "execv", execv)
    path = tmp_path / "cpu.json"
    with pytest.raises(Replaced) as caught:
        run_tiny(path, monkeypatch, "--budget", "100")
    started = caught.value.args[0][1:]
    assert started[:2] == ["-m", "benchmarks.run"] and "--resume" in started and 0 < float(started[-1]) < 100
    left = {r["implementation"]: r["status"] for r in json.loads(path.read_text())["records"]}
    assert left["failing"] == "error"
    monkeypatch.setattr(run, "tidy", lambda device: None)
    assert run.main(started[2:]) == 0  # the rest, and what had not been timed yet
    done = json.loads(path.read_text())["records"]
    assert len(done) == len(FEW) and {r["implementation"] for r in done if "total_ms" in r} == {
        "karma auto", "dense", "wrong", "nan"}


def test_workspaces_are_variants_of_their_own():
    names = [name for name, _, _ in run.variants(gpu_cases()[0])]
    assert "karma auto" in names and "karma auto 512 MiB" in names
    assert "dense" in names and "dense 512 MiB" not in names


def record(name, milliseconds, mib=10.0, status="ok", case=None, **more):
    case = case or Case(4096, 4096, 64)
    ms = {"median": milliseconds, "p20": 0.9 * milliseconds, "p80": 1.2 * milliseconds}
    fields = {k: v for k, v in dataclasses.asdict(case).items() if k != "workspaces"}
    return fields | {"case": case.name, "implementation": name, "status": status, "memory_mib": mib, "repeats": 5,
                     "workspace_mib": 64, "errors": {"loss": 1e-3, "query": 2e-3, "key": 3e-3}, "forward_ms": ms,
                     "backward_ms": ms, "total_ms": ms, "peak_fraction": 0.5} | more


def synthetic(*records):
    machine = {"device": "cuda", "name": "Test GPU 9", "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.1",
               "libraries": {"memeff": "0.3.1"}}
    return {"machine": machine, "date": "2026-01-02T03:04:05+00:00", "command": "python -m benchmarks.run",
            "peak_flops": {"bfloat16": 7e14}, "copy_bytes_per_second": 3e12, "records": list(records)}


SLOW = Case(8192, 10**6, 128, ids=True)
RESULTS = synthetic(
    record("karma auto", 2.0), record("karma fused", 1.5), record("dense", 5.0, 300.0), record("memeff", 3.0, 20.0),
    record("cut-cross-entropy, exact", 0.1, status="wrong"), record("karma auto 512 MiB", 1.0, workspace_mib=512),
    record("karma auto", 50.0, case=SLOW), record("dense", 40.0, case=SLOW),
    {**{k: v for k, v in record("Inf-CL", 1.0).items() if not k.endswith("_ms")}, "status": "absent", "reason": "why"})


def test_table_of_a_device():
    lines = tables.device_table(RESULTS).splitlines()
    for word in ("Test GPU 9", "torch 2.11.0", "Triton 3.6.0", "Python 3.12.1", "memeff 0.3.1", "2026-01-02",
                 "`python -m benchmarks.run`", "700 TFLOP/s bfloat16", "3000 GB/s"):
        assert word in lines[0]
    # neither our own backends nor one that is wrong are alternatives
    assert "| 4096² × 64 bfloat16 | 2 | 3 (memeff) | 1.50x faster | 10 | 20 | 50% |" in lines
    assert "| 4096² × 64 bfloat16, 512 MiB workspace | 1 | 3 (memeff) | 3.00x faster | 10 | 20 | 50% |" in lines
    assert "| 8192 × 1000000 × 128 bfloat16, id mask | 50 | 40 (dense) | **1.25x slower** | 10 | 10 | 50% |" in lines
    assert lines[-1].startswith("Ours is slower at: 8192 × 1000000 × 128 bfloat16, id mask.")
    faster = synthetic(record("karma auto", 1.0), record("dense", 1.0))
    assert "Ours is the fastest in every case." in tables.device_table(faster)


def test_table_of_a_case():
    text = tables.case_table(RESULTS, "4096x4096x64-bf16")
    assert "| memeff | 3 | 3 | 3 | 2.7 to 3.6 | 1.00 | 20 | 50% | 1.0e-03, 2.0e-03, 3.0e-03 |" in text
    assert "| cut-cross-entropy, exact | 0.1 | 0.1 | 0.1 | 0.09 to 0.12 | wrong result |" in text
    assert "Ours (auto) against the best alternative: 1.50x faster." in text and "Not measured: Inf-CL: why." in text
    assert "**1.25x slower**" in tables.case_table(RESULTS, SLOW.name)


def test_short_table():
    text = tables.short_table(RESULTS)
    assert "1.25x slower (dense)" in text and "1.50x faster (memeff)" in text and "wrong: 4096x4096x64-bf16" in text


def test_document_is_filled_between_its_marks(tmp_path, capsys):
    (tmp_path / "test-gpu-9.json").write_text(json.dumps(RESULTS))
    document = tmp_path / "doc.md"
    end = "<!-- /benchmark -->\n"
    marks = "a\n<!-- benchmark:test-gpu-9 -->\nold\n" + end + "b\n<!-- benchmark:{} -->\n" + end + "c\n"
    document.write_text(marks.format("test-gpu-9:" + SLOW.name))
    arguments = [str(document), "--results", str(tmp_path), "--plot", str(tmp_path / "plot.svg")]
    for _ in range(2):  # the second time replaces the first
        assert tables.main(arguments) == 0
    text = document.read_text()
    assert text.startswith("a\n<!-- benchmark:test-gpu-9 -->\nTest GPU 9;") and text.endswith(end + "c\n")
    assert "old" not in text and text.count("1.50x faster") == 1 and text.count(end + "b\n") == 1
    drawing = (tmp_path / "plot.svg").read_text()
    assert "karma auto" in drawing and "memeff" in drawing and "exact" not in drawing
    document.write_text(marks.format("nothing"))
    with pytest.raises(SystemExit):
        tables.main(arguments)
    assert "there is no results file nothing.json" in capsys.readouterr().err
    assert document.read_text() == marks.format("nothing")


def test_plot_shows_square_cases_of_one_width():
    more = [record("karma auto", 8.0, 40.0, case=Case(8192, 8192, 64)),
            record("karma auto", 8.0, 40.0, case=Case(8192, 8192, 64, symmetric=True)),
            record("karma auto", 9.0, 40.0, case=Case(8192, 8192, 128))]
    kind, lines = plot.series(synthetic(*RESULTS["records"], *more))
    assert kind == (64, "bfloat16") and list(lines) == ["karma auto", "dense", "memeff"]
    assert lines["karma auto"] == [(4096, 2.0, 10.0), (8192, 8.0, 40.0)]


def draw(dtype=torch.float32, flags=("labels", "ids", "log_q", "symmetric"), seed=0):
    return check_info_nce.draw((33, 47, 64), dtype, frozenset(flags), seed, "cpu")


@pytest.mark.parametrize("dtype", check_info_nce.DTYPES, ids=str)
def test_check_passes_what_is_right(dtype):
    kinds = []
    for seed in range(4):
        problem = draw(dtype, seed=seed)
        kinds.append(problem.fixed["key_ids"].ndim)
        worst, failure = check.check(problem, info_nce)
        assert failure == "" and worst < 1
    assert {1, 2} == set(kinds)


def coarse(query, key, **options):  # products with 10 bits, as TF32 has them
    return info_nce(query.half().float(), key.half().float(), **options)


def no_gradient_for_log_q(log_q, **options):
    return info_nce(log_q=log_q.detach() + 0 * log_q, **options)


def unwritten(query, **options):
    noise = torch.empty(query.shape[1])
    return info_nce(query=query + 0 * noise.nan_to_num(1.0, 1.0, 1.0) * noise, **options)


def restless(query, calls=itertools.count(), **options):  # noqa: B008 - it is to be shared
    return info_nce(query=query * (1 + 2.5e-7 * (next(calls) % 2)), **options)


@pytest.mark.parametrize("loss,expected", [(coarse, "is off by"), (no_gradient_for_log_q, "log_q is off by"),
                                           (unwritten, "is off by inf"), (restless, "two runs differ in")])
def test_check_finds_what_is_wrong(loss, expected):
    assert expected in check.check(draw(), loss)[1]


def test_check_covers_every_combination():
    kinds = [(dtype, flags) for _, dtype, flags in check_info_nce.combinations(1)]
    assert len(kinds) == len(set(kinds)) == 32 * len(check_info_nce.DTYPES)
    assert {shape for shape, _, _ in check_info_nce.combinations(1)} == set(check_info_nce.SHAPES)
    soon = list(check_info_nce.combinations(1))[:16]  # what a short time sees
    assert set().union(*(flags for _, _, flags in soon)) == set(check_info_nce.FLAGS)
    assert {dtype for _, dtype, _ in soon} == set(check_info_nce.DTYPES)


def counting(kind="plain", shape=(33, 300, 64), dtypes=check_ranks.DTYPES[0]):
    return check_ranks.draw(shape, dtypes, kind, 0)


@pytest.mark.parametrize("kind", check_ranks.KINDS)
def test_check_of_ranks_passes_what_is_right(kind):
    for dtypes in check_ranks.DTYPES:
        problem = counting(kind, dtypes=dtypes)
        assert len(problem.queries) < len(problem.chosen) < 3 * len(problem.queries)
        pairs = problem.rows * 300 + problem.chosen
        assert pairs.unique().numel() == len(pairs) and problem.rows.unique().numel() == 33
        assert check.check_counts(problem, "cpu", 1 << 20) == (0.0, "")


def test_truth_of_many_scores_is_that_of_the_definition(monkeypatch):
    for kind in ("copies", "last bits"):
        problem = counting(kind, (9, 80, 32), check_ranks.DTYPES[3])
        whole = check_ranks.truth(problem)
        assert whole.level.max() > 1 and len(whole.judged) == len(problem.chosen)
        with monkeypatch.context() as patch:
            patch.setattr(check_ranks, "SMALL", 0)
            counted = check_ranks.truth(problem)
            patch.setattr("karma_fast.evaluation.paths", lambda: ())  # as without the C++ extension
            patch.setattr(check_ranks, "SAMPLED", 7 * 80 * 32)
            some = check_ranks.truth(problem)
        assert len(some.judged) == 7
        for other in (counted, some):
            assert torch.equal(other.scores, whole.scores)
            assert torch.equal(other.above, whole.above[other.judged])
            assert torch.equal(other.level, whole.level[other.judged])


def two_roundings(queries, items, rows, chosen):
    return (queries[rows] * items[chosen]).sum(1)


def forgetful(queries, items, rows, scores, **options):  # the last item is left out
    return count_ranks(queries, items[:-1], rows, scores)


def unwritten_counts(queries, items, rows, scores, **options):
    rest = torch.empty(len(scores), dtype=torch.int64)
    return tuple(x + (rest == torch.iinfo(torch.int64).max) for x in count_ranks(queries, items, rows, scores))


@pytest.mark.parametrize("name,function,expected", [
    ("pair_scores", two_roundings, "scores are not those of the definition"),
    ("count_ranks", forgetful, "counts of items level differ"),
    ("count_ranks", unwritten_counts, "counts of items above differ")])
def test_check_of_ranks_finds_what_is_wrong(name, function, expected, monkeypatch):
    problem = counting("alike" if function is forgetful else "plain")
    monkeypatch.setattr(f"karma_kernels.ranks.{name}", function)
    assert expected in check.check_counts(problem, "cpu", 1 << 20)[1]


def test_check_of_ranks_covers_every_combination():
    cases = list(check_ranks.combinations(len(check_ranks.SHAPES), check_ranks.SHAPES))
    kinds = {(dtypes, kind) for _, dtypes, kind in cases}
    assert len(kinds) == len(check_ranks.DTYPES) * len(check_ranks.KINDS)
    assert {(shape, kind) for shape, _, kind in cases if kind == "plain"} == \
        {(shape, "plain") for shape in check_ranks.SHAPES}
    assert {dtypes for _, dtypes, _ in cases[:8]} == set(check_ranks.DTYPES)
    small = check_ranks.shapes_for("cpu")
    assert 0 < len(small) < len(check_ranks.SHAPES)
    assert {shape for shape, _, kind in cases if kind == "tiny"} <= set(small)


def test_check_says_what_passed(monkeypatch, capsys):
    monkeypatch.setattr(check_ranks, "SHAPES", ((5, 40, 33), (1, 1, 1)))
    monkeypatch.setattr(check_soft_prompt, "SHAPES", ((5, 7, 9, 21, 2, 2, 9),))
    monkeypatch.setattr(check_info_nce, "SHAPES", ((5, 3, 8),))
    monkeypatch.setattr(check_info_nce, "FLAGS", ("labels", "ids"))
    arguments = ["--device", "cpu", "--rounds", "1", "--seed", "0"]
    assert check.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cpu, seed 0: inputs of ranks 28 of 28, soft prompts 30 of 30, info_nce 12 of 12; 0 failures" in lines
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in lines}
    assert rows["ranks", "float32"] == ["7", "0", "PASS"] and rows["ranks", "bfloat16"] == ["14", "0", "PASS"]
    assert rows["auto", "float16"][-1] == "PASS"
    assert rows["prompt-chunked", "bfloat16"][0] == "12" and rows["prompt-auto", "float32"][-1] == "PASS"
    monkeypatch.setattr("karma_kernels.ranks.count_ranks", forgetful)
    assert check.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAIL ranks torch.float32 (5, 40, 33) float32 and float32, ") for line in lines)
    assert any(line.split() == ["ranks", "float32", "7", "inf", "FAIL"] for line in lines)
    monkeypatch.undo()
    assert check.main([*arguments, "--seconds", "0"]) == 0
    assert "inputs of ranks 1 of 28, soft prompts 1 of 30, info_nce 1 of 96; 0 failures" in capsys.readouterr().out


def test_file_name():
    assert file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


class Collected:
    """A pytest plugin that keeps what was collected."""

    def pytest_collection_finish(self, session):
        self.items = session.items


def test_pytest_runs_benchmarks_only_when_asked(monkeypatch):
    pytest.importorskip("pytest_benchmark")
    monkeypatch.chdir(ROOT)
    asked, not_asked = Collected(), Collected()
    common = ["-q", "-p", "no:cacheprovider", "--collect-only"]
    assert pytest.main([*common, "--benchmark"], plugins=[asked]) == 0
    assert pytest.main([*common, "benchmarks"], plugins=[not_asked]) == 0
    cases = gpu_cases() if torch.cuda.is_available() else cpu_cases()
    for collected in (asked, not_asked):
        names = {item.name for item in collected.items}
        assert {f"test_info_nce[{c.name}-{i.name}]" for c in cases for i in IMPLEMENTATIONS} <= names
        assert {f"test_ranking[{c.name}-{i.name}]" for c in ranking.cpu_cases() for i in rankers} <= names
        made = prompts.cases_for("cuda" if torch.cuda.is_available() else "cpu")
        assert {f"test_soft_prompt[{c.name}-{i.name}]" for c in made for i in prompters} <= names
    assert not any(item.get_closest_marker("skip") for item in asked.items)
    assert all(item.get_closest_marker("skip") for item in not_asked.items)


@pytest.mark.parametrize("failing,status", [("none", 0), ("check", 3), ("ranking", 3), ("step", 3)])
def test_gpu_script(failing, status, tmp_path):
    """One after the other with their shares of the time, whatever fails; Python stands in for itself."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$2" in benchmarks.{failing}) exit 3;; esac\n')
    python.chmod(0o755)
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), f"{tmp_path}/a b/gpu.json", "1000"]
    done = subprocess.run(command, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
    assert done.returncode == status and done.stderr == "" and ("FAILED" in done.stdout) == (failing == "check")
    started = [line for line in log.read_text().splitlines() if line.startswith("-m")]
    found = [line.rsplit(" ", 1) for line in started]
    steps = "--cases qwen2.5-1.5b-205-all-1-8gib qwen2.5-1.5b-4096-last-0.05-8gib"
    assert set(steps.split()[1:]) <= {case.name for case in step.gpu_cases()}
    to = f"--out {tmp_path}/a b"
    assert [words for words, _ in found] == [
        "-m benchmarks.check --seconds", f"-m benchmarks.run {to}/gpu.json --budget",
        f"-m benchmarks.soft_prompt {to}/soft-prompt-gpu.json --budget",
        f"-m benchmarks.ranking {to}/ranking-gpu.json --budget",
        f"-m benchmarks.step {to}/step-gpu.json {steps} --budget"]
    for (_, given), share in zip(found, (200, 420, 540, 700, 1000), strict=True):
        assert share - 60 < int(given) <= share
    subprocess.run(command[:2] + ["", "0"], env=os.environ | {"PYTHON": str(python)}, check=status == 0)
    assert log.read_text().splitlines()[-1] == f"-m benchmarks.step {steps} --budget 0"


@pytest.mark.parametrize("missing", ["is_available", "transformers"])
def test_gpu_script_does_what_it_can(missing, tmp_path):
    """Without a GPU the steps of a CPU, without transformers none."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$2" in *{missing}*) exit 1;; esac\n')
    python.chmod(0o755)
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "", "0"]
    done = subprocess.run(command, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
    assert done.returncode == 0
    last = {"is_available": "-m benchmarks.step --budget 0", "transformers": "-m benchmarks.ranking --budget 0"}
    assert [line for line in log.read_text().splitlines() if line.startswith("-m")][-1] == last[missing]
    assert ("No training steps" in done.stdout) == (missing == "transformers")
