"""Results files to Markdown tables and plots: ``python -m benchmarks.tables``.

A document holds a pair of comments, ``<!-- benchmark:NAME -->`` and ``<!-- /benchmark -->``; what is between them is
replaced by the table. NAME is that of a results file without .json, for all its cases with the best alternative to
each, or FILE:CASE, for everything that was measured on one case. Of ranking there is FILE:short, with fewer columns.
Files of training steps need the packages that steps need.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

from . import RESULTS, ROOT

SHORT = "short"
KINDS = ("ranking", "soft_prompt", "step")  # besides info_nce; each has a folder with its own tables
OURS, MINE = "karma auto", "karma "
BLOCK = re.compile(r"(<!-- benchmark:(?P<name>\S+) -->).*?(<!-- /benchmark -->)", re.DOTALL)


def right(record: dict) -> bool:
    return record["status"] == "ok" and "total_ms" in record


def time_of(record: dict) -> float:
    return record["total_ms"]["median"]


def best_alternative(results: dict, case: str) -> dict | None:
    """The fastest one that is not ours and not wrong."""
    found = [r for r in results["records"]
             if r["case"] == case and right(r) and not r["implementation"].startswith(MINE)]
    return min(found, key=time_of, default=None)


def our_records(results: dict) -> list[dict]:
    """Those of the default backend, one for each case and workspace."""
    return [r for r in results["records"] if r["implementation"].startswith(OURS) and right(r)]


def compare(ours: dict, other: dict | None) -> str:
    """1.80x faster, or how much slower."""
    if other is None:
        return "no alternative ran"
    ratio = time_of(other) / time_of(ours)
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"**{1 / ratio:.2f}x slower**"


def milliseconds(record: dict) -> str:
    return f"{time_of(record):.3g}" if time_of(record) < 100 else f"{time_of(record):.0f}"


def mebibytes(record: dict) -> str:
    return f"{record['memory_mib']:.3g}" if record["memory_mib"] < 100 else f"{record['memory_mib']:.0f}"


def label(record: dict) -> str:
    """Shape and flags for a reader."""
    shape = "² × ".join(str(record[x]) for x in ("rows", "width")) if record["rows"] == record["keys"] else \
        " × ".join(str(record[x]) for x in ("rows", "keys", "width"))
    names = {"symmetric": "both directions", "ids": "id mask", "log_q": "logQ"}
    return ", ".join([f"{shape} {record['dtype']}", *(text for flag, text in names.items() if record[flag])])


def rows_of(table: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are numbers or short."""
    head, *rest = table
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def about(results: dict, case: str | None = None) -> str:
    """Machine, versions, and the commands that measured all cases, or this one."""
    machine = results["machine"]
    commands = dict.fromkeys(r.get("command", results["command"]) for r in results["records"]
                             if case in (None, r["case"])) or [results["command"]]
    versions = [f"torch {machine['torch']}", f"Triton {machine['triton']}" if machine.get("triton") else "no Triton",
                f"Python {machine['python']}"] + [f"{k} {v}" for k, v in machine.get("libraries", {}).items()]
    peaks = [f"{flops / 1e12:.3g} TFLOP/s {dtype}" for dtype, flops in results["peak_flops"].items()]
    copy = results["copy_bytes_per_second"]
    measured = ", ".join(peaks + ([f"{copy / 1e9:.0f} GB/s copying"] if copy else []))
    return (f"{machine['name']}; {', '.join(versions)}; {results['date'][:10]}; "
            f"{'; '.join(f'`{command}`' for command in commands)}. Measured in the same run: {measured}.")


def device_table(results: dict) -> str:
    """Every case: ours against the best alternative that gives the right result."""
    table = [["queries × keys × width", "ours, ms", "best alternative, ms", "ours is", "ours, MiB", "its MiB",
              "of matmul peak"]]
    slower = []
    for r in our_records(results):
        other = best_alternative(results, r["case"])
        text = compare(r, other)
        name = label(r) + (f", {r['workspace_mib']} MiB workspace" if r["implementation"] != OURS else "")
        if "slower" in text:
            slower.append(name)
        table.append([name, milliseconds(r), f"{milliseconds(other)} ({other['implementation']})" if other else "-",
                      text, mebibytes(r), mebibytes(other) if other else "-", f"{100 * r['peak_fraction']:.0f}%"])
    return f"{about(results)}\n\n{rows_of(table)}\n\n{verdict(slower, len(table) - 1)} {EXPLAINED}"


def verdict(slower: list[str], cases: int) -> str:
    """Where ours is slower, of so many cases with a result."""
    return "Ours is slower at: " + "; ".join(slower) + "." if slower else \
        "Ours is the fastest in every case." if cases else "No case has a result."


EXPLAINED = ("Times are medians of forward and backward together. Memory is what is held at most beyond the inputs, "
             "their gradients included.")


def case_table(results: dict, case: str) -> str:
    """Everything on one case, fastest first, then what is wrong or missing and why."""
    records = [r for r in results["records"] if r["case"] == case]
    timed = sorted((r for r in records if "total_ms" in r), key=time_of)
    best = best_alternative(results, case)
    table = [["implementation", "forward, ms", "backward, ms", "both, ms", "20th to 80th percentile",
              "over the best alternative", "MiB", "of matmul peak", "error of loss, dQ, dK"]]
    for r in timed:
        ratio = "wrong result" if r["status"] == "wrong" else f"{time_of(r) / time_of(best):.2f}" if best else "-"
        table.append([r["implementation"], *(f"{r[f'{part}_ms']['median']:.3g}" for part in ("forward", "backward")),
                      milliseconds(r), f"{r['total_ms']['p20']:.3g} to {r['total_ms']['p80']:.3g}", ratio,
                      mebibytes(r), f"{100 * r['peak_fraction']:.0f}%",
                      ", ".join("NaN" if e is None else f"{e:.1e}" for e in r["errors"].values())])
    own = next((r for r in timed if r["implementation"] == OURS and right(r)), None)
    text = f"Ours (auto) against the best alternative: {compare(own, best)}." if own else "Ours has no result."
    return "\n\n".join([f"{label(records[0])}. {about(results, case)}", rows_of(table), f"{text} {EXPLAINED}",
                        *not_measured(records)])


def not_measured(records: list[dict]) -> list[str]:
    """One sentence, or none; those with the same reason together."""
    names: dict[str, list[str]] = {}
    for r in records:
        if "total_ms" not in r and "reason" in r:
            names.setdefault(r["reason"], []).append(r["implementation"])
    missing = [f"{' and '.join(who)}: {reason}" for reason, who in names.items()]
    return ["Not measured: " + "; ".join(missing) + "."] if missing else []


def short_table(results: dict) -> str:
    """For a terminal: a line for each case."""
    lines = [f"{results['machine']['name']}, torch {results['machine']['torch']}",
             f"{'case':<34} {'ms':>9} {'% peak':>6} {'MiB':>8}  against the best alternative"]
    for r in our_records(results):
        other = best_alternative(results, r["case"])
        name = r["case"] + (f" {r['workspace_mib']} MiB" if r["implementation"] != OURS else "")
        against = f"{compare(r, other).strip('*')}" + (f" ({other['implementation']})" if other else "")
        lines.append(f"{name:<34} {milliseconds(r):>9} {100 * r['peak_fraction']:>5.0f}% {mebibytes(r):>8}  {against}")
    return "\n".join(lines + failures(results))


def failures(results: dict) -> list[str]:
    """For a terminal: what is wrong, raised or was not reached."""
    lines = [f"{r['status']}: {r['case']} {r['implementation']} {r.get('reason', '')}".rstrip()
             for r in results["records"] if r["status"] in ("wrong", "error")]
    skipped = {r["case"]: None for r in results["records"] if r["status"] == "skipped"}
    return lines + ([f"skipped for time: {', '.join(skipped)}"] if skipped else [])


def kind_of(results: dict) -> str:
    """Which benchmark a file is of: info_nce or one of KINDS."""
    return results.get("benchmark", "info_nce")


def table_for(name: str, files: dict[str, dict]) -> str:
    """What belongs between the comments of that name; ValueError if there is no such thing."""
    file, _, case = name.partition(":")
    if file not in files:
        raise ValueError(f"benchmark:{name}: there is no results file {file}.json; there are {sorted(files)}")
    kind, of_device, of_case = kind_of(files[file]), device_table, case_table
    if kind in KINDS:
        own = importlib.import_module(f"{__package__}.{kind}.tables")  # made of the functions above
        of_device, of_case = own.device_table, own.case_table
    elif kind != "info_nce":
        raise ValueError(f"benchmark:{name}: {file}.json is of {kind!r}; there are info_nce, {', '.join(KINDS)}")
    if not case:
        return of_device(files[file])
    if case == SHORT and kind == "ranking":
        return own.summary_table(files[file])
    cases = list(dict.fromkeys(r["case"] for r in files[file]["records"]))
    if case not in cases:
        raise ValueError(f"benchmark:{name}: {file}.json has no such case; it has {cases}")
    return of_case(files[file], case)


def fill(text: str, files: dict[str, dict]) -> str:
    """The document with every table between its comments made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{table_for(m['name'], files)}\n{m[3]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n\n")[0])
    parser.add_argument("documents", nargs="*", type=Path, default=[ROOT / "README.md"])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "info_nce.svg", metavar="FILE")
    parser.add_argument("--plot-of", metavar="NAME", help="results file of the loss; default one of a GPU")
    parser.add_argument("--plot-ranking", type=Path, default=ROOT / "docs" / "ranking.svg", metavar="FILE")
    args = parser.parse_args(arguments)
    files = {path.stem: json.loads(path.read_text()) for path in sorted(args.results.glob("*.json"))}
    if not files:
        parser.error(f"{args.results} holds no results; python -m benchmarks.run writes them")
    losses = {name: results for name, results in files.items() if kind_of(results) == "info_nce"}
    rankings = [results for results in files.values() if kind_of(results) == "ranking"]
    if args.plot_of is not None and args.plot_of not in losses:
        parser.error(f"--plot-of: there is no results file {args.plot_of}.json; there are {sorted(losses)}")
    from .plot import plot, plot_ranking

    gpus = [name for name, results in losses.items() if results["machine"]["device"] == "cuda"]
    try:
        for path in args.documents:
            path.write_text(fill(path.read_text(encoding="utf-8"), files), encoding="utf-8")
        if losses:
            print(f"{args.plot}: {plot(losses[args.plot_of or next(iter(gpus or losses))], args.plot)}")
        if rankings:
            print(f"{args.plot_ranking}: {plot_ranking(rankings[0], args.plot_ranking)}")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
