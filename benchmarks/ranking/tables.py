"""The tables of `benchmarks.tables` for results of ranking."""

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
    right,
    rows_of,
    time_of,
    verdict,
)

PACKING, EARLY, LIST = "karma auto, packing included", "karma auto, early stop", "karma top_k"
FAISS = "faiss IndexFlatIP"
EXPLAINED = ("Every time is that of HR@1, 10 and 200 over the whole catalogue with up to 50 seen items a query left "
             "out, median of calls {calls}. Shares of the peak count 2 · queries · items · width operations, whatever "
             "was saved of them, over torch's own matrix product. Memory is what {holder} held at most beyond the "
             "inputs{packed}. Hits are compared with float64 on up to 64 queries, our counts one by one.")
ON = {"cpu": {"calls": "in turn; packing and building an index are apart", "holder": "the process",
              "packed": ", the packed catalogue included"},
      "cuda": {"calls": "with queries and items on the GPU, the lists of seen items and the hits on the host",
               "holder": "torch's allocator", "packed": ""}}


def explained(results: dict) -> str:
    return EXPLAINED.format(**ON[results["machine"]["device"]])


def of_case(results: dict, case: str) -> dict[str, dict]:
    """{implementation: record} of those that were timed."""
    return {r["implementation"]: r for r in results["records"] if r["case"] == case and "total_ms" in r}


def cases_of(results: dict) -> list[str]:
    return list(dict.fromkeys(r["case"] for r in results["records"]))


def label(record: dict) -> str:
    dtype = record.get("dtype", "float32")
    more = ((record["kind"], record["kind"] == "untrained"), (dtype, dtype != "float32"),
            ("all items ranked", not record.get("seen", True)))
    shape = f"{record['queries']:,} × {record['items']:,} × {record['width']}"
    return ", ".join([shape, *(text for text, said in more if said)])


def ours_of(found: dict[str, dict]) -> dict | None:
    """With the catalogue packed beforehand; where that did not run, with packing."""
    return next((found[name] for name in (OURS, PACKING) if name in found and right(found[name])), None)


def size(record: dict) -> str:
    return "-" if record.get("memory_mib") is None else mebibytes(record)


def packing(record: dict) -> str:
    return "-" if record["pack_ms"] is None else f"{record['pack_ms']:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def per_second(record: dict) -> str:
    return f"{record['queries_per_second']:,.0f}"


def against(record: dict | None, other: dict | None) -> str:
    return compare(record, other) if record and right(record) and other else "-"


def filled(table: list[list[str]]) -> list[list[str]]:
    """Without the columns that hold nothing but dashes, as those on faiss where it did not run."""
    kept = [at for at in range(len(table[0])) if len(table) == 1 or any(line[at] != "-" for line in table[1:])]
    return [[line[at] for at in kept] for line in table]


def ranks_table(results: dict) -> tuple[list[list[str]], list[str]]:
    """Ours against the best exact alternative and against faiss; and the cases where ours is slower."""
    table = [["queries × items × width", "HR@200", "ours, ms", "best exact alternative, ms", "ours is", "than faiss",
              "queries/s", "of fp32 peak", "of bf16 peak", "packing, ms", "ours, MiB", "its MiB"]]
    slower = []
    for case in cases_of(results):
        found = of_case(results, case)
        r, other = ours_of(found), best_alternative(results, case)
        if r is None:
            continue
        name = label(r) + (" (packing included)" if r["implementation"] == PACKING else "")
        faiss = found.get(FAISS)
        if "slower" in compare(r, other):
            slower.append(name)
        table.append([name, f"{r['hit_rate']['200']:.2f}", milliseconds(r),
                      f"{milliseconds(other)} ({other['implementation']})" if other else "-", compare(r, other),
                      against(r, faiss if faiss and right(faiss) else None), per_second(r),
                      percent(r["peak_fraction"]), percent(r["bf16_peak_fraction"]), packing(r), size(r),
                      size(other) if other else "-"])
    return table, slower


def variants_table(results: dict) -> tuple[list[list[str]], list[str]]:
    """Packing within the time, early stop, and lists instead of counts, each against what it competes with; and the
    cases where ours is slower with packing."""
    table = [["queries × items × width", "packing included, ms", "over the best alternative", "early stop, ms",
              "over all counts", "first 200, ms", "over faiss's"]]
    slower = []
    for case in cases_of(results):
        found, other = of_case(results, case), best_alternative(results, case)
        rows = [found.get(name) for name in (PACKING, EARLY, LIST)]
        faiss = found.get(FAISS)
        rivals = [other, ours_of(found), faiss if faiss and right(faiss) else None]
        if any(r and right(r) for r in rows):
            some = next(r for r in rows if r)
            cells = [cell for r, rival in zip(rows, rivals, strict=True)
                     for cell in (milliseconds(r) if r and right(r) else "-", against(r, rival))]
            table.append([label(some), *cells])
            if "slower" in cells[1]:
                slower.append(label(some))
    return table, slower


def summary_table(results: dict) -> str:
    """The same in one table, for a page that has others."""
    table = [["queries × items × width", "ours, ms", "best exact alternative, ms", "ours is", "than faiss",
              "of fp32 peak", "packing, ms", "packing included"]]
    for case in cases_of(results):
        found, other = of_case(results, case), best_alternative(results, case)
        r, faiss = ours_of(found), found.get(FAISS)
        if r is not None:
            table.append([label(r), milliseconds(r), f"{milliseconds(other)} ({other['implementation']})" if other
                          else "-", compare(r, other), against(r, faiss if faiss and right(faiss) else None),
                          percent(r["peak_fraction"]), packing(r), against(found.get(PACKING), other)])
    return "\n\n".join([about(results), rows_of(filled(table)), explained(results)])


def device_table(results: dict) -> str:
    (ranks, slower), (variants, slower_packing) = ranks_table(results), variants_table(results)
    text = [verdict(slower, len(ranks) - 1)]
    if slower_packing:
        text.append(f"With packing in the time it is slower at: {'; '.join(slower_packing)}.")
    parts = [rows_of(filled(table)) for table in (ranks, variants) if table is ranks or len(table) > 1]
    return "\n\n".join([about(results), *parts, " ".join([*text, explained(results)])])


def exactness(record: dict) -> str:
    """What the comparison with float64 gave."""
    errors = record["errors"]
    if record["status"] == "wrong":
        return "wrong result"
    if record["status"] == "inexact":
        every = "all_hits_differ" in errors
        differ = errors["all_hits_differ" if every else "hits_differ"]["10"]
        return f"not exact, {differ} of {record['queries'] if every else errors['hits_sure']['10']} hits at 10 differ"
    return "hits exact" if errors["ranks_differ"] is None else "counts exact"


def case_table(results: dict, case: str) -> str:
    """Everything on one case, fastest first, then what is missing and why."""
    timed = sorted(of_case(results, case).values(), key=time_of)
    best = best_alternative(results, case)
    table = [["implementation", "ms", "20th to 80th percentile", "over the best exact alternative", "preparing, ms",
              "queries/s", "GFLOP/s", "of fp32 peak", "of bf16 peak", "MiB", "batch", "HR@1, 10, 200", "checked"]]
    for r in timed:
        spread = f"{r['total_ms']['p20']:.3g} to {r['total_ms']['p80']:.3g}"
        name = r["implementation"] + (f" ({', '.join(r['paths'])})" if r.get("paths") else "")
        table.append([name, milliseconds(r), spread,
                      f"{time_of(r) / time_of(best):.2f}" if best and right(r) else "-", packing(r),
                      per_second(r), f"{r['gflops']:.0f}", percent(r["peak_fraction"]),
                      percent(r["bf16_peak_fraction"]), size(r), str(min(r["batch"], r["queries"])),
                      ", ".join(f"{rate:.3f}" for rate in r["hit_rate"].values()), exactness(r)])
    records = [r for r in results["records"] if r["case"] == case]
    own = ours_of({r["implementation"]: r for r in timed})
    text = f"Ours against the best exact alternative: {compare(own, best)}." if own else "Ours has no result."
    return "\n\n".join([f"{label(records[0])}. {about(results, case)}", rows_of(filled(table)),
                        f"{text} {explained(results)}", *not_measured(records)])


def short_table(results: dict) -> str:
    """For a terminal: a line for each case."""
    lines = [f"{results['machine']['name']}, torch {results['machine']['torch']}",
             f"{'case':<36} {'ms':>9} {'% fp32':>6} {'MiB':>8}  against the best exact alternative"]
    for case in cases_of(results):
        r, other = ours_of(of_case(results, case)), best_alternative(results, case)
        if r is not None:
            text = compare(r, other).strip("*") + (f" ({other['implementation']})" if other else "")
            lines.append(f"{case:<36} {milliseconds(r):>9} {100 * r['peak_fraction']:>5.0f}% {size(r):>8}  {text}")
    return "\n".join(lines + failures(results))
