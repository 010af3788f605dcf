"""Which machine and which versions a results file is about."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

LIBRARIES = ("sentence-transformers", "open_clip_torch", "memeff", "cut-cross-entropy", "inf-cl")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def describe(device: str, libraries: Sequence[str] = LIBRARIES) -> dict:
    """Name, memory and versions."""
    about = {"device": device, "torch": torch.__version__, "triton": version("triton"),
             "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}",
             "libraries": {name: found for name in libraries if (found := version(name))}}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return about | {"name": properties.name, "capability": f"{properties.major}.{properties.minor}",
                        "memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda,
                        "float32_matmul": torch.backends.cuda.matmul.fp32_precision}
    threads = torch.get_num_threads()
    return about | {"name": f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}",
                    "capability": torch.backends.cpu.get_cpu_capability()}


def file_name(name: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3.json"""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"
