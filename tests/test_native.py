"""The C++ code without Python: under sanitizers, and AMX by a software model of its instructions."""

import os
import re
import subprocess
from collections import Counter

import pytest
import sanitize

CANNOT_RUN = 77  # the exit status of a program that this CPU cannot run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("native")


@pytest.mark.parametrize("name", sanitize.SANITIZERS)
def test_sanitizers_find_nothing(name, folder):
    """All kernels of this CPU, threads, bad numbers and memory that runs out; `make sanitize` does more."""
    flags = sanitize.SANITIZERS[name]
    reason = sanitize.missing(flags, folder)
    if reason:
        pytest.skip(reason)
    place = folder / name
    place.mkdir()
    # leaks are looked for by `make sanitize`: that needs rights that containers may not give
    out = sanitize.run([str(sanitize.program(sanitize.NATIVE / "sanitize.cpp", place, flags))],
                       ASAN_OPTIONS="detect_leaks=0")
    assert "portable" in out.split()


def optimised(folder):
    """The program of tests/native/amx.cpp, compiled as the extension is; its objects lie in amx-objects."""
    flags = ["-O3", "-DNDEBUG"]
    reason = sanitize.missing(flags, folder) or ("" if os.uname().machine == "x86_64" else "AMX is of x86")
    if reason:
        pytest.skip(reason)
    return sanitize.program(sanitize.NATIVE / "amx.cpp", folder, flags)


@pytest.mark.parametrize("name", ["kernel_avx2", "kernel_avx512"])
def test_chains_are_made_of_fused_instructions(name, folder):
    """And not of float64, as where there are none."""
    optimised(folder)
    listing = sanitize.run(["objdump", "-dC", "--no-show-raw-insn", str(folder / f"amx-objects/{name}.o")])
    for function in ("chains_of_one", "chains_of_pairs"):
        code = re.search(rf"^\w+ <[^\n]*{function}\(.*?\n\n", listing + "\n\n", re.M | re.S)[0]
        assert "vfmadd" in code and not re.search(r"vcvt|pd\b|sd\b", code)


@pytest.mark.parametrize("name, flags, absent", [
    ("no-amx", ["-DKARMA_NO_AMX"], {"amx_bf16"}),
    ("g++-10", ["-U__GNUC__", "-D__GNUC__=10"], {"amx_bf16"}),
    ("g++-9", ["-U__GNUC__", "-D__GNUC__=9"], {"amx_bf16", "avx512_bf16"}),
    ("portable", ["-DKARMA_PORTABLE"], {"amx_bf16", "avx512_bf16", "avx512_vnni", "avx512", "avx2"}),
])
def test_kernels_that_a_compiler_does_not_know_are_left_out(name, flags, absent, folder):
    reason = sanitize.missing([], folder) or ("" if os.uname().machine == "x86_64" else "the kernels are of x86")
    if reason:
        pytest.skip(reason)
    main = folder / "paths.cpp"
    main.write_text('#include <cstdio>\n#include "cpu.h"\n'
                    "int main() { for (const karma::Kernel* k : karma::kernels()) std::puts(k->name); }\n")
    kernels = sorted(sanitize.CSRC.glob("kernel_*.cpp"))
    built = sanitize.linked([main, sanitize.CSRC / "cpu.cpp", *kernels], folder / name / "paths", ["-O0", *flags])
    assert not absent & set(sanitize.run([str(built)]).split())
    for path in kernels:
        symbols = sanitize.run(["nm", "-C", str(folder / name / f"paths-objects/{path.stem}.o")])
        short = path.stem.removeprefix("kernel_").replace("amx", "amx_bf16").replace("int8", "vnni")
        assert bool(re.search(r" [DR] karma::k", symbols)) == (short not in absent), path


def test_fast_math_is_refused(folder):
    reason = sanitize.missing([], folder)
    if reason:
        pytest.skip(reason)
    for flag in ("-ffast-math", "-Ofast", "-ffinite-math-only"):
        with pytest.raises(RuntimeError, match="build it without -ffast-math"):
            sanitize.run(["g++", *sanitize.FLAGS, flag, "-fsyntax-only", str(sanitize.CSRC / "cpu.cpp")])


def test_amx_bf16_by_a_software_model_of_its_instructions(folder):
    """The machine code of kernel_amx.cpp runs, but its AMX instructions are done by tests/native/tile_model.h.

    So this checks shapes, strides, operands and what is done with the sums, against what Intel's manual says of the
    instructions; the instructions themselves run only on a CPU that has them, where test_ranks_paths covers the path
    amx_bf16 by itself and this test runs without the model.
    """
    built = optimised(folder)
    done = subprocess.run([built], capture_output=True, text=True)
    if done.returncode == CANNOT_RUN:
        pytest.skip(f"the code around the AMX instructions does not run here: {done.stdout}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("software model", "the CPU's own instructions")

    listing = sanitize.run(["objdump", "-d", "--no-show-raw-insn", str(folder / "amx-objects/kernel_amx.o")])
    found = [tuple(map(int, x)) for x in re.findall(r"tdpbf16ps %tmm(\d),%tmm(\d),%tmm(\d)", listing)]
    # second factor (items), first factor (queries), sum: 2 x 2 tiles
    assert found == [(6, 4, 0), (7, 4, 1), (6, 5, 2), (7, 5, 3)]
    names = Counter(re.findall(r"\b(ldtilecfg|tilerelease|tilezero|tileloadd|tilestored)\b", listing))
    assert names == {"ldtilecfg": 1, "tilerelease": 1, "tilezero": 4, "tileloadd": 4, "tilestored": 4}
