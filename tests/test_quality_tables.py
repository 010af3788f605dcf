"""Tables and pictures of the quality experiment from constructed results."""

import copy
import json

import numpy as np
import pytest

from benchmarks.quality import tables
from benchmarks.quality.maps import UNTUNED, panels, plot_maps
from benchmarks.quality.plots import diagnosed_rows, plot
from benchmarks.quality.protocol import HISTORY_ONLY
from benchmarks.quality.published import FIGURES
from benchmarks.quality.rows import ROWS

METRICS = {"HR@10": 0.1, "HR@50": 0.2, "HR@200": 0.4, "NDCG@10": 0.05, "MRR": 0.04, "tie_share": 0.0}


def record(name: str, seed: int, lift: float = 0.0, queries: bool = False, **more) -> dict:
    row = ROWS[name]
    metrics = {part: {k: v + lift for k, v in METRICS.items()} for part in ("all", "history of at most 4")}
    variants = {"masked": metrics, "unmasked": {part: {k: v / 2 for k, v in found.items()}
                                                for part, found in metrics.items()}}
    if queries:
        variants |= {name + HISTORY_ONLY: found for name, found in copy.deepcopy(variants).items()}
    return {"row": name, "label": row.label, "kind": row.kind, "parent": row.parent, "differs": row.differs,
            "seed": seed, "changes": {}, "readings": 1, "metrics": variants, **more}


def difference(value: float, error: float, by_seed: list[float]) -> dict:
    found = {"difference": value, "standard_error": error, "by_seed": by_seed}
    return {"HR@10": found, "HR@200": found, "seeds": len(by_seed)}


@pytest.fixture
def results() -> dict:
    cost = {"steps": 60, "start_seconds": 20.0, "train_seconds": 100.0, "ranking_seconds": 3.0, "peak_bytes": 2e9}
    found = {"states": {"trained": {"u_effective_rank": {"value": 30.0}, "history_sink": {"value": None}}}}
    return {"benchmark": "quality", "data": "beauty", "size": "reduced", "on": "test", "queries": False,
            "protocol": "beauty: 2,000 requests", "requests": {"all": 2000, "history of at most 4": 700, "none": 0},
            "settings": {"model": {"backbone": "tiny", "quantization": "4bit", "decode_weight": 0.02},
                         "training": {"max_steps": 60, "batch_size": 384}},
            "machine": {"name": "A CPU, 2 threads", "torch": "2.13.0", "python": "3.11.7", "libraries": {"peft": "1"}},
            "date": "2026-11-22T00:00:00+00:00", "commands": ["python -m benchmarks.quality --data beauty --rows A"],
            "records": [record("C", 1, 0.03, **cost), record("popularity", 0, -0.02), record("A", 0, **cost),
                        record("A", 1, 0.01, **cost), record("C", 0, 0.02, **cost, diagnostics=found)],
            "comparisons": {"C": {"A, masked": difference(0.02, 0.004, [0.02, 0.02]),
                                  "mix, masked, history of at most 4": difference(0.01, 0.002, [0.01])},
                            "popularity": {"A, masked": difference(-0.025, 0.004, [-0.02, -0.03, -0.025])}}}


def rows_of_table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_main_table_has_means_spreads_and_differences(results):
    head, _, *lines = rows_of_table(tables.main_table(results))
    assert [line[0] for line in lines] == ["popularity", "A: L_act", "C: L_act + L_rec"]  # in the order of rows
    assert lines[0][head.index("seeds")] == "-" and lines[2][head.index("seeds")] == "2"
    assert lines[0][head.index("HR@10")] == "0.0800" and lines[2][head.index("HR@10")] == "0.1250 ± 0.0071"
    assert lines[2][head.index("HR@10 against A")] == "+0.0200, +0.0200"  # two seeds have no error to speak of
    assert lines[0][head.index("HR@200 against A")] == "-0.0250 ± 0.0075"  # the root of 0.004² + 2.195² 0.005² / 3
    assert lines[1][head.index("HR@10 against A")] == "-"
    results["records"].append(record("C", 2, 0.01))
    results["comparisons"]["C"]["A, masked"]["HR@10"]["by_seed"] = [0.02, 0.02]
    again = rows_of_table(tables.main_table(results))[4]
    assert again[head.index("HR@10 against A")] == "+0.0200, +0.0200 (2 of 3 seeds)"
    results["comparisons"]["C"]["A, masked"]["HR@10"]["by_seed"] = [0.02]
    assert "| +0.0200 ± 0.0040 (1 of 3 seeds) |" in tables.main_table(results)
    results["records"].append(record("H", 0))
    results["comparisons"]["H"] = {"C, masked": difference(-0.01, 0.003, [-0.01])}
    assert tables.main_table(results).endswith("| - | - | - | C: L_act + L_rec: -0.0100 ± 0.0030 |")
    unmasked = rows_of_table(tables.main_table(results, "unmasked"))
    assert unmasked[2][head.index("HR@10")] == "0.0400" and unmasked[4][head.index("HR@10 against A")] == "-"


@pytest.mark.parametrize("seeds", [3, 5])
def test_two_errors_of_few_seeds_are_exceeded_as_seldom_as_of_many(seeds):
    """By 4.6%, were there no difference and seeds alone at work."""
    exceeded, rng = 0, np.random.default_rng(0)
    for by_seed in rng.standard_normal((4000, seeds)):
        found = {"comparisons": {"C": {"A, masked": difference(by_seed.mean(), 0.0, by_seed.tolist())}}, "records": []}
        value, error = map(float, tables.against(found, "C", "A", "masked").split(" ± "))
        exceeded += abs(value) > 2 * error
    assert 0.03 < exceeded / 4000 < 0.06


def test_commands_that_differ_in_rows_are_one():
    assert tables.joined(["run --rows A --seeds 0", "run --rows B --seeds 0,1", "run --rows C,D --seeds 0"]) == [
        "run --rows A,C,D --seeds 0", "run --rows B --seeds 0,1"]


def test_a_row_that_two_commands_ran_is_named_once():
    assert tables.joined(["run --rows A,C --seeds 0", "run --rows C,D --seeds 0"]) == ["run --rows A,C,D --seeds 0"]


def test_a_second_reading_is_seen(results):
    results["records"][0]["readings"] = 2
    assert "C: L_act + L_rec (read 2 times)" in tables.main_table(results)


def test_parts_queries_cost_and_diagnostics(results):
    head, _, *lines = rows_of_table(tables.parts_table(results))
    assert head[1:] == ["HR@10, history of at most 4 (700)", "HR@200, history of at most 4 (700)",
                        "HR@10 against mix, history of at most 4 (700)"]
    assert lines[0][1:] == ["0.0800", "0.3800", "-"]
    assert lines[2][1:] == ["0.1250 ± 0.0071", "0.4250 ± 0.0071", "+0.0100 ± 0.0020 (1 of 2 seeds)"]
    assert tables.parts_table(results | {"requests": {"all": 700, "history of at most 4": 700, "rare": 20}}) == ""
    assert tables.queries_table(results) == ""
    asked = results | {"queries": True, "records": [record("A", 0, queries=True)]}
    assert rows_of_table(tables.queries_table(asked))[2][1:] == ["0.1000", "0.1000", "0.4000", "0.4000", "0.0500",
                                                               "0.0500"]
    costs = ["60", "20 ± 0", "100 ± 0", "3 ± 0", "2.00 ± 0.00"]
    assert rows_of_table(tables.cost_table(results))[2:] == [["A: L_act", *costs], ["C: L_act + L_rec", *costs]]
    head, _, line = rows_of_table(tables.diagnostics_table(results))
    assert line[head.index("effective rank of u")] == "30.000" and line[head.index("history sink")] == "-"
    del results["records"][-1]["diagnostics"]
    assert tables.diagnostics_table(results) == ""
    assert tables.cost_table(results | {"records": [record("popularity", 0)]}) == ""


def test_the_summary_takes_the_main_rows_and_the_full_size(results):
    other = results | {"size": "full", "records": [record("A", 0, 0.1)], "comparisons": {}}
    head, _, *lines = rows_of_table(tables.summary({"a": results, "v": results | {"on": "valid", "data": "ml-100k"}}))
    assert head[1:4] == ["beauty, REDUCED: seeds", "HR@10", "HR@200"]
    assert [line[0] for line in lines] == ["popularity", "A: L_act", "C: L_act + L_rec"]
    assert lines[2][1:] == ["2", "0.1250 ± 0.0071", "0.4250 ± 0.0071", "+0.0200, +0.0200", "+0.0200, +0.0200"]
    for files in ({"a": results, "b": other}, {"b": other, "a": results}):
        head, _, line = rows_of_table(tables.summary(files | {"m": results | {"data": "ml-100k", "records": []}}))
        assert head[1] == "beauty: seeds" and line == ["A: L_act", "1", "0.2000", "0.5000", "-", "-"]
    both = rows_of_table(tables.summary({"b": other, "m": results | {"data": "ml-100k"}}))
    assert both[2][1:6] == ["-"] * 5 and both[3][6] == "2"


def test_documents_are_filled_again_and_again(results, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "beauty-reduced-cpu.json").write_text(json.dumps(results))
    tried = results | {"on": "valid"}
    (tmp_path / "results" / "beauty-reduced-cpu-valid.json").write_text(json.dumps(tried))
    document = tmp_path / "page.md"
    document.write_text("Before\n<!-- quality:beauty-reduced -->\nold\n<!-- /quality -->\nbetween\n"
                        "<!-- quality:ml-100k-full --><!-- /quality -->\n<!-- quality:summary --><!-- /quality -->\n"
                        "<!-- quality:published -->\n<!-- /quality -->\nafter\n")
    words = [str(document), "--results", str(tmp_path / "results"), "--plots", str(tmp_path)]
    assert tables.main(words) == 0
    text = document.read_text()
    assert "old" not in text and text.startswith("Before\n") and text.endswith("after\n")
    assert text.count("REDUCED: tiny, 4bit, 60 steps of about 384 pairs") == 1  # not that of validation
    assert ("A CPU, 2 threads; torch 2.13.0, Python 3.11.7, peft 1; 2026-11-22:\n\n"
            "```\npython -m benchmarks.quality --data beauty --rows A\n```\n") in text
    assert "Not run yet: `python -m benchmarks.quality --data ml-100k --size full --seeds 0,1,2`" in text
    assert "| S3-Rec | 0.0387 |" in text and "| row | beauty, REDUCED: seeds |" in text
    assert [line for line in text.splitlines() if line.endswith(":")] == [
        "Seen items left out:", "Seen items kept:", "Parts of the requests:", "Cost:",
        "Diagnostics ([definitions](diagnostics.md)):",
        "A CPU, 2 threads; torch 2.13.0, Python 3.11.7, peft 1; 2026-11-22:"]
    assert "![HR@10 by row](quality-beauty-reduced-cpu.svg)" in text and "attention of one prompt" not in text
    assert tables.main(words) == 0 and document.read_text() == text
    assert (tmp_path / "quality-beauty-reduced-cpu.svg").read_text().startswith("<?xml")
    document.write_text("<!-- quality:beauty-reduced:main --><!-- /quality -->")
    with pytest.raises(SystemExit):
        tables.main(words)
    assert "DATA one of beauty, beauty-queries, ml-100k and SIZE one of reduced, full" in capsys.readouterr().err


def test_the_picture_shows_what_was_diagnosed(results, tmp_path):
    rows = tables.by_row(results)
    assert diagnosed_rows(rows, "u_effective_rank") == {"C": (30.0, pytest.approx(0.12))}  # of the same seed
    assert diagnosed_rows(rows, "history_sink") == {}
    assert plot(results, tmp_path / "a.svg") == "3 rows, 0 diagnostics"  # one point, or two, are no trend
    known = results["records"][-1]["diagnostics"]
    assert [r["row"] for r in results["records"] if "diagnostics" in r] == ["C"]
    for r in results["records"]:
        r["diagnostics"] = known
    assert plot(results, tmp_path / "a.svg") == "3 rows, 1 diagnostics"
    text = (tmp_path / "a.svg").read_text()
    plot(results, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == text  # nothing of the time


def test_maps_show_the_untuned_model_once_and_every_row(results, tmp_path):
    assert panels(results) == ([], {}) and plot_maps(results, tmp_path / "a.svg") is None
    before, after, other = [[1, 0], [0.9, 0.1]], [[1, 0], [0.5, 0.5]], [[1, 0], [0.2, 0.8]]
    of = {(r["row"], r["seed"]): r for r in results["records"]}
    of["A", 0]["attention"] = {"labels": ["a", "b"], "untuned": {"layer 1": before}, "trained": {"layer 1": after}}
    of["C", 0]["attention"] = of["A", 0]["attention"] | {"trained": {"layer 1": other}}
    of["C", 1]["attention"] = of["A", 0]["attention"]
    labels, found = panels(results)
    assert labels == ["a", "b"]
    assert {name: found[name]["layer 1"].tolist() for name in found} == {UNTUNED: before, "A": after, "C": other}
    assert plot_maps(results, tmp_path / "a.svg") == "3 maps of 1 layers, 2 positions"
    text = (tmp_path / "a.svg").read_text()
    plot_maps(results, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == text
    of["C", 0]["attention"], of["C", 1]["attention"] = {}, {"labels": ["b", "a"], "trained": {"layer 1": other}}
    assert list(panels(results)[1]) == [UNTUNED, "A"]  # another prompt's map is not put beside it


def test_published_figures_fit_their_columns():
    for name, values, where in FIGURES:
        assert len(values) == 6 and "https://github.com/" in where, name
        assert np.all(np.diff(values[0::2]) > 0) and np.all(np.array(values[1::2]) < np.array(values[0::2])), name
    assert not any(name in ("TIGER", "E4SRec", "ActionPiece", "IDGenRec") for name, _, _ in FIGURES)


def test_what_tuning_changed_stands_below_the_row():
    states = {"trained": {"u_effective_rank": {"value": 30.0}, "sink_first": {"value": 0.25}},
              "untuned": {"u_effective_rank": {"value": 20.0}}}
    diagnosed = record("A", 0) | {"diagnostics": {"states": states}}
    head, _, after, before = rows_of_table(tables.diagnostics_table({"records": [diagnosed]}))
    at = head.index("effective rank of u")
    assert (after[0], before[0]) == ("A: L_act", "A: L_act, language model before tuning")
    assert (after[at], before[at]) == ("30.000", "20.000")
    at = head.index("heads with a sink at the first token")
    assert (after[at], before[at]) == ("0.250", "-")
