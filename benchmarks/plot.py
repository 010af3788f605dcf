"""Time and memory against the size, from a results file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from .tables import MINE, OURS, right, time_of

# Okabe and Ito's colours, which stay apart for colour-blind readers; markers tell the lines apart without colour
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#999999", "#F0E442")
MARKERS = "sD^vPX<>"

Lines = dict[str, list[tuple[int, float]]]  # {implementation: [(size, value)]}


def compared(records: Iterable[dict]) -> list[dict]:
    """Of those that are right: ours, the default one, and all alternatives."""
    return [r for r in records if right(r) and "MiB" not in r["implementation"]
            and (r["implementation"] == OURS or not r["implementation"].startswith(MINE))]


def series(results: dict) -> tuple[tuple[int, str], dict[str, list[tuple[int, float, float]]]]:
    """((width, dtype), {implementation: [(batch, milliseconds, MiB)]}) of the square cases without flags, at the width
    and dtype that most batch sizes were measured at."""
    plain = [r for r in results["records"] if right(r) and r["rows"] == r["keys"]
             and not (r["symmetric"] or r["ids"] or r["log_q"])]
    sizes = defaultdict(set)
    for r in plain:
        sizes[r["width"], r["dtype"]].add(r["rows"])
    if not sizes:
        raise ValueError("the results have no square case without flags, nothing to plot")
    kind = max(sizes, key=lambda k: len(sizes[k]))
    lines = defaultdict(list)
    for r in compared(plain):
        if (r["width"], r["dtype"]) == kind:
            lines[r["implementation"]].append((r["rows"], time_of(r), r["memory_mib"]))
    return kind, {name: sorted(points) for name, points in lines.items()}


def ranking_series(results: dict) -> dict[int, Lines]:
    """{width: {implementation: [(items, milliseconds a query)]}} of the trained cases in float32, seen left out."""
    widths: dict[int, Lines] = defaultdict(lambda: defaultdict(list))
    for r in compared(results["records"]):
        if r["kind"] == "trained" and r.get("dtype", "float32") == "float32" and r.get("seen", True):
            widths[r["width"]][r["implementation"]].append((r["items"], time_of(r) / r["queries"]))
    return {width: {name: sorted(points) for name, points in widths[width].items()} for width in sorted(widths)}


def plot(results: dict, path: Path) -> str:
    """Writes the picture of the loss (.svg or .png) and says what it shows."""
    (width, dtype), found = series(results)
    panels = [(title, {name: [(p[0], p[column]) for p in points] for name, points in found.items()})
              for column, title in ((1, "forward + backward, ms"), (2, "memory beyond the inputs, MiB"))]
    draw(path, f"InfoNCE, width {width}, {dtype}, {results['machine']['name']}", "batch: queries = keys", panels)
    return f"{len(found)} implementations at width {width}, {dtype}"


def plot_ranking(results: dict, path: Path) -> str:
    """Writes the picture of ranking and says what it shows."""
    found = ranking_series(results)
    if not found:
        raise ValueError("the results have no trained case with a right result, nothing to plot")
    panels = [(f"width {width}: ms a query", lines) for width, lines in found.items()]
    draw(path, f"HR@1, 10, 200 over the whole catalogue, float32, {results['machine']['name']}", "items", panels)
    names = {name for lines in found.values() for name in lines}
    return f"{len(names)} implementations at widths {', '.join(map(str, found))}"


def draw(path: Path, title: str, size: str, panels: list[tuple[str, Lines]]) -> None:
    """One panel beside the other, all with logarithmic axes and one legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    names = sorted({name for _, lines in panels for name in lines}, key=lambda name: (name != OURS, name))
    others = [name for name in names if name != OURS]
    number = FuncFormatter(lambda x, _: f"{x:g}")
    few = FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    handles = {}
    with plt.rc_context({"font.size": 11, "svg.hashsalt": "benchmarks"}):
        figure, axes = plt.subplots(1, len(panels), figsize=(11, 5.2), layout="constrained", squeeze=False)
        for axis, (head, lines) in zip(axes[0], panels, strict=True):
            for name in (name for name in reversed(names) if name in lines):  # ours last, on top
                at = others.index(name) if name != OURS else 0
                style = {"color": "black", "marker": "o", "linewidth": 3, "markersize": 8} if name == OURS else \
                    {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)], "linewidth": 1.8}
                handles[name], = axis.plot(*zip(*lines[name], strict=True), label=name, **style)
            axis.set(xscale="log", yscale="log", title=head, xlabel=size)
            axis.set_xticks(sorted({p[0] for points in lines.values() for p in points}))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
            axis.yaxis.set_major_formatter(number)
            axis.yaxis.set_minor_formatter(few)
            axis.xaxis.minorticks_off()
            axis.grid(True, which="both", alpha=0.25)
        figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(title)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
        plt.close(figure)
