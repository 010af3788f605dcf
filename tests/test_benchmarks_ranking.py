"""The benchmark of ranking: what is wrong is found, and what is reported was measured."""

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import measure, plot, session, tables
from benchmarks.ranking import __main__ as main
from benchmarks.ranking import exact as exactness
from benchmarks.ranking import tables as ranking_tables
from benchmarks.ranking.cases import KS, SEEN, Case, cpu_cases, gpu_cases, make_inputs
from benchmarks.ranking.exact import Found, compare, exact, is_wrong
from benchmarks.ranking.gpu import GPU_IMPLEMENTATIONS
from benchmarks.ranking.implementations import (
    IMPLEMENTATIONS,
    Implementation,
    absent,
    batches,
    hits_in,
    torch_topk,
)
from karma_fast.evaluation import paths, target_ranks

CASE = Case(24, 700, 16)


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(CASE)


@pytest.fixture(scope="module")
def truth(inputs):
    return exact(inputs)


def counted(inputs, **changes):
    ranks = target_ranks(inputs.queries, inputs.items, inputs.targets, seen=inputs.seen)
    ranks = replace(ranks, **{name: change(getattr(ranks, name)) for name, change in changes.items()})
    return Found(ranks.expected[:, None] < np.array(KS), ranks)


def test_case_names():
    for cases in (cpu_cases(), gpu_cases()):
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert Case.parse(case.name) == case
    assert Case(8, 800, 8, "untrained", "float16", False).name == "8x800x8-untrained-fp16-all"
    for bad in ("8x800-trained", "8x800x8", "8x800x8-fp32", "8x50x8-trained", "0x800x8-trained",
                "8x800x8-trained-fp32", "8x800x8-trained-all-bf16", "8x800x8-trained-some"):
        with pytest.raises(ValueError, match="512x100000x64-trained is the form"):
            Case.parse(bad)
    assert Case(2, 300, 5).flops == 6000 and Case(2, 300, 5).least_bytes == 6040


@pytest.mark.parametrize("kind,least,most", [("trained", 0.5, 0.7), ("untrained", 0.0, 0.2)])
def test_inputs(kind, least, most):
    case = Case(256, 5000, 64, kind)
    one, two, other = make_inputs(case), make_inputs(case), make_inputs(case, seed=1)
    assert torch.equal(one.queries, two.queries) and not torch.equal(one.items, other.items)
    assert one.items.shape == (5000, 64) and one.queries.dtype == torch.float32
    torch.testing.assert_close(one.items.norm(dim=1), torch.ones(5000))
    torch.testing.assert_close(one.queries.norm(dim=1), torch.ones(256))
    indptr, seen = one.seen
    assert len(indptr) == 257 and indptr[0] == 0 and indptr[-1] == len(seen)
    scores = one.queries @ one.items.T
    for row, (start, stop) in enumerate(zip(indptr[:-1], indptr[1:], strict=True)):
        own = seen[start:stop]
        assert SEEN - 5 <= len(own) <= SEEN and (np.diff(own) > 0).all() and one.targets[row] not in own
        assert (scores[row, own] >= scores[row].topk(SEEN).values[-1]).sum() >= SEEN // 2 - 1
    assert seen.min() >= 0 and 4900 < seen.max() < 5000
    assert least <= counted(one).hits[:, -1].mean() <= most


@pytest.mark.parametrize("case", [CASE, Case(300, 4000, 32, "untrained"), Case(5, SEEN + 1, 8, "untrained")],
                         ids=lambda c: c.name)
def test_every_implementation_agrees_with_float64(case, monkeypatch):
    several = {"cpu": 70 * 4 * case.items}  # batches
    monkeypatch.setattr("benchmarks.ranking.implementations.SCORE_BYTES", several)
    inputs = make_inputs(case)
    truth, ran = exact(inputs), []
    for i in IMPLEMENTATIONS:
        if absent(i, case) is None:
            found = i.find(inputs, i.prepare(inputs) if i.prepare else None)
            assert found.hits.shape == (case.queries, len(KS)) and found.hits.dtype == bool, i.name
            assert not i.exact or not is_wrong(compare(found, truth)), i.name
            assert (found.ranks is not None) == (i.name.startswith("karma ") and i.name != "karma top_k"), i.name
            ran.append(i.name)
    assert {"karma auto, packing included", "torch matmul + topk", "RecBole style"} <= set(ran)
    assert importlib.util.find_spec("faiss") is None or "faiss IndexFlatIP" in ran


@pytest.mark.parametrize("case", [CASE, Case(50, 900, 32, "untrained", "bfloat16", False),
                                  Case(90, 400, 33, dtype="bfloat16")], ids=lambda c: c.name)
def test_implementations_for_a_gpu_agree_with_float64(case, monkeypatch):
    """They are plain torch, and functions that take tensors of any device."""
    monkeypatch.setattr("benchmarks.ranking.implementations.SCORE_BYTES", {"cpu": 70 * 4 * case.items})
    inputs = make_inputs(case)
    assert inputs.items.dtype == inputs.queries.dtype == getattr(torch, case.dtype)
    assert case.seen == bool(len(inputs.seen[1]))
    truth, ran = exact(inputs), []
    for i in GPU_IMPLEMENTATIONS:
        if absent(i, case) is None:
            found = i.find(inputs, i.prepare(inputs) if i.prepare else None)
            errors = compare(found, truth)
            assert not i.exact or not is_wrong(errors), i.name
            assert errors["ranks_differ"] == (0 if i.name.startswith("karma ") else None), i.name
            ran.append(i.name)
    kernels = {"karma count_ranks", "karma count_ranks, 512 MiB"}
    assert {i.name for i in GPU_IMPLEMENTATIONS} - set(ran) == (kernels if case.seen else set())
    if case.seen:
        assert absent(GPU_IMPLEMENTATIONS[1], case).startswith("ranks all items")


class Event:
    """Stands for one of CUDA: there is no device here."""

    def __init__(self):
        self.at = time.perf_counter()

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


def test_runner_on_a_gpu(tmp_path, monkeypatch, capsys):
    """Where times and memory come from; tensors stay on the CPU, and memory is told by a counter."""
    made, held = [], iter(range(0, 100 << 20, 1 << 20))

    def make(case, device):
        made.append(device)
        return make_inputs(case)

    def about(device, *libraries):
        return {"device": device, "name": "Test GPU 9", "torch": "2.11.0", "python": "3.12.1"}

    for module, name, stand_in in (
            (main, "make_inputs", make), (main, "describe", about), (session, "describe", about),
            (measure, "event", Event), (measure, "FLUSH_BYTES", 16), (measure, "matmul_peak", lambda *_: 1e9),
            (measure, "copy_bandwidth", lambda *_: 1e9),
            *((torch.cuda, name, lambda: None) for name in ("synchronize", "reset_peak_memory_stats", "empty_cache")),
            (torch.cuda, "memory_allocated", lambda: next(held)),
            (session.gc, "collect", lambda: 0),
            (torch.cuda, "max_memory_allocated", lambda: next(held) + (5 << 20)),
            (main, "absent", lambda i, case, device: absent(i, case, "cpu"))):
        monkeypatch.setattr(module, name, stand_in)
    path, names = tmp_path / "ranking-gpu.json", ["12x300x8-trained", "12x300x8-trained-bf16-all"]
    assert main.main(["--device", "cuda", "--quick", "--out", str(path), "--cases", *names]) == 0
    results = json.loads(path.read_text())
    assert set(made) == {"cuda"} and "benchmarks.ranking --device cuda --cases" in results["command"]
    found = {(r["case"], r["implementation"]): r for r in results["records"]}
    assert len(found) == 2 * len(GPU_IMPLEMENTATIONS)
    for (case, name), r in found.items():
        left_out = case == names[0] and "count_ranks" in name
        assert r["status"] == ("absent" if left_out else "inexact" if name.endswith("bf16") else "ok"), r
        assert left_out or (r["memory_mib"] == pytest.approx(6, abs=2) and r["repeats"] >= 5 and r["total_ms"])
    assert found[names[1], "karma auto"]["dtype"] == "bfloat16" and not found[names[1], "karma auto"]["seen"]
    text = ranking_tables.device_table(results)
    assert "| 12 × 300 × 8, bfloat16, all items ranked |" in text and "torch's allocator" in text
    assert "faiss" not in text and "packing" not in text and "early stop" not in text
    assert names[1] in capsys.readouterr().out


def test_seen_items_would_be_noticed(inputs, truth):
    """The check means something only if leaving nothing out gives other hits."""
    unfiltered = torch.topk(inputs.queries @ inputs.items.T, 200).indices
    assert is_wrong(compare(Found(hits_in(unfiltered, inputs.targets)), truth))


def test_exact_is_the_definition(inputs, truth, monkeypatch):
    ranks = target_ranks(inputs.queries, inputs.items, inputs.targets, seen=inputs.seen)
    assert (truth.greater == ranks.greater).all() and (truth.ties == ranks.ties).all()
    assert (truth.above <= truth.greater).all() and (truth.greater + truth.ties <= truth.above + truth.near).all()
    monkeypatch.setattr(exactness, "PANEL", 64)
    part = exact(inputs, sample=7)
    assert len(part.rows) == 7 and (part.greater == truth.greater[part.rows]).all()


def test_exact_has_ties():
    inputs = make_inputs(CASE)
    first = int(inputs.targets[0])
    copies = [n for n in range(700) if n not in inputs.seen[1][:inputs.seen[0][1]] and n != first][:3]
    inputs.items[copies] = inputs.items[first].clone()
    truth = exact(inputs)
    assert truth.ties[0] == 3 and truth.near[0] >= 3


def test_what_is_wrong_is_found(inputs, truth):
    right = compare(counted(inputs), truth)
    assert right["ranks_differ"] == 0 and not is_wrong(right) and right["hits_sure"]["200"] > 20
    assert compare(counted(inputs, greater=lambda x: x + 1), truth)["ranks_differ"] == 24
    assert is_wrong(compare(counted(inputs, ties=lambda x: x + 1), truth))
    hits = counted(inputs).hits
    hits[3] = ~hits[3]
    differ = compare(Found(hits), truth)
    assert differ["ranks_differ"] is None and set(differ["hits_differ"].values()) == {1}


def test_hits_that_rounding_decides_are_not_judged(inputs, truth):
    near = np.full_like(truth.near, 700)
    either = compare(Found(~counted(inputs).hits), replace(truth, above=0 * truth.above, near=near))
    assert either["hits_sure"] == {"1": 0, "10": 0, "200": 0} and not is_wrong(either)


def test_early_stop_may_leave_out_what_is_beyond(inputs, truth):
    cut = counted(inputs, greater=lambda x: np.minimum(x, 200))
    assert (truth.greater > 200).any() and is_wrong(compare(cut, truth))
    cut.largest_k = 200
    assert not is_wrong(compare(cut, truth))
    for changed in (counted(inputs, greater=lambda x: np.minimum(x, 199)),
                    counted(inputs, greater=lambda x: np.minimum(x + 1, 200))):
        changed.largest_k = 200
        assert is_wrong(compare(changed, truth))


def test_batches_cover_all_queries(inputs, monkeypatch):
    monkeypatch.setattr("benchmarks.ranking.implementations.SCORE_BYTES", {"cpu": 7 * 4 * 700})
    assert [(r.start, r.stop) for r in batches(inputs)] == [(0, 7), (7, 14), (14, 21), (21, 24)]
    assert len(list(batches(inputs, 100))) == 24


def test_calls_in_turn():
    order = []

    def slow():
        order.append("slow")
        time.sleep(0.02)
        return 2

    found = measure.in_turn({"slow": slow, "fast": lambda: order.append("fast") or 1}, 0, least=3, each=0.01)
    assert found == {"slow": [2], "fast": [1, 1, 1]} and order == ["slow", "fast", "fast", "fast"]


def test_memory_counts_what_torch_does_not_hold():
    if measure.peak_of_process(lambda: None)[1] is None:
        pytest.skip("the system does not tell how much memory a process held at most")
    before = measure.memory_of_process()
    value, most = measure.peak_of_process(lambda: np.ones(64 << 20, np.uint8).sum())
    assert value == 64 << 20 and 60 << 20 < most - before < 90 << 20
    assert measure.peak_of_process(lambda: 0)[1] - before < 30 << 20  # and the count was set back


def test_groups_fit_the_memory():
    def packs(inputs):
        return None

    many = [Implementation(n, torch_topk, packs if n in "af" else None, holds=holds)
            for n, holds in zip("afbcde", (2, 2, 1, 0, 2, 9), strict=True)]
    names = [[i.name for i in group] for group in main.groups(many, 100, 300)]
    assert names == [["a", "f", "b", "c"], ["d"], ["e"]]  # a and f share one catalogue


def test_a_catalogue_is_packed_once_for_all_that_use_it(tmp_path, monkeypatch):
    packed = []

    def pack(inputs):
        packed.append(len(inputs.items))
        return np.ones(2 << 20)

    both = [Implementation(name, torch_topk_of_items, pack) for name in ("karma auto", "karma top_k")]
    monkeypatch.setattr(main, "IMPLEMENTATIONS", both)
    assert main.main(["--out", str(tmp_path / "r.json"), "--device", "cpu", "--quick", "--cases", CASE.name]) == 0
    assert packed.count(CASE.items) == 1
    one, two = json.loads((tmp_path / "r.json").read_text())["records"]
    assert one["pack_ms"] == two["pack_ms"] and one["packed_mib"] == two["packed_mib"]
    assert one["memory_mib"] is None or min(one["memory_mib"], two["memory_mib"]) > 14


def test_what_auto_packs_is_packed_before_the_time_runs(inputs):
    i = next(i for i in IMPLEMENTATIONS if i.name == "karma auto")
    make = i.plan(inputs)
    assert make is i.plan(inputs)  # so that those with the same needs share it
    packed = make(inputs)
    held = [name for name in paths() if packed.holds(name)]
    assert held == list(make.keywords["also"]) and bool(held) == bool(paths())
    i.find(inputs, packed)
    assert held == [name for name in paths() if packed.holds(name)]


def torch_topk_of_items(inputs, prepared):
    return torch_topk(inputs, None)


def off_by_one(inputs, prepared):
    return counted(inputs, greater=lambda x: x + 1)


def failing(inputs, prepared):
    raise RuntimeError("no such kernel\nsecond line")


def missing(device):
    raise ImportError("No module named 'rival' (/somewhere/rival.py)")


FEW = (Implementation("karma auto", lambda inputs, prepared: counted(inputs), lambda inputs: np.ones(1 << 20)),
       Implementation("torch matmul + topk", torch_topk, batch=lambda items: 7),
       Implementation("miscounted", off_by_one), Implementation("failing", failing),
       Implementation("half", lambda inputs, prepared: Found(~counted(inputs).hits), exact=False),
       Implementation("elsewhere", torch_topk, probe=missing), Implementation("slow", torch_topk, most_flops=10))


def run_few(path: Path, monkeypatch, *more: str) -> dict:
    monkeypatch.setattr(main, "IMPLEMENTATIONS", FEW)
    assert main.main(["--out", str(path), "--device", "cpu", "--quick", "--cases", CASE.name, *more]) == 0
    return json.loads(path.read_text())


def test_runner_writes_everything_and_survives_failures(tmp_path, monkeypatch, capsys):
    results = run_few(tmp_path / "out" / "ranking-cpu.json", monkeypatch)
    assert results["benchmark"] == "ranking" and "numpy" in results["machine"]["libraries"]
    assert set(results["peak_flops"]) == {"float32", "bfloat16"} and results["copy_bytes_per_second"] > 0
    assert CASE.name in results["command"] and str(tmp_path) not in results["command"]
    records = {r["implementation"]: r for r in results["records"]}
    assert {name: r["status"] for name, r in records.items()} == {
        "karma auto": "ok", "torch matmul + topk": "ok", "miscounted": "wrong", "failing": "error",
        "half": "inexact", "elsewhere": "absent", "slow": "absent"}
    assert records["failing"]["reason"] == "RuntimeError: no such kernel"
    assert records["elsewhere"]["reason"] == "ImportError: No module named 'rival'"
    assert records["slow"]["reason"].startswith("too slow for this size")
    assert records["miscounted"]["errors"]["ranks_differ"] == 24
    assert records["half"]["errors"]["all_hits_differ"] == {"1": 24, "10": 24, "200": 24}
    assert records["torch matmul + topk"]["batch"] == 7 and records["karma auto"]["batch"] == 24
    assert records["torch matmul + topk"]["pack_ms"] is None and records["karma auto"]["pack_ms"] > 0
    for name in ("karma auto", "torch matmul + topk", "miscounted", "half"):
        r = records[name]
        assert r["queries"] == 24 and r["items"] == 700 and r["width"] == 16 and r["kind"] == "trained"
        assert r["repeats"] >= 3 and 0 < r["total_ms"]["p20"] <= r["total_ms"]["median"] <= r["total_ms"]["p80"]
        rate = CASE.flops / (1e-3 * r["total_ms"]["median"])
        assert r["gflops"] == pytest.approx(1e-9 * rate)
        assert r["queries_per_second"] == pytest.approx(24e3 / r["total_ms"]["median"])
        assert r["peak_fraction"] == pytest.approx(rate / results["peak_flops"]["float32"])
        assert r["bf16_peak_fraction"] == pytest.approx(rate / results["peak_flops"]["bfloat16"])
    if records["karma auto"]["memory_mib"] is not None:
        assert records["karma auto"]["packed_mib"] > 7 and records["karma auto"]["memory_mib"] > 7
    printed = capsys.readouterr().out
    assert CASE.name in printed and "wrong: 24x700x16-trained miscounted" in printed


def test_runner_keeps_to_its_budget_and_resumes(tmp_path, monkeypatch):
    path = tmp_path / "ranking-cpu.json"
    results = run_few(path, monkeypatch, "--budget", "0")
    assert {(r["status"], r["reason"]) for r in results["records"]} == {("skipped", "time budget")}
    done = run_few(path, monkeypatch, "--resume")
    assert len(done["records"]) == len(FEW) and "skipped" not in {r["status"] for r in done["records"]}
    assert run_few(path, monkeypatch, "--resume") == done  # nothing left to do


def test_inputs_that_do_not_fit_are_recorded(tmp_path, monkeypatch):
    def full(case, device):
        raise MemoryError

    monkeypatch.setattr(main, "make_inputs", full)
    results = run_few(tmp_path / "ranking-cpu.json", monkeypatch)
    assert {r["reason"] for r in results["records"] if r["status"] == "error"} == {"before it started: out of memory"}


def record(name, milliseconds, case=CASE, status="ok", differ=0, **more):
    per_k = {str(k): differ for k in KS}
    errors = {"hits_differ": per_k, "hits_sure": {str(k): 24 for k in KS}, "all_hits_differ": per_k,
              "ranks_differ": 0 if name.startswith("karma ") else None}
    fields = {"case": case.name, "implementation": name, "status": status, "errors": errors, "pack_ms": 0.5,
              "queries": case.queries, "items": case.items, "width": case.width, "kind": case.kind, "repeats": 3,
              "hit_rate": {"1": 0.1, "10": 0.25, "200": 0.6}, "batch": 100, "packed_mib": 1.0, "memory_mib": 12.0,
              "total_ms": {"median": milliseconds, "p20": 0.9 * milliseconds, "p80": 1.2 * milliseconds}}
    main.add_times(fields, case, [milliseconds], {"float32": 1e8, "bfloat16": 2e8})
    return fields | more


OTHER = Case(24, 9000, 16, "untrained")
LARGER = Case(24, 1400, 16)
RESULTS = {
    "benchmark": "ranking", "date": "2026-01-02T03:04:05+00:00", "command": "python -m benchmarks.ranking",
    "machine": {"device": "cpu", "name": "Test CPU 9", "torch": "2.11.0", "triton": None, "python": "3.12.1",
                "libraries": {"faiss-cpu": "1.15.1"}},
    "peak_flops": {"float32": 1e8, "bfloat16": 2e8}, "copy_bytes_per_second": 3e10,
    "records": [
        record("karma auto", 10.0), record("karma avx2", 9.0), record("karma auto, early stop", 5.0),
        record("karma auto, packing included", 25.0), record("karma top_k", 45.0), record("faiss IndexFlatIP", 30.0),
        record("torch matmul + topk", 20.0, pack_ms=None), record("bad", 1.0, status="wrong"),
        record("torch matmul + topk, bf16", 2.0, status="inexact", differ=3),
        {"case": CASE.name, "implementation": "implicit", "status": "absent", "reason": "why"},
        {"case": CASE.name, "implementation": "ranx", "status": "absent", "reason": "why"},
        record("karma auto", 50.0, OTHER), record("faiss IndexFlatIP", 40.0, OTHER, memory_mib=None),
        record("karma auto", 24.0, LARGER), record("faiss IndexFlatIP", 60.0, LARGER)]}


def test_table_of_a_device():
    text = ranking_tables.device_table(RESULTS)
    for word in ("Test CPU 9", "faiss-cpu 1.15.1", "2026-01-02", "0.0001 TFLOP/s float32", "30 GB/s copying"):
        assert word in text.splitlines()[0]
    # neither what is wrong nor what is not exact is an alternative, nor our other paths
    assert "| 24 × 700 × 16 | 0.60 | 10 | 20 (torch matmul + topk) | 2.00x faster | 3.00x faster | 2,400 | 54% " \
           "| 27% | 0.5 | 12 | 12 |" in text
    assert "× 16, untrained | 0.60 | 50 | 40 (faiss IndexFlatIP) | **1.25x slower** | **1.25x slower** |" in text
    assert "| 12 | - |" in text
    assert "| 24 × 700 × 16 | 25 | **1.25x slower** | 5 | 2.00x faster | 45 | **1.50x slower** |" in text
    assert "Ours is slower at: 24 × 9,000 × 16, untrained. With packing in the time it is slower at: 24 × 700 × 16. " \
        "Every time is" in text


def test_short_table_of_a_device():
    text = tables.table_for("one:short", {"one": RESULTS})
    assert "| 24 × 700 × 16 | 10 | 20 (torch matmul + topk) | 2.00x faster | 3.00x faster | 54% | 0.5 | " \
           "**1.25x slower** |" in text
    assert "Test CPU 9" in text.splitlines()[0] and "Every time is" in text.splitlines()[-1]


def test_table_without_a_packed_catalogue():
    only = [r for r in RESULTS["records"] if r["implementation"] not in ("karma auto", "karma avx2")]
    text = ranking_tables.device_table(RESULTS | {"records": only})
    assert "| 24 × 700 × 16 (packing included) | 0.60 | 25 | 20 (torch matmul + topk) | **1.25x slower** |" in text
    assert "No case has a result." in ranking_tables.device_table(RESULTS | {"records": []})


def test_table_of_a_case():
    text = ranking_tables.case_table(RESULTS, CASE.name)
    rows = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows[:4] == ["bad", "torch matmul + topk, bf16", "karma auto, early stop", "karma avx2"]
    assert "| torch matmul + topk, bf16 | 2 | 2 to 2 | - |" in text and "not exact, 3 of 24 hits at 10 differ" in text
    assert "| wrong result |" in text and "| counts exact |" in text and "| hits exact |" in text
    assert "| torch matmul + topk | 20 | 20 to 20 | 1.00 | - | 1,200 | 0 | 27% | 13% | 12 | 24 | 0.100, " in text
    assert "Ours against the best exact alternative: 2.00x faster." in text
    assert text.endswith("Not measured: implicit and ranx: why.")


def test_document_and_plots(tmp_path, capsys):
    (tmp_path / "ranking-test-cpu-9.json").write_text(json.dumps(RESULTS))
    document, drawing = tmp_path / "doc.md", tmp_path / "ranking.svg"
    marks = "<!-- benchmark:ranking-test-cpu-9 -->\n<!-- /benchmark -->\n" \
        f"<!-- benchmark:ranking-test-cpu-9:{OTHER.name} -->\n<!-- /benchmark -->\n"
    document.write_text(marks)
    arguments = [str(document), "--results", str(tmp_path), "--plot", str(tmp_path / "loss.svg"),
                 "--plot-ranking", str(drawing)]
    assert tables.main(arguments) == 0
    assert "2.00x faster" in document.read_text() and "24 × 9,000 × 16, untrained. Test CPU 9" in document.read_text()
    text = drawing.read_text()
    assert "karma auto" in text and "faiss IndexFlatIP" in text and "bf16" not in text and "avx2" not in text
    assert "3 implementations at widths 16" in capsys.readouterr().out and not (tmp_path / "loss.svg").exists()
    with pytest.raises(SystemExit):
        tables.main([*arguments, "--plot-of", "ranking-test-cpu-9"])
    assert "there is no results file" in capsys.readouterr().err


def test_plot_shows_time_a_query_of_trained_cases():
    lines = plot.ranking_series(RESULTS)[16]
    assert set(lines) == {"karma auto", "faiss IndexFlatIP", "torch matmul + topk"}
    assert lines["karma auto"] == [(700, pytest.approx(10 / 24)), (1400, pytest.approx(1))]


def test_short_table():
    text = ranking_tables.short_table(RESULTS)
    assert "2.00x faster (torch matmul + topk)" in text and "1.25x slower (faiss IndexFlatIP)" in text
    assert f"wrong: {CASE.name} bad" in text


