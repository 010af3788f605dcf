"""What the positions of one prompt look at, without the adapters and with those of each row that was diagnosed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .tables import by_row

UNTUNED = "adapters off"


def panels(results: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, np.ndarray]]]:
    """Labels of the prompt, and {UNTUNED or a row: {layer: (T, T)}} of every row's first seed that has maps.

    The language model without adapters is the same for all rows and looks at the same prompt; what differs are the
    trained soft tokens, so it is drawn once, with those of the first such row.
    """
    labels, found = [], {}
    for name, records in by_row(results).items():
        maps = next((r["attention"] for r in records if r.get("attention")), None)
        if maps is None or (labels and maps["labels"] != labels):
            continue
        labels = maps["labels"]
        if not found:
            found[UNTUNED] = maps.get("untuned", {})
        found[name] = maps["trained"]
    return labels, {name: {layer: np.asarray(m, dtype=np.float64) for layer, m in maps.items()}
                    for name, maps in found.items() if maps}


def plot_maps(results: dict[str, Any], path: Path) -> str | None:
    """Writes the picture and says what it shows; None where no row has maps."""
    labels, found = panels(results)
    if not found:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import PowerNorm

    layers = list(next(iter(found.values())))
    size = 0.09 * len(labels)
    with plt.rc_context({"font.size": 9, "svg.hashsalt": "benchmarks"}):
        figure, axes = plt.subplots(len(layers), len(found), layout="constrained", squeeze=False, sharex=True,
                                    sharey=True, figsize=(2.6 + size * len(found), 0.9 + size * len(layers)))
        shown = None
        for column, (name, maps) in zip(axes.T, found.items(), strict=True):
            column[0].set_title(name)
            for axis, layer in zip(column, layers, strict=True):
                weights = np.ma.masked_where(np.triu(np.ones_like(maps[layer]), 1) > 0, maps[layer])
                shown = axis.imshow(weights, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
                axis.text(0.97, 0.94, layer, transform=axis.transAxes, ha="right", va="top")
                axis.set_xticks([])
                axis.tick_params(left=False)
        for axis in axes[:, 0]:
            axis.set_yticks(range(len(labels)), labels, fontsize=4.5)
        figure.colorbar(shown, ax=axes, label="attention weight, mean over heads", shrink=0.5,
                        ticks=[0, 0.05, 0.25, 0.5, 1])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150, bbox_inches="tight")
        plt.close(figure)
    return f"{len(found)} maps of {len(layers)} layers, {len(labels)} positions"
