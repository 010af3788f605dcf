"""With torch, numpy and Triton alone the kernels and losses work, and what needs more says what to install."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("transformers", "peft", "accelerate", "polars", "scipy", "yaml", "tqdm", "safetensors", "faiss", "pytest")
KERNELS = """
import sys
import torch
from karma_kernels import info_nce, soft_prompt

query, key = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
scale = torch.tensor(9.0, requires_grad=True)
loss = info_nce(query, key, scale=scale, key_ids=torch.arange(9) % 4, log_q=torch.rand(9).log(), symmetric=True,
                normalize=True)
loss.backward()
assert loss.item() > 0 and all(x.grad.abs().sum() > 0 for x in (query, key, scale))
assert not [name for name in sys.modules if name.partition(".")[0] == "karma_fast"]
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
LOSSES = """
import importlib
import pkgutil
import sys
import torch
import karma_fast
from karma_fast import InfoNCELoss, SoftPromptProjection

loss_fn = InfoNCELoss(gather=True)
loss_fn(torch.randn(4, 8), torch.randn(4, 8)).backward()
assert loss_fn.log_scale.grad is not None
assert SoftPromptProjection(8, 16)(torch.randn(3, 8)).shape == (3, 1, 16)
from karma_fast import integrations
from karma_fast.integrations.open_clip import ClipLoss

assert ClipLoss()(torch.randn(4, 8), torch.randn(4, 8), torch.tensor(5.0)) > 0
for module in pkgutil.iter_modules(integrations.__path__):
    try:
        importlib.import_module("karma_fast.integrations." + module.name)
    except ImportError as error:  # what is missing, and how to get it
        assert "pip install" in str(error), (module.name, error)
"""


def closure(*names: str) -> dict[str, importlib.metadata.Distribution]:
    """These distributions and what they need at least, by name; those that are not installed are left out."""
    found, open_names = {}, list(names)
    while open_names:
        name = open_names.pop().lower().replace("_", "-")
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found:
            found[name] = distribution
            needed = map(Requirement, distribution.requires or [])
            open_names += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def make_environment(folder: Path, *names: str) -> Path:
    """Python of a new environment that sees these distributions, what they need, and this project."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, text=True, capture_output=True).stdout.strip())
    for distribution in closure(*names).values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():  # several distributions can share a folder
                (site / top).symlink_to(distribution.locate_file(top))
    for package in (ROOT / "karma_fast", ROOT / "kernels" / "karma_kernels"):
        (site / package.name).symlink_to(package)
    return python


def run(python: Path, *words: str) -> subprocess.CompletedProcess:
    """-I: neither the folder it starts in nor PYTHON... variables add anything."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([str(python), "-I", "-B", *words], cwd=python.parent, text=True, capture_output=True,
                          env=environment | {"OMP_NUM_THREADS": "1", "HOME": str(python.parent)}, timeout=300)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return make_environment(tmp_path_factory.mktemp("bare") / "env", "torch", "numpy", "triton")


def test_it_is_bare(bare):
    code = f"import importlib.util; print([n for n in {ABSENT} if importlib.util.find_spec(n)])"
    assert run(bare, "-c", code).stdout == "[]\n"


def test_kernels(bare):
    done = run(bare, "-c", KERNELS)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout.split() and not set(done.stdout.split()) & {*ABSENT, "karma_fast"}


def test_losses_and_integrations(bare):
    done = run(bare, "-c", LOSSES)
    assert done.returncode == 0, done.stderr


def test_kernels_without_triton(bare):
    """As on macOS and Windows."""
    done = run(bare, "-c", f"import sys\nsys.modules['triton'] = None\n{KERNELS}")
    assert done.returncode == 0, done.stderr


def test_the_command_line(bare):
    shown = run(bare, "-m", "karma_fast", "--help")
    assert shown.returncode == 0 and "karma-fast COMMAND --help" in shown.stdout, shown.stderr
    refused = run(bare, "-m", "karma_fast", "demo")
    assert refused.returncode == 1, refused.stderr
    assert "is not installed; `karma-fast doctor` says how to get it" in refused.stderr
    report = run(bare, "-m", "karma_fast", "doctor")
    assert "pip install" in report.stdout and "polars" in report.stdout, report.stderr
