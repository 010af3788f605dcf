"""Every configuration of the Triton kernels, compiled for six architectures: no spills, within memory, tensor cores.

`pytest -s tests/test_compile_gate.py` prints what was compiled, one line a kernel. Nothing here needs a GPU. Triton
keeps what it compiled in pytest's cache, under the hash of source, compiler and options; --cache-clear empties it.

All architectures: bfloat16 with all options and with none, over all widths. All but 8.9, which compiles as 8.6 does:
ragged ends, TF32. Some: float16, exact float32, mixed options, odd widths, one row, more than 2**31 elements. For 7.5,
on which only kernels without products run, those.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="the Triton kernels need Triton, which exists for Linux")
import triton.language as tl  # noqa: E402
from ahead_of_time import Launch, compiling_for, table  # noqa: E402

from karma_kernels.info_nce import fused, library, op  # noqa: E402
from karma_kernels.info_nce.problem import Wanted  # noqa: E402
from karma_kernels.ranks import configs  # noqa: E402
from karma_kernels.ranks import launch as ranks  # noqa: E402
from karma_kernels.ranks.parts import Plan  # noqa: E402
from karma_kernels.soft_prompt import fused as fused_prompt  # noqa: E402
from karma_kernels.soft_prompt import op as projection  # noqa: E402

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
OLDEST = 75  # Triton has no tensor cores for it
FASTEST = {90: "wgmma", 100: "tcgen05"}  # elsewhere mma.sync
WIDTHS = (32, 64, 128, 256, 512, 768, 1024, 2048, 4096)
FLAGS = ("ids", "log_q", "normalize", "symmetric")
TWO = "two kinds of ids"
KERNELS = {"row_factors_kernel", "positives_kernel", "statistics_kernel", "merge_kernel", "finish_kernel",
           "gradient_rows_kernel", "gradient_tile_kernel"}
SCORES = {"statistics_kernel", "gradient_rows_kernel", "gradient_tile_kernel"}
EXACT_KERNELS = {"pair_scores_kernel", "resolve_kernel", "exact_kernel"}  # of ranks


class Batch(NamedTuple):
    """Compiled in one process, one problem after the other, so that nothing is compiled twice."""

    capability: int
    kind: str  # of numbers: a dtype, or "tf32" and "ieee" products of float32
    flags: frozenset[str]
    shapes: tuple[tuple[int, int, int], ...]  # (B, N, D)

    def __str__(self) -> str:
        flags = "all" if len(self.flags) == len(FLAGS) else "-".join(sorted(self.flags)) or "plain"
        widths = "-".join(str(shape[2]) for shape in self.shapes)
        return f"sm{self.capability}-{self.kind}-{flags}-D{widths if len(widths) < 20 else 's'}"


ALL, NONE = frozenset(FLAGS), frozenset()
SQUARE = tuple((65536, 65536, width) for width in WIDTHS)
RAGGED = ((1000, 1001, 128), (1000, 1001, 768))  # the last rows and keys do not fill a block
ODD = ((1000, 1001, 100), (1000, 1001, 513))  # nor are the widths aligned
ONE = ((1, 1, 1),)  # arguments equal to 1 become constants
LARGE = ((8192, 8192, 256), (8192, 1_000_000, 4096))  # one pass does; elements beyond 2**31
MIXED = ({"ids", "log_q"}, {"normalize", "symmetric"}, {"ids", "normalize"}, {"log_q", "symmetric"})  # any two differ
BATCHES = [
    *(Batch(sm, "bfloat16", flags, SQUARE) for sm in ARCHITECTURES for flags in (ALL, NONE)),
    *(Batch(sm, "bfloat16", ALL, RAGGED) for sm in ARCHITECTURES),
    *(Batch(sm, "bfloat16", ALL, ODD) for sm in (80, 90)),
    Batch(90, "bfloat16", ALL, ONE),
    *(Batch(90, "bfloat16", flags, LARGE) for flags in (ALL, NONE)),
    *(Batch(90, "bfloat16", frozenset(flags), SQUARE[2:5:2]) for flags in MIXED),
    *(Batch(sm, "bfloat16", frozenset({"ids", TWO, "log_q"}), SQUARE[1:6:2]) for sm in ARCHITECTURES),  # KarmaModel's
    *(Batch(sm, "bfloat16", ALL | {TWO}, SQUARE[3:4]) for sm in (90, 120)),
    *(Batch(sm, "float16", ALL, SQUARE[2:5:2]) for sm in ARCHITECTURES),
    *(Batch(sm, "tf32", ALL, SQUARE[1:5]) for sm in ARCHITECTURES),
    *(Batch(sm, "ieee", ALL, SQUARE[1:5]) for sm in (80, 86, 90, 120)),
    *(Batch(OLDEST, kind, ALL, SQUARE[3:4]) for kind in ("float16", "bfloat16", "ieee")),
]


def compile_batch(batch: Batch) -> list[Launch]:
    torch.set_float32_matmul_precision("highest" if batch.kind == "ieee" else "high")
    dtype = torch.float32 if batch.kind in ("tf32", "ieee") else getattr(torch, batch.kind)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    launches: list[Launch] = []
    for rows, keys, width in batch.shapes:
        kinds = (2,) if TWO in batch.flags else ()
        ids = [empty(n, *kinds, dtype=torch.int64) if "ids" in batch.flags else None for n in (rows, keys)]
        log_q = empty(keys) if "log_q" in batch.flags else None
        x = op.problem(empty(rows, width, dtype=dtype), empty(keys, width, dtype=dtype),
                       empty(rows, dtype=torch.int64), empty(), *ids, log_q, "symmetric" in batch.flags,
                       "normalize" in batch.flags, 64 << 20)
        wanted = Wanted(query=True, key=True, scale=True, log_q=log_q is not None)
        for implementation in (library,) if batch.capability == OLDEST else (fused, library):
            with compiling_for(batch.capability) as found:
                _, saved, _ = implementation.forward(x, wanted)
                implementation.backward(x, saved, empty(rows), wanted)
            launches += [launch for launch in found if launch not in launches]
    return launches


@pytest.fixture(scope="module")
def pool(request):
    """Two processes of their own: Triton as it is without the interpreter, whatever the other tests use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton")))
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as running:
            yield running
            running.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def compiled(pool, request):
    """{batch: future list of launches} of the batches that were selected, and a table of them all in the end."""
    selected = [item.callspec.params["batch"] for item in request.session.items
                if item.path == request.path and "batch" in getattr(getattr(item, "callspec", None), "params", {})]
    futures = {batch: pool.submit(compile_batch, batch) for batch in selected}
    yield futures
    done = [launch for future in futures.values() if future.done() and not future.exception()
            for launch in future.result()]
    print(f"\n{table(done)}\n{len(done)} kernels, {sum(launch.seconds for launch in done):.0f} s of compilation")


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_kernels_fit_do_not_spill_and_use_tensor_cores(batch, compiled):
    launches = compiled[batch].result()
    found = {launch.kernel for launch in launches}
    oldest = batch.capability == OLDEST
    assert found >= KERNELS - ({"gradient_rows_kernel", "gradient_tile_kernel"} if batch.shapes != SQUARE else set())
    assert not oldest or not any(launch.dots for launch in launches)
    bad = [launch for launch in launches if launch.problems()]
    problems = sorted({problem for launch in bad for problem in launch.problems()})
    assert not bad, "\n".join([*problems, table(bad)])
    # the gradient is formed from the very logits that the statistics saw
    assert all(launch.rounded for launch in launches if launch.kernel in SCORES)
    if batch.kind in ("bfloat16", "float16") and not oldest:
        kinds = {launch.tensor_core for launch in launches if launch.dots}
        assert kinds == {FASTEST.get(batch.capability, "mma.sync")}


def compile_ranks(capability: int) -> list[Launch]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, pairs = empty(20000, dtype=torch.int64), empty(1 << 20, dtype=torch.int32)
    launches: list[Launch] = []
    for width, kind in ((64, torch.float32), (256, torch.float32), (1024, torch.bfloat16), (101, torch.float32)):
        queries, items, scores = empty(20000, width, dtype=kind), empty(60000, width, dtype=kind), empty(20000)
        with compiling_for(capability) as found:
            if capability != OLDEST:
                tile, buffer = configs.filter_tile(queries.device), empty(1 << 28, dtype=torch.float16)
                targets = ranks.Copies.of(queries, rows, scores, tile.targets, buffer)
                copies = ranks.Copies.of(items, None, scores[:1], tile.items, buffer)
                limits = ranks.Thresholds.of(scores, targets, copies, width, tile.items)
                ranks.launch_filter(targets.values, copies, limits, len(items), rows.int(), ranks.Close.empty(pairs))
                ranks.launch_resolve(queries, items, rows, scores, pairs, len(pairs), rows, rows)
            columns = Plan.of(width, queries.device, 64 << 20).columns
            ranks.launch_exact(queries, items, rows, scores, rows, rows, empty(columns))
            ranks.pair_scores(queries, items, rows, rows)
        launches += [launch for launch in found if launch not in launches]
    return launches


def test_kernels_of_ranks_and_their_arithmetic(pool):
    """Besides the rest: where scores decide, nothing but fma.rn.f32 touches a float32."""
    launches = [launch for found in pool.map(compile_ranks, (OLDEST, *ARCHITECTURES)) for launch in found]
    print(f"\n{table(launches)}")
    bad = [launch for launch in launches if launch.problems()]
    assert not bad, table(bad)
    for capability in (OLDEST, *ARCHITECTURES):
        found = [launch for launch in launches if launch.capability == capability]
        filtered = {"filter_kernel", "round_rows_kernel", "resolve_kernel"} if capability != OLDEST else set()
        cores = {FASTEST.get(capability, "mma.sync")} if filtered else set()
        assert {x.kernel for x in found} == {"pair_scores_kernel", "exact_kernel"} | filtered
        assert all(x.fused for x in found if x.kernel in EXACT_KERNELS)
        read = [x.arguments for x in found if x.kernel == "exact_kernel"]
        assert read and all("q:*fp32 x:*fp32 " in arguments for arguments in read)  # 16 bytes at once
        assert {x.tensor_core for x in found if x.dots} == cores
        assert len([x for x in found if x.kernel == "pair_scores_kernel"]) == 3


# What the harness sees, by a small kernel of our own.


@triton.jit
def product_kernel(x, y, out, n, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n):
        a, b = tl.load(x + start * BLOCK + at), tl.load(y + start * BLOCK + at)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(out + at, acc)


@triton.jit
def sum_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))


def product(capability: int, dtype: torch.dtype = torch.bfloat16, precision: str = "ieee", block: int = 64,
            **options: int) -> Launch:
    x = torch.empty(block, block, dtype=dtype, device="meta")
    with compiling_for(capability) as launches:
        product_kernel[(1,)](x, x, x.float(), 4096, precision, block, **options)
    return launches[0]


def several_sums() -> list[list[Launch]]:
    x, everything = torch.empty(4096, device="meta"), []
    with compiling_for(80) as launches:
        for start, n in ((0, 4096), (0, 2048), (0, 4095), (0, 1), (1, 4096)):
            before = len(launches)
            sum_kernel[lambda arguments: 1 / 0](x[start:], x, n, 1024)
            everything.append(launches[before:])
    return everything


def test_a_clean_product_has_no_problems(pool):
    for capability, kind in ((80, "mma.sync"), (86, "mma.sync"), (89, "mma.sync"), (90, "wgmma"), (100, "tcgen05"),
                             (120, "mma.sync")):
        launch = pool.submit(product, capability, num_warps=4).result()
        assert (launch.problems(), launch.tensor_core, launch.dots, launch.stack) == ([], kind, 1, 0)
        assert launch.capability == capability and launch.kernel == "product_kernel" and launch.num_warps == 4
        assert 16 < launch.registers <= 255 and launch.shared >= 2 * 64 * 64 * 2
        assert (launch.tensor_memory > 0) == (capability == 100)


def test_spills_are_seen(pool):
    launch = pool.submit(product, 80, block=128, num_warps=4, maxnreg=64).result()
    assert launch.registers <= 64 and launch.stack > 0
    assert any("spill" in problem for problem in launch.problems())


def test_too_much_shared_memory_is_seen(pool):
    launches = [pool.submit(product, capability, block=128, num_warps=8, num_stages=3) for capability in (80, 86, 90)]
    sizes = [launch.result().shared for launch in launches]
    assert sizes[0] == sizes[1] > 99 * 1024
    assert [any("shared" in p for p in launch.result().problems()) for launch in launches] == [False, True, False]


def test_missing_tensor_cores_are_seen(pool):
    turing = pool.submit(product, 75, torch.float16, block=16, num_warps=4).result()  # Triton has none for it
    assert turing.dots == turing.slow_dots == 1 and turing.problems() == ["no tensor core instruction"]
    exact = pool.submit(product, 80, torch.float32, block=32, num_warps=4).result()
    assert exact.dots == 0 and exact.tensor_core is None and exact.problems() == []
    rounded = pool.submit(product, 80, torch.float32, "tf32", block=32, num_warps=4).result()
    assert rounded.dots == 1 and rounded.tensor_core == "mma.sync" and rounded.problems() == []
    assert replace(rounded, slow_dots=1).problems() == ["a dot without tensor cores"]


def test_other_limits_are_seen(pool):
    launch = pool.submit(product, 100, num_warps=4).result()
    assert "tensor memory" in replace(launch, tensor_memory=513).problems()[0]
    assert "registers for each of 1024 threads" in replace(launch, registers=65, num_warps=32).problems()[0]


def test_each_specialisation_is_compiled_once(pool):
    first, same, ragged, one, shifted = pool.submit(several_sums).result()
    assert [len(x) for x in (first, same, ragged, one, shifted)] == [1, 0, 1, 1, 1]
    assert first[0].dots == 0 and first[0].problems() == [] and not first[0].fused  # adds
    assert "x:*fp32 " in first[0].arguments and "n:i32 " in first[0].arguments
    assert "n:i32?" in ragged[0].arguments and "n=1" in one[0].arguments and "x:*fp32?" in shifted[0].arguments


def leaves_no_trace() -> bool:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def state() -> list:
        return [JITFunction.run, driver._active, torch.cuda.get_device_capability, torch.cuda.get_device_properties]

    before = state()
    with pytest.raises(ZeroDivisionError), compiling_for(80):
        assert all(a is not b for a, b in zip(before, state(), strict=True))
        assert torch.cuda.get_device_capability(0) == (8, 0)
        1 / 0  # noqa: B018
    return all(a is b for a, b in zip(before, state(), strict=True))


def test_everything_is_put_back(pool):
    assert pool.submit(leaves_no_trace).result()


PROJECTIONS = (*((256, 256, hidden, 1) for hidden in (576, 1536, 2048, 4096)),  # in, mid, hidden, num_tokens
               (704, 704, 576, 4), (13, 100, 577, 3),  # through the workspace; nothing is aligned
               (704, 704, 4096, 1), (704, 704, 16384, 1))  # the widest rows that a program holds


def compile_projection(capability: int) -> list[Launch]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    launches: list[Launch] = []
    for kind, products in ((torch.bfloat16, "high"), (torch.float16, "high"), (torch.float32, "high"),
                           (torch.float32, "highest")):
        torch.set_float32_matmul_precision(products)
        for width, mid, hidden, num_tokens in PROJECTIONS if kind == torch.bfloat16 else PROJECTIONS[::5]:
            n, rows = (65536, 16384) if width == 256 else (961, 401)
            places = [empty(n, dtype=torch.int64) for _ in range(2)]
            weights = empty(width), empty(mid, width), empty(mid), empty(num_tokens * hidden, mid)
            learned = empty(2, hidden) if num_tokens == 1 else None
            x = projection.problem("fused", *places, empty(rows, width), *weights, empty(150_000, hidden, dtype=kind),
                                   learned, empty(), num_tokens, 1e-6)
            with compiling_for(capability) as found:
                out, before = fused_prompt.forward(x)
                fused_prompt.backward(x, before, out, frozenset(("w2", "table", "learned"))
                                      if learned is not None else frozenset(("w2",)))
            launches += [launch for launch in found if launch not in launches]
    return launches


def test_kernels_of_the_projection(pool):
    launches = [launch for found in pool.map(compile_projection, ARCHITECTURES) for launch in found]
    print(f"\n{table(launches)}")
    bad = [launch for launch in launches if launch.problems()]
    assert not bad, table(bad)
    for capability in ARCHITECTURES:
        found = [launch for launch in launches if launch.capability == capability]
        assert {x.kernel for x in found} == {"lengths_kernel", "write_kernel", "place_kernel", "through_norm_kernel",
                                             "row_sums_kernel"}
        assert {x.tensor_core for x in found if x.dots} == {FASTEST.get(capability, "mma.sync")}
