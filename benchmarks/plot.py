"""Time and memory against the batch size, from a results file."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from .tables import OURS, right, time_of

# Okabe and Ito's colours, which stay apart for colour-blind readers; markers tell the lines apart without colour
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#999999", "#F0E442")
MARKERS = "sD^vPX<>"


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
    for r in plain:
        name = r["implementation"]
        if (r["width"], r["dtype"]) == kind and (name == OURS or not name.startswith("karma")) and "MiB" not in name:
            lines[name].append((r["rows"], time_of(r), r["memory_mib"]))
    return kind, {name: sorted(points) for name, points in lines.items()}


def plot(results: dict, path: Path) -> str:
    """Writes the picture (.svg or .png) and says what it shows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    (width, dtype), lines = series(results)
    names = sorted(lines, key=lambda name: (name != OURS, name))
    others = [name for name in names if name != OURS]
    number = FuncFormatter(lambda x, _: f"{x:g}")
    few = FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    with plt.rc_context({"font.size": 11, "svg.hashsalt": "benchmarks"}):
        figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
        for axis, column, title in zip(axes, (1, 2), ("forward + backward, ms", "memory beyond the inputs, MiB"),
                                       strict=True):
            for name in reversed(names):  # ours last, on top
                at = others.index(name) if name != OURS else 0
                style = {"color": "black", "marker": "o", "linewidth": 3, "markersize": 8} if name == OURS else \
                    {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)], "linewidth": 1.8}
                axis.plot([p[0] for p in lines[name]], [p[column] for p in lines[name]], label=name, **style)
            axis.set(xscale="log", yscale="log", title=title, xlabel="batch: queries = keys")
            axis.set_xticks(sorted({p[0] for points in lines.values() for p in points}))
            axis.xaxis.set_major_formatter(number)
            axis.yaxis.set_major_formatter(number)
            axis.yaxis.set_minor_formatter(few)
            axis.xaxis.minorticks_off()
            axis.grid(True, which="both", alpha=0.25)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"InfoNCE, width {width}, {dtype}, {results['machine']['name']}")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
        plt.close(figure)
    return f"{len(names)} implementations at width {width}, {dtype}"
