"""The tables of `benchmarks.tables` for results of training steps."""

from __future__ import annotations

from karma_fast.data.windows import negatives_of

from ..tables import about, failures, mebibytes, milliseconds, not_measured, right, rows_of, time_of
from .cases import DEMO, OURS

EXPLAINED = ("A step is forward, backward, clipping and optimiser on a batch that is ready; its time is the median of "
             "steps {taken}. Both sides take the same windows with the same weights; terms and gradients of their "
             "losses are compared. Memory is all that torch held at most, weights and optimiser states included. The "
             "limit counts the operations of the frozen matrices on tokens without padding, forward and for the "
             "gradient of their inputs, at the speed of torch's own matrix product in the same run.")
TAKEN = {"cpu": "taken in turn", "cuda": "of one side after the other"}


def of_case(results: dict, case: str) -> list[dict]:
    """Records that were timed."""
    return [r for r in results["records"] if r["case"] == case and "total_ms" in r]


def cases_of(results: dict) -> list[str]:
    return list(dict.fromkeys(r["case"] for r in results["records"]))


def is_ours(record: dict) -> bool:
    return record["implementation"].startswith(OURS)


def label(record: dict) -> str:
    texts = f"texts of {100 * record['decode_share']:g}% of them" if record["decode_share"] < 1 else "texts of all"
    where = f", in {record['gib']} GiB" if record["gib"] else ""
    model = "MovieLens-100K, SmolLM2-135M" if record["shape"] == DEMO else record["shape"]
    return f"{model}, {record['windows']} windows, positions {record['positions']}, {texts}{where}"


def rate(record: dict) -> float:
    """Windows a second: steps of different batches can be compared by it."""
    return record["batch"] / time_of(record)


def best(records: list[dict], ours: bool) -> dict | None:
    """The right one with the most pairs, of these the one with the most windows a second."""
    found = [r for r in records if is_ours(r) == ours and right(r)]
    return max(found, key=lambda r: (r["pairs"], rate(r)), default=None)


def faster(record: dict | None, other: dict | None) -> str:
    if record is None or other is None:
        return "-"
    ratio = rate(record) / rate(other)
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"**{1 / ratio:.2f}x slower**"


def memory_ratio(record: dict | None, other: dict | None) -> str:
    return "-" if record is None or other is None else f"{record['memory_mib'] / other['memory_mib']:.2f}"


def negatives(record: dict) -> str:
    return f"{negatives_of(record['batch'], record['pairs'] / record['batch']):,}"


def explained(results: dict) -> str:
    return EXPLAINED.format(taken=TAKEN[results["machine"]["device"]])


def device_table(results: dict) -> str:
    """Every case: our fastest side against the usual one; both with the most negatives that fit."""
    table = [["step", "ours, ms", "usual, ms", "ours, a window, is", "ours, MiB", "usual, MiB", "memory over usual",
              "negatives, ours", "usual", "of matmul peak"]]
    for case in cases_of(results):
        r, other = (best(of_case(results, case), ours) for ours in (True, False))
        if r is not None:
            table.append([f"{label(r)} ({r['implementation']})", milliseconds(r),
                          f"{milliseconds(other)} ({other['implementation']})" if other else "does not fit",
                          faster(r, other), mebibytes(r), mebibytes(other) if other else "-", memory_ratio(r, other),
                          negatives(r), negatives(other) if other else "-", f"{100 * r['peak_fraction']:.0f}%"])
    return "\n\n".join([about(results), rows_of(table), explained(results)])


def checked(record: dict) -> str:
    """The largest errors of a term and of a gradient."""
    if record["status"] == "wrong":
        return "wrong result"
    return ", ".join(f"{max(e for name, e in record['errors'].items() if ('gradient' in name) == of_gradients):.1e}"
                     for of_gradients in (False, True))


def case_table(results: dict, case: str) -> str:
    """Everything on one case, then what is missing and why."""
    records, timed = [r for r in results["records"] if r["case"] == case], of_case(results, case)
    other = best(timed, False)
    table = [["side", "windows", "negatives", "ms a step", "20th to 80th percentile", "limit, ms", "windows/s",
              "over usual", "MiB", "memory over usual", "held between steps, MiB", "collation, ms",
              "error of terms, gradients"]]
    for r in sorted(timed, key=rate, reverse=True):
        compared = other if right(r) else None
        table.append([r["implementation"], str(r["batch"]), negatives(r), milliseconds(r),
                      f"{r['total_ms']['p20']:.3g} to {r['total_ms']['p80']:.3g}", f"{r['limit_ms']:.3g}",
                      f"{r['windows_per_second']:.3g}", faster(r, compared), mebibytes(r), memory_ratio(r, compared),
                      f"{r['held_mib']:.0f}", f"{r['collation_ms']:.3g}", checked(r)])
    return "\n\n".join([f"{label(records[0])}. {about(results, case)}", rows_of(table), explained(results),
                        *not_measured(records)])


def short_table(results: dict) -> str:
    """For a terminal: a line for each side of each case."""
    lines = [f"{results['machine']['name']}, torch {results['machine']['torch']}",
             f"{'step and side':<62} {'ms':>9} {'MiB':>8} {'negatives':>9}  of peak, against usual"]
    for case in cases_of(results):
        timed = of_case(results, case)
        other = best(timed, False)
        for r in timed:
            lines.append(f"{case + ' ' + r['implementation']:<62} {milliseconds(r):>9} {mebibytes(r):>8} "
                         f"{negatives(r):>9}  {100 * r['peak_fraction']:.0f}%, {faster(r, other).strip('*')}, "
                         f"memory {memory_ratio(r, other)}")
    return "\n".join(lines + failures(results))
