"""Results of the experiment to Markdown tables and pictures: ``python -m benchmarks.quality.tables``.

A document holds a pair of comments, ``<!-- quality:DATA-SIZE -->`` and ``<!-- /quality -->``; what is between them is
replaced by the tables and pictures of every device that there are results of. ``<!-- quality:summary -->`` holds the
main rows of all data sets, ``<!-- quality:published -->`` the figures of others.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
from scipy.special import stdtrit

from .. import RESULTS, ROOT
from ..tables import rows_of
from . import published
from .protocol import HISTORY_ONLY
from .results import REFERENCES
from .rows import ROWS, Row
from .settings import DATA, Size

BLOCK = re.compile(r"(<!-- quality:(?P<name>\S+) -->).*?(<!-- /quality -->)", re.DOTALL)
METRICS = ("HR@10", "HR@50", "HR@200", "NDCG@10", "MRR")
SUMMARISED = ("beauty", "ml-100k")
MAIN_ROWS = ("popularity", "mix", "sasrec", "no-llm", "frozen", "random", "A", "C", "D", "H", "ra-rec-ids", "ra-rec")
SMALLEST_PART = 50  # requests; of fewer a share says nothing
# column -> entry of karma_fast.diagnostics
DIAGNOSTICS = {"heads with a sink at the first token": "sink_first", "first token receives": "first_received",
               "history sink": "history_sink", "barcode": "barcode",
               "effective rank of u": "u_effective_rank", "mean cosine of u": "u_mean_cosine",
               "effective rank of e": "e_effective_rank", "mean cosine of e": "e_mean_cosine",
               "perplexity ratio": "perplexity_ratio", "attribute probe of u": "u_attributes_probe_recall@10",
               "of shuffled u": "u_shuffled_attributes_probe_recall@10",
               "title probe of u": "u_title_probe_recall@10",
               "title probe of shuffled u": "u_shuffled_title_probe_recall@10",
               "fresh decoder, own u": "decoder_matched", "another's u": "decoder_shuffled",
               "the mean u": "decoder_mean", "own u better": "decoder_own_better",
               "JS@50": "attributes_js@50"}


def by_row(results: dict[str, Any]) -> dict[str, list[dict]]:
    """row -> its records by seed, in the order of `rows.ROWS`."""
    found: dict[str, list[dict]] = {}
    for name in ROWS:
        records = sorted((r for r in results["records"] if r["row"] == name), key=lambda r: r["seed"])
        if records:
            found[name] = records
    return found


def spread(values: list[float], digits: int = 4) -> str:
    """Mean, and the standard deviation over seeds where there are several.

    >>> spread([0.1, 0.2]), spread([0.1])
    ('0.1500 ± 0.0707', '0.1000')
    """
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def values_of(records: list[dict], variant: str, part: str, metric: str) -> list[float]:
    return [r["metrics"][variant][part][metric] for r in records if part in r["metrics"].get(variant, {})]


def title_of(row: Row) -> str:
    """As a first column: the row's letter and what it is."""
    return f"{row.name}: {row.label}" if row.kind == "karma" else row.label


def name_of(records: list[dict]) -> str:
    read = max(r["readings"] for r in records)
    return title_of(ROWS[records[0]["row"]]) + (f" (read {read} times)" if read > 1 else "")


def seeds_of(records: list[dict]) -> str:
    return str(len(records)) if ROWS[records[0]["row"]].seeded else "-"


def against(results: dict, row: str, other: str, variant: str, metric: str = "HR@10") -> str:
    """Difference to another row and its standard error over requests and, with several seeds of both, over seeds.

    The two errors are of different causes, so their squares add up (which counts what both vary with twice, on the
    safe side). Few seeds tell their own spread badly: their part grows as Student's t has it, so that two errors mean
    what they mean of many. Of two seeds that would say nothing, so both differences are given. Where the row has seeds
    that the other has not, the entry says how many were set side by side.
    """
    found = results["comparisons"].get(row, {}).get(f"{other}, {variant}")
    if found is None:
        return "-"
    entry = found[metric]
    error, seeds = entry["standard_error"] or 0.0, entry["by_seed"]
    own = sum(r["row"] == row for r in results["records"])
    paired = f" ({len(seeds)} of {own} seeds)" if len(seeds) < own else ""
    if len(seeds) == 2:
        return ", ".join(f"{value:+.4f}" for value in seeds) + paired
    if len(seeds) > 2:
        over_seeds = stdtrit(len(seeds) - 1, 0.975) / 1.96 * np.std(seeds, ddof=1) / np.sqrt(len(seeds))
        error = float(np.hypot(error, over_seeds))
    return f"{entry['difference']:+.4f} ± {error:.4f}{paired}"


def main_table(results: dict, variant: str = "masked") -> str:
    table = [["row", "seeds", *METRICS, "HR@10 against mix", "HR@10 against A", "HR@200 against A",
              "HR@10 against another row"]]
    for name, records in by_row(results).items():
        parent = records[0]["parent"]
        cells = [values_of(records, variant, "all", metric) for metric in METRICS]
        if all(cells):
            table.append([name_of(records), seeds_of(records), *map(spread, cells),
                          against(results, name, "mix", variant), against(results, name, "A", variant),
                          against(results, name, "A", variant, "HR@200"),
                          "-" if parent in ("", *REFERENCES) else
                          f"{title_of(ROWS[parent])}: {against(results, name, parent, variant)}"])
    return rows_of(table)


def summary(files: dict[str, dict]) -> str:
    """The main rows of every data set that has results, those of full size if there are any."""
    best: dict[str, dict] = {}
    for results in files.values():
        data, size = results["data"], results["size"]
        if results["on"] == "test" and results["records"] and (data not in best or size == "full"):
            best[data] = results
    best = {data: best[data] for data in SUMMARISED if data in best}
    table = [["row", *(column for data, results in best.items() for column in (
        f"{data}{', REDUCED' * (results['size'] == 'reduced')}: seeds", "HR@10", "HR@200", "HR@10 against A",
        "HR@200 against A"))]]
    for row in MAIN_ROWS:
        cells = [cell for results in best.values() for cell in summary_cells(results, row)]
        if any(cell != "-" for cell in cells):
            table.append([title_of(ROWS[row]), *cells])
    return rows_of(table)


def summary_cells(results: dict, row: str) -> list[str]:
    records = by_row(results).get(row)
    if not records:
        return ["-"] * 5
    metrics = ("HR@10", "HR@200")
    return [seeds_of(records), *(spread(values_of(records, "masked", "all", metric)) for metric in metrics),
            *(against(results, row, "A", "masked", metric) for metric in metrics)]


def parts_table(results: dict, variant: str = "masked") -> str:
    """HR@10 and HR@200 of the parts of the requests, and HR@10 against the mix; parts of few or of all left out."""
    sizes = {part: n for part, n in results["requests"].items() if SMALLEST_PART <= n < results["requests"]["all"]}
    if not sizes:
        return ""
    table = [["row", *(f"{metric}, {part} ({n:,})" for part, n in sizes.items()
                       for metric in ("HR@10", "HR@200", "HR@10 against mix"))]]
    for name, records in by_row(results).items():
        table.append([name_of(records), *(cell for part in sizes for cell in (
            spread(values_of(records, variant, part, "HR@10")), spread(values_of(records, variant, part, "HR@200")),
            against(results, name, "mix", f"{variant}, {part}")))])
    return rows_of(table)


def queries_table(results: dict) -> str:
    """With the query and without it, by the same model."""
    if not results["queries"]:
        return ""
    table = [["row", *(f"{metric}, {how}" for metric in ("HR@10", "HR@200", "NDCG@10")
                       for how in ("query and history", "history alone"))]]
    for records in by_row(results).values():
        table.append([name_of(records), *(spread(values_of(records, variant, "all", metric)) for metric in
                                          ("HR@10", "HR@200", "NDCG@10") for variant in
                                          ("masked", "masked" + HISTORY_ONLY))])
    return rows_of(table)


def cost_table(results: dict) -> str:
    """Of the rows that were trained; "" if none was."""
    table = [["row", "steps", "start, s", "training, s", "ranking, s", "peak memory, GB"]]
    for records in by_row(results).values():
        if "train_seconds" in records[0]:
            peaks = [r["peak_bytes"] / 1e9 for r in records if "peak_bytes" in r]
            starts = [r["start_seconds"] for r in records if "start_seconds" in r]
            table.append([name_of(records), str(records[0].get("steps", "-")),
                          spread(starts, 0) if starts else "-",
                          spread([r["train_seconds"] for r in records], 0),
                          spread([r["ranking_seconds"] for r in records], 0), spread(peaks, 2) if peaks else "-"])
    return rows_of(table) if len(table) > 1 else ""


def diagnosed(record: dict, entry: str, state: str = "trained") -> float | None:
    """A value of karma_fast.diagnostics, None where there is none. state: trained or untuned."""
    found = record.get("diagnostics", {}).get("states", {}).get(state, {}).get(entry, {})
    return found.get("value") if isinstance(found, dict) else None


def diagnostics_table(results: dict) -> str:
    """Of the rows that were diagnosed, by their means over seeds; "" if none was.

    Below a row, where it was measured, what the language model before tuning gives between the same projections.
    """
    table = [["row", *DIAGNOSTICS]]
    for records in by_row(results).values():
        for state, what in (("trained", ""), ("untuned", ", language model before tuning")):
            cells = [[v for r in records if (v := diagnosed(r, entry, state)) is not None]
                     for entry in DIAGNOSTICS.values()]
            if any(cells):
                table.append([name_of(records) + what, *(spread(cell, 3) if cell else "-" for cell in cells)])
    return rows_of(table) if len(table) > 1 else ""


# caption -> table; one without rows is left out
PARTS = {"Seen items left out": main_table, "With the query and without it, by the same model": queries_table,
         "Seen items kept": lambda results: main_table(results, "unmasked"), "Parts of the requests": parts_table,
         "Cost": cost_table, "Diagnostics ([definitions](diagnostics.md))": diagnostics_table}


def joined(commands: list[str]) -> list[str]:
    """Commands that differ in their rows alone as one, each row once.

    >>> joined(["run --rows A --seeds 0", "run --rows B --seeds 0,1", "run --rows A,C --seeds 0"])
    ['run --rows A,C --seeds 0', 'run --rows B --seeds 0,1']
    """
    rows: dict[tuple[str, str], dict[str, None]] = {}  # a set that keeps its order
    for command in commands:
        before, found, after = re.match(r"(.*--rows )(\S+)(.*)", command).groups()
        rows.setdefault((before, after), {}).update(dict.fromkeys(found.split(",")))
    return [before + ",".join(found) + after for (before, after), found in rows.items()]


def about(results: dict) -> str:
    """Which model and protocol a table is of."""
    model, reduced = results["settings"]["model"], "REDUCED: " if results["size"] == "reduced" else ""
    steps = results["settings"]["training"]
    length = f"{steps['max_steps']} steps" if "max_steps" in steps else f"{steps['num_train_epochs']:g} epochs"
    return (f"{reduced}{model['backbone']}, {model['quantization']}, {length} of about {steps['batch_size']} pairs, "
            f"decode_weight {model['decode_weight']:g}. {results['protocol']}.")


def made_by(results: dict) -> str:
    """Which machine, versions, date and commands a table is of."""
    machine = results["machine"]
    versions = [f"torch {machine['torch']}", f"Python {machine['python']}",
                *(f"{name} {version}" for name, version in machine["libraries"].items())]
    commands = "\n".join(joined(results["commands"]))
    return f"{machine['name']}; {', '.join(versions)}; {results['date'][:10]}:\n\n```\n{commands}\n```"


def shown(results: dict, pictures: dict[str, str]) -> str:
    """All there is of one results file. pictures: alternative text -> file beside the document."""
    tables = {caption: part(results) for caption, part in PARTS.items()}
    return "\n\n".join([about(results), *(f"![{text}]({file})" for text, file in pictures.items()),
                        *(f"{caption}:\n\n{table}" for caption, table in tables.items() if table), made_by(results)])


def table_for(name: str, files: dict[str, dict], pictures: dict[str, dict[str, str]]) -> str:
    """What belongs between one pair of comments."""
    if name == "published":
        return published.table()
    if name == "summary":
        return summary(files)
    data, _, size = name.rpartition("-")
    if data not in DATA or size not in get_args(Size):
        raise ValueError(f"quality:{name}: summary, published or DATA-SIZE is needed, with DATA one of "
                         f"{', '.join(DATA)} and SIZE one of {', '.join(get_args(Size))}")
    found = {stem: r for stem, r in files.items()
             if (r["data"], r["size"], r["on"]) == (data, size, "test") and r["records"]}
    if not found:
        return f"Not run yet: `python -m benchmarks.quality --data {data} --size {size} --seeds 0,1,2` fills this in."
    return "\n\n".join(shown(results, pictures.get(stem, {})) for stem, results in found.items())


def fill(text: str, files: dict[str, dict], pictures: dict[str, dict[str, str]]) -> str:
    """The document with everything between its comments made anew. pictures: by results file."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{table_for(m['name'], files, pictures)}\n{m[3]}", text)


def draw_all(files: dict[str, dict], folder: Path) -> dict[str, dict[str, str]]:
    """Every picture that there are results for: results file -> alternative text -> file name."""
    from .maps import plot_maps
    from .plots import plot

    pictures: dict[str, dict[str, str]] = {}
    for stem, results in files.items():
        if results["on"] != "test" or not results["records"]:
            continue
        for text, draw, name in (("HR@10 by row", plot, f"quality-{stem}.svg"),
                                 ("attention of one prompt, adapters off and on", plot_maps,
                                  f"quality-{stem}-attention.svg")):
            if said := draw(results, folder / name):
                print(f"{folder / name}: {said}")
                pictures.setdefault(stem, {})[text] = name
    return pictures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.tables", description=__doc__.split("\n\n")[0])
    parser.add_argument("documents", nargs="*", type=Path, default=[ROOT / "docs" / "quality.md"])
    parser.add_argument("--results", type=Path, default=RESULTS / "quality", metavar="FOLDER")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs", metavar="FOLDER",
                        help="pictures go here, quality-<results file>.svg; the documents' folder, as they name them")
    args = parser.parse_args(arguments)
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.results.glob("*.json"))}
    try:
        pictures = draw_all(files, args.plots)
        for path in args.documents:
            path.write_text(fill(path.read_text(encoding="utf-8"), files, pictures), encoding="utf-8")
            print(path)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
