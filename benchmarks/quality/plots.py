"""HR@10 by row with its spread, and what the diagnostics say of each row beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..plot import COLOURS, MARKERS
from .tables import by_row, diagnosed, name_of, values_of

KINDS = {"baseline": COLOURS[6], "query": COLOURS[6], "ids": COLOURS[6], "sasrec": COLOURS[1], "karma": COLOURS[5],
         "ra_rec": COLOURS[4]}
SHOWN = {"u_effective_rank": "effective rank of u", "history_sink": "history sink",
         "perplexity_ratio": "perplexity over the untuned model's"}
FEWEST_POINTS = 3  # rows; two lie apart on any axes and look like a trend


def plot(results: dict, path: Path) -> str:
    """Writes the picture (.svg or .png) and says what it shows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = by_row(results)
    points = {entry: found for entry in SHOWN if len(found := diagnosed_rows(rows, entry)) >= FEWEST_POINTS}
    with plt.rc_context({"font.size": 11, "svg.hashsalt": "benchmarks"}):
        figure, axes = plt.subplots(1, 1 + len(points), figsize=(7 + 4 * len(points), 0.7 + 0.34 * (len(rows) + 3)),
                                    layout="constrained", squeeze=False,
                                    gridspec_kw={"width_ratios": [1.5] + [1] * len(points)})
        draw_rates(axes[0][0], rows)
        for axis, (entry, found) in zip(axes[0][1:], points.items(), strict=True):
            for at, (name, (x, y)) in enumerate(found.items()):
                axis.plot(x, y, color=COLOURS[at % len(COLOURS)], marker=MARKERS[at % len(MARKERS)], linestyle="")
                axis.annotate(name, (x, y), xytext=(5, 3), textcoords="offset points")
            axis.set(xlabel=SHOWN[entry], ylabel="HR@10", title=f"HR@10 and {SHOWN[entry].split(' over')[0]}")
            axis.margins(0.15)
            axis.grid(True, alpha=0.25)
        size = ", reduced" if results["size"] == "reduced" else ""
        figure.suptitle(f"{results['data']}{size}: {results['requests']['all']:,} requests, seen items left out")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
        plt.close(figure)
    return f"{len(rows)} rows, {len(points)} diagnostics"


def diagnosed_rows(rows: dict[str, list[dict]], entry: str) -> dict[str, tuple[float, float]]:
    """row -> (mean of the entry, mean HR@10 of the same seeds)."""
    out = {}
    for name, records in rows.items():
        known = [r for r in records if diagnosed(r, entry) is not None]
        if known:
            out[name] = (float(np.mean([diagnosed(r, entry) for r in known])),
                         float(np.mean(values_of(known, "masked", "all", "HR@10"))))
    return out


def draw_rates(axis, rows: dict[str, list[dict]]) -> None:
    """A bar a row with every seed as a point; its standard error over requests is in the tables."""
    names = list(rows)
    for at, name in enumerate(names):
        values = values_of(rows[name], "masked", "all", "HR@10")
        axis.barh(at, np.mean(values), color=KINDS[rows[name][0]["kind"]], height=0.66,
                  xerr=np.std(values, ddof=1) if len(values) > 1 else None, error_kw={"capsize": 3})
        if len(values) > 1:
            axis.plot(values, [at] * len(values), "o", color="black", markersize=3)
    axis.set_yticks(range(len(names)), [name_of(records) for records in rows.values()])
    axis.locator_params(axis="x", nbins=5)
    axis.invert_yaxis()
    axis.set(xlabel="HR@10; mean, standard deviation and points of seeds" if any(len(r) > 1 for r in rows.values())
             else "HR@10, one seed")
    axis.grid(True, axis="x", alpha=0.25)
