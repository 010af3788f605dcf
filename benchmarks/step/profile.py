"""Where the time of a step goes, ours and the usual one's: ``python -m benchmarks.step.profile [OUT.svg]``.

One step (forward and backward) of the demo's batch under torch's profiler, after one to warm up: the time that each
kind of operation takes itself. Writes the picture, and the same figures as JSON among the results.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from karma_fast.model.backbone import causal_lm
from karma_fast.step import backward

from .. import RESULTS, ROOT
from ..machine import describe, file_name
from ..plot import COLOURS
from .build import make_inputs, make_side
from .cases import Case, ours, usual
from .training import to_device
from .usual import UsualModel

KINDS = ("products of the layers", "unpacking 4-bit weights", "attention", "vocabulary: head and cross-entropy",
         "norms, activations, casts, copies")
ATTENTION = ("bmm", "softmax", "attention", "flash", "efficient")
SIDES = {"usual, sdpa": usual(), "usual, eager attention": usual(attention="eager"), "karma_fast": ours(),
         "karma_fast, 8 of 32 windows at once": ours(8)}


def kind_of(name: str, shapes: list, vocabulary: int) -> str:
    """Of an operation with inputs of these shapes.

    >>> kind_of("aten::mm", [[96, 576], [576, 49152]], 49152), kind_of("aten::mm", [[96, 576], [576, 576]], 49152)
    ('vocabulary: head and cross-entropy', 'products of the layers')
    """
    if any(vocabulary in shape for shape in shapes if isinstance(shape, (list, tuple))):
        return KINDS[3]
    name = name.lower()
    if any(word in name for word in ATTENTION):
        return KINDS[2]
    if "mm" in name.rpartition("::")[2] or "gemm" in name:
        return KINDS[0]
    return KINDS[1] if "quant" in name else KINDS[4]


def measure(model, batch, device: str) -> dict[str, float]:
    """Milliseconds by kind."""

    def step() -> None:
        if isinstance(model, UsualModel):
            model(**batch)["loss"].backward()
        else:
            backward(model, batch)
        model.zero_grad(set_to_none=True)

    batch = to_device(batch, model.emb_token.device) if isinstance(model, UsualModel) else batch.to(device)
    vocabulary = len(causal_lm(model.backbone).get_input_embeddings().weight)
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, record_shapes=True) as found:
        step()
    times: dict[str, float] = defaultdict(float)
    for event in found.key_averages(group_by_input_shape=True):
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        times[kind_of(event.key, event.input_shapes, vocabulary)] += own / 1e3
    return {kind: round(times[kind], 1) for kind in KINDS}


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3.4), layout="constrained")
    sides = list(results["milliseconds"])
    left = [0.0] * len(sides)
    for kind, colour in zip(KINDS, COLOURS, strict=False):
        widths = [results["milliseconds"][side][kind] for side in sides]
        axis.barh(sides, widths, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        axis.text(total, place, f" {total:,.0f}", va="center")
    axis.invert_yaxis()
    axis.set_xlim(0, max(left) * 1.1)
    axis.set_xlabel("milliseconds, forward and backward")
    axis.set_title(f"One step of the demo, {results['case']}: {results['machine']['name']}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.profile", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs" / "step.svg")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", type=Case.parse, default=Case.parse("demo-32-all-0.25"))
    args = parser.parse_args(arguments)
    results = {"case": args.case.name, "machine": describe(args.device), "milliseconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(args.case, args.device, Path(folder))
        for name, side in SIDES.items():
            model, collate = make_side(inputs, side)
            if side.chunk is not None:
                collate.chunk_size = side.chunk
            results["milliseconds"][name] = measure(model.train(), collate(inputs.windows), args.device)
            del model
    draw(results, args.out)
    kept = RESULTS / "step" / f"profile-{file_name(results['machine']['name'])}"
    kept.write_text(json.dumps(results, indent=1) + "\n")
    for name, times in results["milliseconds"].items():
        print(f"{name:36}" + "".join(f"{times[kind]:>9,.0f}" for kind in KINDS) + f"{sum(times.values()):>10,.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
