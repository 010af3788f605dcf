"""`karma-fast doctor`: what is here, what is missing, and how to get it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# distribution -> (what pip is asked for, what it is for); the first group is what training needs
NEEDED = {
    "torch": ("torch>=2.11", "everything"), "numpy": ("numpy", "everything"),
    "transformers": ("transformers>=5", "the language model and the training loop"),
    "peft": ("peft>=0.18", "LoRA (model.tuning lora)"), "accelerate": ("accelerate>=1.1", "the training loop"),
    "bitsandbytes": ("bitsandbytes>=0.46", "4-bit and 8-bit weights (model.quantization)"),
    "safetensors": ("safetensors", "saving models"), "gguf": ("gguf>=0.10", "the built-in backbone"),
    "polars": ("polars>=1", "reading data"), "pyyaml": ("pyyaml", "configurations"), "scipy": ("scipy", "baselines"),
    "tqdm": ("tqdm", "progress bars"),
}
OPTIONAL = {
    "triton": ("triton>=3.6", "fused kernels on a GPU"), "faiss-cpu": ("faiss-cpu", "fast retrieval"),
    "tensorboard": ("tensorboard", "training curves in TensorBoard"),
}
OPTIONAL_ON_GPU = {
    "faiss-gpu-cu12": ("faiss-gpu-cu12", "retrieval on the GPU"),
    "flash-attn": ("flash-attn --no-build-isolation", "faster attention"),
}


def main(args: argparse.Namespace) -> int:
    found = examine()
    print(json.dumps(found, indent=1) if args.json else to_text(found))
    return 0 if found["ok"] else 1


def examine() -> dict[str, Any]:
    """All that the command shows; ``ok``: whether training can start."""
    from ..data.assets import cache_dir

    hardware = look_at_hardware()
    gpu = bool(hardware["gpus"])
    packages = {name: installed(name) for name in [*NEEDED, *OPTIONAL, *OPTIONAL_ON_GPU]}
    missing = []
    for group, required in ((NEEDED, True), (OPTIONAL, False), (OPTIONAL_ON_GPU if gpu else {}, False)):
        for name, (spec, purpose) in group.items():
            other_faiss = name == "faiss-cpu" and (packages["faiss-gpu-cu12"] or installed("faiss-gpu"))
            if packages[name] is None and not other_faiss and not (name == "triton" and sys.platform != "linux"):
                missing.append({"package": name, "for": purpose, "required": required, "install": pip_install(spec)})
    folder = cache_dir()
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return {"ok": not any(m["required"] for m in missing), "python": platform.python_version(),
            "platform": platform.platform(), "packages": packages, **hardware,
            "cache": {"folder": str(folder), "bytes": sum(path.stat().st_size for path in files)},
            "backbones": built_in_backbones(folder), "missing": missing}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pip_install(spec: str) -> str:
    name, _, options = spec.partition(" ")
    quoted = f'"{name}"' if ">" in name else name
    return f"{sys.executable} -m pip install {quoted}{' ' + options if options else ''}"


def look_at_hardware() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    out: dict[str, Any] = {"cpu": "", "cpu_features": [], "cores": cores, "memory_bytes": memory_bytes(), "gpus": [],
                           "compute_dtype": None, "ranking": [], "ranking_problem": None, "triton_problem": None}
    try:
        import torch
    except ImportError:
        return out
    from karma_kernels.info_nce.routing import triton_problem

    from ..evaluation.catalogue import ABSENCE, paths
    from ..model.backbone import compute_dtype
    from .common import cpu_name

    features = torch.cpu.get_capabilities()
    names = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16", "sve")
    out |= {"cpu": cpu_name(), "cpu_features": [name for name in names if features.get(name)],
            "ranking": list(paths()), "ranking_problem": None if paths() else "; ".join(ABSENCE)}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        out["gpus"].append({"name": facts.name, "memory_bytes": facts.total_memory,
                            "capability": f"{facts.major}.{facts.minor}"})
    if out["gpus"]:
        out["triton_problem"] = triton_problem() or None
    device = torch.device("cuda" if out["gpus"] else "cpu")
    return out | {"compute_dtype": str(compute_dtype(device)).removeprefix("torch.")}


def memory_bytes() -> int | None:
    """Of the machine, or of the container if that is given less; None where it cannot be asked."""
    if not hasattr(os, "sysconf"):
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def built_in_backbones(cache: Path) -> dict[str, str]:
    """Names for model.backbone that need no hub, and whether they are in the cache."""
    try:
        from ..model.backbone import GGUF_ASSETS
    except ImportError:
        return {}
    return {name: "in the cache" if (cache / "models" / name / "config.json").is_file() else "fetched on first use"
            for name in GGUF_ASSETS}


def to_text(found: dict[str, Any]) -> str:
    def size(value: int | None) -> str:
        if value is None:
            return "unknown"
        return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"

    lines = [f"python    {found['python']} on {found['platform']}",
             f"cpu       {found['cpu'] or 'unknown'}, {found['cores']} cores, {size(found['memory_bytes'])} memory"]
    if found["cpu_features"]:
        lines.append(f"          {' '.join(found['cpu_features'])}")
    lines += [f"gpu       {gpu['name']}, {size(gpu['memory_bytes'])}, capability {gpu['capability']}"
              for gpu in found["gpus"]] or ["gpu       none that torch can use"]
    if found["ranking"]:
        lines.append(f"ranking   in C++: {', '.join(found['ranking'])}")
    elif found["ranking_problem"]:
        lines.append("ranking   by torch, many times slower than the C++ extension, which " + found["ranking_problem"])
    if found["triton_problem"]:
        lines.append(f"kernels   by plain torch, slower than Triton, {found['triton_problem']}")
    lines += [f"computes  in {found['compute_dtype'] or 'nothing: torch is missing'}",
              f"cache     {found['cache']['folder']}, {size(found['cache']['bytes'])}"]
    lines += [f"backbone  {name}: {state}" for name, state in found["backbones"].items()]
    lines += ["", "packages", *(f"  {name:<16} {release or '-'}" for name, release in found["packages"].items())]
    for required, head in ((True, "missing, needed for training"), (False, "missing, optional")):
        some = [entry for entry in found["missing"] if entry["required"] is required]
        if some:
            lines += ["", head, *(f"  {entry['package']:<16} {entry['for']}: {entry['install']}" for entry in some)]
    return "\n".join([*lines, "", "Training can start." if found["ok"] else
                      "Training cannot start until the needed packages are installed."])
