"""The tables of `benchmarks.tables` for results of soft prompts."""

from __future__ import annotations

from ..tables import (
    OURS,
    about,
    best_alternative,
    compare,
    failures,
    mebibytes,
    milliseconds,
    not_measured,
    our_records,
    right,
    rows_of,
    time_of,
    verdict,
)

EXPLAINED = ("Times are medians of forward and backward together. The limit is the time of the operations at the "
             "speed of torch's own matrix product, or of the bytes that must be read or written at the speed of a "
             "copy, whichever is more; both speeds are of the same run. Memory is what is held at most beyond the "
             "inputs, prompt and gradients included; kept is what the forward leaves for the backward beyond the "
             "prompt.")


def label(record: dict) -> str:
    tokens = f", {record['num_tokens']} tokens a vector" if record["num_tokens"] > 1 else ""
    sizes = " × ".join(str(record[x]) for x in ("vectors", "width", "mid", "hidden"))
    return f"{sizes} {record['dtype']}{tokens}"


def kept(record: dict) -> str:
    return f"{record['kept_mib']:.3g}"


def fraction(record: dict) -> str:
    return f"{100 * record['limit_fraction']:.0f}%"


def device_table(results: dict) -> str:
    """Every case: ours against the best alternative that gives the right result."""
    table = [["vectors × in × mid × hidden", "ours, ms", "best alternative, ms", "ours is", "limit, ms",
              "of the limit", "ours, MiB", "its MiB", "ours keeps, MiB", "it keeps"]]
    slower = []
    for r in our_records(results):
        other = best_alternative(results, r["case"])
        if "slower" in compare(r, other):
            slower.append(label(r))
        table.append([label(r), milliseconds(r),
                      f"{milliseconds(other)} ({other['implementation']})" if other else "-", compare(r, other),
                      f"{r['limit_ms']:.3g}", fraction(r), mebibytes(r), mebibytes(other) if other else "-", kept(r),
                      kept(other) if other else "-"])
    return f"{about(results)}\n\n{rows_of(table)}\n\n{verdict(slower, len(table) - 1)} {EXPLAINED}"


def worst(record: dict) -> str:
    """Errors of the prompt and, at most, of a gradient."""
    prompt, *gradients = record["errors"].values()
    largest = None if None in gradients else max(gradients)
    return ", ".join("NaN" if e is None else f"{e:.1e}" for e in (prompt, largest))


def case_table(results: dict, case: str) -> str:
    """Everything on one case, fastest first, then what is missing and why."""
    records = [r for r in results["records"] if r["case"] == case]
    timed = sorted((r for r in records if "total_ms" in r), key=time_of)
    best = best_alternative(results, case)
    table = [["implementation", "forward, ms", "backward, ms", "both, ms", "20th to 80th percentile",
              "over the best alternative", "of the limit", "MiB", "keeps, MiB", "error of prompt, gradients"]]
    for r in timed:
        ratio = "wrong result" if r["status"] == "wrong" else f"{time_of(r) / time_of(best):.2f}" if best else "-"
        table.append([r["implementation"], *(f"{r[f'{part}_ms']['median']:.3g}" for part in ("forward", "backward")),
                      milliseconds(r), f"{r['total_ms']['p20']:.3g} to {r['total_ms']['p80']:.3g}", ratio, fraction(r),
                      mebibytes(r), kept(r), worst(r)])
    text = [f"Operations take {r['flops_ms']:.3g} ms at least, reading and writing {r['bytes_ms']:.3g} ms."
            for r in timed[:1]]
    own = next((r for r in timed if r["implementation"] == OURS and right(r)), None)
    text.append(f"Ours (auto) against the best alternative: {compare(own, best)}." if own else "Ours has no result.")
    return "\n\n".join([f"{label(records[0])}. {about(results, case)}", rows_of(table), " ".join([*text, EXPLAINED]),
                        *not_measured(records)])


def short_table(results: dict) -> str:
    """For a terminal: a line for each case."""
    lines = [f"{results['machine']['name']}, torch {results['machine']['torch']}",
             f"{'vectors x in x mid x hidden':<34} {'ms':>9} {'% limit':>7} {'MiB':>8} {'keeps':>8}  against the best "
             "alternative"]
    for r in our_records(results):
        other = best_alternative(results, r["case"])
        against = f"{compare(r, other).strip('*')}" + (f" ({other['implementation']})" if other else "")
        lines.append(f"{r['case']:<34} {milliseconds(r):>9} {fraction(r):>7} {mebibytes(r):>8} {kept(r):>8}  "
                     f"{against}")
    return "\n".join(lines + failures(results))
