"""The packaging files agree with each other and with the code."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import karma_fast
from karma_fast.commands.doctor import NEEDED, OPTIONAL, OPTIONAL_ON_GPU

ROOT = Path(__file__).resolve().parent.parent


def requirements(name: str) -> list[str]:
    """A list of strings of pyproject.toml. (tomllib came with Python 3.11.)"""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(rf"^{name} = (\[.*?\])$", text, re.M | re.S)[1])


def names(requirement: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", entry)[0] for entry in requirement}


def test_doctor_knows_what_pyproject_asks_for():
    asked = {re.match(r"[\w-]+", spec)[0]: spec for spec, _ in [*NEEDED.values(), *OPTIONAL.values()]}
    wanted = requirements("dependencies") + requirements("train") + requirements("cpu")
    assert set(asked) == names(wanted)
    for entry in wanted:  # the same bounds, too
        entry = entry.partition(";")[0]
        assert asked[re.match(r"[\w-]+", entry)[0]] == entry
    assert names(requirements("gpu")) - {"bitsandbytes"} <= set(OPTIONAL_ON_GPU)


def test_what_is_asked_for_is_used():
    modules = {"pyyaml": "yaml", "faiss-cpu": "faiss", "faiss-gpu-cu12": "faiss"}
    doctor = ROOT / "karma_fast" / "commands" / "doctor.py"
    code = "\n".join(path.read_text(encoding="utf-8") for folder in ("karma_fast", "kernels")
                     for path in (ROOT / folder).rglob("*.py") if path != doctor)
    for name in {*NEEDED, *OPTIONAL, *OPTIONAL_ON_GPU, *names(requirements("gpu"))}:
        assert re.search(rf"\b{modules.get(name, name.replace('-', '_'))}\b", code), name


def test_base_dependencies_are_few():
    assert names(requirements("dependencies")) == {"torch", "numpy", "triton"}


@pytest.mark.parametrize("module, allowed", [
    ("karma_fast", set()), ("karma_kernels", {"torch"}), ("karma_fast.losses", {"torch"}),
    ("karma_fast.evaluation", {"torch"}),
])
def test_imports_stay_light(module, allowed):
    """The base install holds torch alone, so no more may be loaded, and nothing at all by the bare package."""
    heavy = {"torch", "transformers", "peft", "faiss", "polars", "scipy", "matplotlib", "yaml", "bitsandbytes"}
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True,
                          env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""})
    assert set(done.stdout.split()) <= allowed


def test_kernels_do_not_import_the_engine():
    for path in (ROOT / "kernels" / "karma_kernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) karma_fast", path.read_text(encoding="utf-8"), re.M), path
    # as a package it would shadow the one that other libraries look for
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_public_name_loads():
    for name in karma_fast.__all__:
        assert getattr(karma_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'KarmaModle'"):
        karma_fast.KarmaModle  # noqa: B018


def test_the_demo_is_packaged_and_valid():
    from karma_fast.commands.common import load_config
    from karma_fast.run_setup import training_settings

    config = load_config(str(Path(karma_fast.__file__).parent / "demo.yaml"), {"seed": "7"})
    assert config.data.name == "ml-100k" and config.data.seed == 0
    assert training_settings(config.training)["seed"] == 7
    assert 'karma_fast = ["*.yaml"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_make_setup_refuses_an_old_python(tmp_path):
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1"\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    for python, said in ((old, "Python 3.10 or later is needed"), ("no-such-python", "no-such-python was not found")):
        done = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode != 0 and said in done.stderr
    assert not (tmp_path / ".venv").exists()


def build_extension(tmp_path, **environment):
    """What setup.py says where the sources are kernel_amx.cpp and module.cpp, which are not C++."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("karma_fast", "kernels/karma_kernels", "csrc"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "karma_fast" / "__init__.py").write_text('__version__ = "0"', encoding="utf-8")
    for name in ("kernel_amx.cpp", "module.cpp"):
        (tmp_path / "csrc" / name).write_text("not C++", encoding="utf-8")
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler_the_extension_is_left_out(tmp_path):
    said = build_extension(tmp_path, CC="/no/such/compiler", CXX="/no/such/compiler")
    assert "C++ extension was NOT built" in said and "apt install g++" in said
    assert not list(tmp_path.rglob("*.so"))


COMPILER = """#!/bin/sh
echo "$@" >> commands
case "$*" in {accepted}) ;; *{refused}*)
  echo "{refused}: Messages:" >&2
  echo "{error}" >&2
  exit 1
esac
while [ "$1" != -o ]; do shift; done
: > "$2"
"""


@pytest.mark.parametrize("refused, accepted, error, attempts, said", [
    ("kernel_amx.cpp", "*KARMA_NO_AMX*", "x.s:7: Error: no such instruction: tilezero", 2, "was built without AMX"),
    ("kernel_amx.cpp", "*KARMA_PORTABLE*", "x.s:7: Error: no such instruction: tilezero", 3,
     "was built for any CPU alone, many times slower than for this one"),
    ("kernel_amx.cpp", "never", "kernel_amx.cpp:1:1: error: not C++", 3, "was NOT built"),
    ("module.cpp", "never", "module.cpp:3:10: fatal error: Python.h: No such file or directory", 1, "was NOT built"),
])
def test_kernels_that_the_compiler_refuses_are_left_out(tmp_path, refused, accepted, error, attempts, said):
    """They alone, where setup.py finds a switch that helps; with what the compiler said."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(refused=refused, accepted=accepted, error=error), encoding="utf-8")
    compiler.chmod(0o755)
    out = build_extension(tmp_path, CC=str(compiler), CXX=str(compiler), CFLAGS="-ffast-math",
                          CXXFLAGS="-ffast-math")
    assert f"C++ extension {said} ({error})" in out
    assert bool(list((tmp_path / "karma_fast").glob("_C*.so"))) == (accepted != "never")
    commands = (tmp_path / "commands").read_text(encoding="utf-8").splitlines()
    assert len([line for line in commands if f"csrc/{refused}" in line]) == attempts
    assert all("-fno-fast-math" in line.partition("-ffast-math")[2] for line in commands)


@pytest.mark.parametrize("built, machine, said", [
    ("\\0avx2\\0", "x86_64", False), ("kernel_avx2.cpp", "x86_64", True), ("", "aarch64", False)])
def test_a_build_without_kernels_for_this_cpu_says_so(tmp_path, built, machine, said):
    compiler, site = tmp_path / "compiler", tmp_path / "site"
    compiler.write_text(COMPILER.format(refused="nothing", accepted="*", error="").replace(
        ': > "$2"', f"printf '{built}' > \"$2\""), encoding="utf-8")
    compiler.chmod(0o755)
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"import platform\nplatform.machine = lambda: '{machine}'\n")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    out = build_extension(tmp_path, CC=str(compiler), CXX=str(compiler), PYTHONPATH=path)
    line = "was built for any CPU alone, many times slower than for this one (its other kernels need g++)"
    assert (line in out) == said
    assert len(list((tmp_path / "karma_fast").glob("_C*.so"))) == 1


def test_ranking_without_the_extension():
    code = """
import sys
sys.modules["karma_fast._C"] = None
import numpy as np
from karma_fast.evaluation import Catalogue, paths, target_ranks, top_k
assert paths() == {}
items = np.eye(4, dtype=np.float32)
queries = np.array([[0.1, 0.9, 0.2, 0.2]], np.float32)
for catalogue in (items, Catalogue(items)):
    print(target_ranks(queries, catalogue, [2], seen=([0, 1], [1])).expected, top_k(queries, catalogue, 2)[1])
from karma_fast.evaluation import ranks
import warnings
ranks.LONG = 10
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    target_ranks(queries, items, [2]), top_k(queries, items, 2), target_ranks(queries, items, [2], path="torch")
assert [str(w.message)[:31] for w in caught] == ["the C++ extension was not built"] * 2
assert all(w.filename == "<string>" for w in caught)
try:
    target_ranks(queries, items, [2], path="avx2")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True,
                          env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""})
    assert done.stdout.splitlines() == ["[0.5] [[1 2]]"] * 2 + [
        "path: got 'avx2'; this machine has auto, torch (the C++ extension was not built, see `karma-fast doctor`)"]


def test_an_extension_that_cannot_be_loaded_says_why(tmp_path):
    shutil.copytree(ROOT / "karma_fast", tmp_path / "karma_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "karma_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    code = """
import warnings
import numpy as np
from karma_fast.commands.doctor import examine, to_text
from karma_fast.evaluation import paths, ranks, target_ranks
assert paths() == {}
ranks.LONG = 0
items = np.eye(4, dtype=np.float32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    target_ranks(items, items, range(4))
print(caught[0].message)
try:
    target_ranks(items, items, range(4), path="avx2")
except ValueError as error:
    print(error)
print(*(line for line in to_text(examine()).splitlines() if line.startswith("ranking")))
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True, cwd=tmp_path,
                          env={"PYTHONPATH": f"{tmp_path}:{ROOT / 'kernels'}", "PATH": ""})
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout
    for line, end in zip(lines, (", so torch ranks", ", see", "; install karma-fast again"), strict=True):
        assert re.search(rf"the C\+\+ extension,?( which)? cannot be loaded \(.*_C\..*\){end}", line), line


BENCHMARK = """
def test_fast(benchmark):
    assert benchmark(lambda: 1) == 1
"""
GPU = """
import pytest
import torch

@pytest.mark.gpu
def test_device():
    assert torch.cuda.is_available()
"""


@pytest.mark.parametrize("words, counts", [
    ([], "1 {gpu}"), (["--benchmark"], "1 passed"), (["benchmarks"], "1 skipped"),
    (["--benchmark", "benchmarks/bench_one.py"], "1 passed"),
])
def test_which_tests_run(tmp_path, words, counts):
    import torch

    for name in ("conftest.py", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    for name, text in (("benchmarks/bench_one.py", BENCHMARK), ("tests/test_gpu.py", GPU), ("karma_fast/a.py", ""),
                       ("kernels/karma_kernels/b.py", "")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *words], cwd=tmp_path,
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert counts.format(gpu="passed" if torch.cuda.is_available() else "skipped") in last
    if "skipped" in last:
        assert "CUDA" in done.stdout or "pytest --benchmark" in done.stdout
