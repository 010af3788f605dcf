"""The chunked implementation against the definition, and the operator under autograd, torch.compile and the rest."""

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from info_nce_inputs import gradients, make
from torch.autograd import forward_ad

from karma_fast import InfoNCELoss
from karma_fast.planning.simulated import Simulation
from karma_kernels import info_nce
from karma_kernels.info_nce import chunked, op, routing
from karma_kernels.numerics import add_product, product
from karma_kernels.ranks import on_gpu
from karma_kernels.soft_prompt import routing as prompts

# labels, ids (2: of two kinds), log_q, symmetric, normalize
FLAGS = list(itertools.product([False, True], [False, True, 2], *[[False, True]] * 3))


@pytest.mark.parametrize("labels,ids,log_q,symmetric,normalize", FLAGS)
def test_chunked_equals_the_definition(labels, ids, log_q, symmetric, normalize):
    inputs = make(labels=labels, ids=ids, log_q=log_q)
    for reduction, weights in (("none", torch.linspace(-1, 2, 7, dtype=torch.float64)), ("mean", 0.7), ("sum", 1.0)):
        options = {"symmetric": symmetric, "normalize": normalize, "reduction": reduction}
        expected = gradients(inputs, weights, backend="reference", **options)
        for workspace_bytes in (1, 500, 5000, 1 << 20):
            found = gradients(inputs, weights, backend="chunked", workspace_bytes=workspace_bytes, **options)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("labels,ids,log_q,symmetric,normalize", FLAGS)
def test_chunked_gradcheck(labels, ids, log_q, symmetric, normalize):
    inputs = make(rows=3, keys=5, width=3, labels=labels, ids=ids, log_q=log_q)
    names = [name for name, x in inputs.items() if x.is_floating_point()]
    for reduction in ("none", "mean"):
        def loss(*tensors, reduction=reduction):
            return info_nce(**(inputs | dict(zip(names, tensors, strict=True))), symmetric=symmetric,
                            normalize=normalize, reduction=reduction, backend="chunked")

        assert torch.autograd.gradcheck(loss, [inputs[name].clone().requires_grad_() for name in names])


@given(st.integers(1, 9), st.integers(0, 6), st.integers(1, 9), st.integers(0, 10**6), st.booleans(), st.booleans(),
       st.integers(1, 3000), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
       st.sampled_from(["whole", "columns", "every other row", "expanded"]), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_chunked_any_shape(rows, extra, width, seed, symmetric, normalize, workspace, dtype, layout, distinct):
    inputs = make(rows, rows + extra, width, seed, dtype)
    inputs["key_ids"] %= distinct
    change = {"whole": lambda x: x, "columns": lambda x: x.t().contiguous().t(),
              "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
              "expanded": lambda x: x[:1].expand(x.shape)}[layout]
    inputs |= {name: change(inputs[name]) for name in ("query", "key")}
    options = {"symmetric": symmetric, "normalize": normalize}
    expected = gradients(inputs, backend="reference", **options)
    found = gradients(inputs, backend="chunked", workspace_bytes=workspace, **options)
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("symmetric", [False, True])
def test_chunked_hard_inputs(symmetric):
    """Scale 100 at width 4096 with rows alike (cosine 0.6), a sure row, everything masked, one row, odd width."""
    g = torch.Generator().manual_seed(1)
    query, key = (torch.randn(n, 4096, generator=g, dtype=torch.float64) for n in (9, 18))
    query[:, 0] += 78.4
    key[:, 0] += 78.4
    base = make(9, 18, 513)
    cases = [{"query": query, "key": key, "scale": torch.tensor(100.0).double()}, base,
             base | {"key_ids": torch.zeros(18, dtype=torch.long)}, make(1, 1), make(1, 17),
             {"query": torch.eye(4).double(), "key": torch.eye(4).double(), "scale": torch.tensor(200.0).double()}]
    for inputs in cases:
        for workspace_bytes in (3000, 64 << 20):
            options = {"symmetric": symmetric, "normalize": True}
            found = gradients(inputs, backend="chunked", workspace_bytes=workspace_bytes, **options)
            small = 1e-200 if len(inputs["query"]) == 4 else 1e-13  # the sure rows' losses are e^-200
            torch.testing.assert_close(found, gradients(inputs, backend="reference", **options), rtol=1e-8, atol=small)


def test_a_sure_row_keeps_its_digits_in_float32():
    query, key = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[1.0], [0.0]])
    loss = info_nce(query, key, scale=40.0, backend="chunked")
    loss.backward()
    assert loss.item() == pytest.approx(4.248354255291589e-18, rel=1e-5, abs=0)
    assert query.grad.item() == pytest.approx(-40 * 4.248354255291589e-18, rel=1e-5, abs=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_not_finite_shows(bad, symmetric, normalize):
    for name, place in (("query", (1, 0)), ("key", (10, 0)), ("log_q", (3,)), ("scale", ())):
        inputs = make(dtype=torch.float32, labels=False)
        inputs[name][place] = bad
        for workspace_bytes in (400, 1 << 20):
            found = gradients(inputs, symmetric=symmetric, normalize=normalize, backend="chunked",
                              workspace_bytes=workspace_bytes)
            assert found[0].isnan() and found[1].isnan().any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_float16_rows_of_different_lengths_in_pieces(symmetric):
    """Short rows in one piece, nothing but zeros in another; 3 pieces in one pass for one direction."""
    plan = chunked.Plan.of(300, 310, 16, torch.float16, symmetric, True, 330_000)
    assert plan.one_pass != symmetric and 2 * plan.rows < 300
    inputs, length = make(300, 310, 16, dtype=torch.float16), torch.full((300, 1), 8.0)
    inputs["log_q"] = inputs["log_q"].float()
    length[6], length[8], length[plan.rows:2 * plan.rows] = 0.02, 0.5, 0.0
    inputs["query"] = torch.nn.functional.normalize(inputs["query"].float()).mul(length).half()
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    options = {"normalize": True, "symmetric": symmetric, "reduction": "sum"}
    found = gradients(inputs, backend="chunked", workspace_bytes=330_000, **options)
    expected = gradients(exact, backend="reference", **options)
    for a, b in zip(found, expected, strict=True):  # row by row: the shortest has by far the largest gradient
        a, b = (x if x.ndim == 2 else x[None] for x in (a.double(), b))
        assert ((a - b).norm(dim=-1) <= 2e-3 * b.norm(dim=-1)).all()


def test_a_row_without_an_inverse_length_shows():
    inputs = make(dtype=torch.float32)
    for factor, visible in ((1e-44, True), (3e37, False), (0.0, False)):
        changed = inputs | {"query": inputs["query"].sign() * factor}
        assert info_nce(**changed, normalize=True, backend="chunked").isnan() == visible


@pytest.mark.parametrize("symmetric", [False, True])
def test_wrong_labels_give_nan_where_they_are_not_looked_at(symmetric):
    """As on a GPU: the operator itself does not wait for a look."""
    query, key = torch.randn(3, 2), torch.randn(4, 2)
    for labels in ([0, 1, 4], [0, -1, 2]) + (([0, 1, 1],) if symmetric else ()):
        loss, *_ = op.info_nce_op(query, key, torch.tensor(labels), torch.tensor(1.0), None, None, None, symmetric,
                                  False, False, 0, "chunked", 1 << 20)
        assert loss.isnan()


def test_same_bits_twice_and_written_numbers(monkeypatch):
    inputs = make(40, 60, 16, dtype=torch.float32)
    once = gradients(inputs, symmetric=True, backend="chunked", workspace_bytes=5000)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    again = gradients(inputs, symmetric=True, backend="chunked", workspace_bytes=5000)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_memory_stays_within_the_workspace():
    """4096 x 4096 scores would be 64 MiB; allowed are gradients, statistics and 1 MiB, allocation by allocation."""
    inputs = {"query": torch.randn(4096, 32), "key": torch.randn(4096, 32), "key_ids": torch.arange(4096) % 1000}
    for symmetric in (False, True):
        info_nce(**inputs, backend="chunked")  # loads what is loaded once
        leaves = inputs | {name: inputs[name].clone().requires_grad_() for name in ("query", "key")}
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            info_nce(**leaves, symmetric=symmetric, normalize=True, backend="chunked",
                     workspace_bytes=1 << 20).backward()
        now = peak = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        gradients_bytes = 2 * 2 * 4096 * 32 * 4  # formed in the forward, and times the upstream gradient
        assert peak > gradients_bytes // 2  # the measurement sees something
        assert peak <= gradients_bytes + (1 << 20) + 4096 * 4 * 40


# ---- the operator ----

@pytest.mark.parametrize("symmetric,per_row,formed",
                         [(False, False, True), (False, True, False), (True, False, False)])
def test_opcheck(symmetric, per_row, formed):
    inputs = make(dtype=torch.float32)
    leaves = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    bits = op.QUERY | op.KEY | op.SCALE | op.LOG_Q if formed else 0
    args = [leaves.get(n) for n in ("query", "key", "labels", "scale", "query_ids", "key_ids", "log_q")]
    torch.library.opcheck(op.info_nce_op, (*args, symmetric, True, per_row, bits, "chunked", 1 << 20))
    if not formed:
        saved = op.info_nce_op(*args, symmetric, True, per_row, bits, "chunked", 1 << 20)[1].detach()
        args = [None if x is None else x.detach() for x in args]
        for wanted in (15, *op.BITS):
            torch.library.opcheck(op.backward_op, (*args, symmetric, True, wanted, "chunked", 1 << 20, saved,
                                                   torch.ones(7)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_compiled_in_one_graph(symmetric, reduction, backend):
    inputs = make(dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def loss(**x):
        return info_nce(**x, symmetric=symmetric, reduction=reduction, normalize=True, backend=backend)

    leaves = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    found = loss(**leaves)
    found.sum().backward()
    expected = gradients(inputs, symmetric=symmetric, reduction=reduction, normalize=True, backend=backend)
    found = [found.detach(), *(x.grad for x in leaves.values() if x.is_floating_point())]
    torch.testing.assert_close(found, expected)


def test_compiled_for_any_size():
    compiled = torch.compile(lambda q, k: info_nce(q, k, scale=5.0, backend="chunked"), fullgraph=True,
                             backend="aot_eager", dynamic=True)
    for rows, keys in ((5, 8), (6, 9), (7, 7)):
        query, key = torch.randn(rows, 4, requires_grad=True), torch.randn(keys, 4)
        compiled(query, key).backward()
        expected = gradients({"query": query.detach(), "key": key, "scale": torch.tensor(5.0)}, backend="reference")
        torch.testing.assert_close(query.grad, expected[1])


def test_compiled_module():
    module = InfoNCELoss(scale=10.0, symmetric=True, backend="chunked")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    query, key = torch.randn(6, 4), torch.randn(6, 4)
    torch.testing.assert_close(compiled(query, key), module(query, key))


@pytest.mark.parametrize("symmetric", [False, True])
def test_autocast(symmetric):
    inputs = make(dtype=torch.float32)
    expected = gradients(inputs, backend="chunked", normalize=True, symmetric=symmetric)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the backward too
        found = gradients(inputs, backend="chunked", normalize=True, symmetric=symmetric)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_twice_in_one_step_and_a_graph_kept():
    inputs = make()
    query = inputs["query"].clone().requires_grad_()
    args = inputs | {"query": query}
    loss = info_nce(**args, backend="chunked") + 2 * info_nce(**args, symmetric=True, backend="chunked")
    loss.backward(retain_graph=True)
    once = query.grad.clone()
    loss.backward()
    torch.testing.assert_close(query.grad, 2 * once)
    expected = info_nce(**args, backend="reference") + 2 * info_nce(**args, symmetric=True, backend="reference")
    torch.testing.assert_close(once, torch.autograd.grad(expected, query)[0])


@pytest.mark.parametrize("only", ["query", "key", "scale", "log_q"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_only_one_gradient_wanted(only, reduction, symmetric):
    inputs = make()
    options = {"reduction": reduction, "symmetric": symmetric}
    whole = dict(zip(["loss", "query", "key", "log_q", "scale"], gradients(inputs, backend="reference", **options),
                     strict=True))
    leaf = inputs[only].clone().requires_grad_()
    info_nce(**(inputs | {only: leaf}), backend="chunked", **options).sum().backward()
    torch.testing.assert_close(leaf.grad, whole[only])


def test_no_gradients_are_formed_where_none_are_wanted(monkeypatch):
    seen = []
    forward = chunked.forward
    monkeypatch.setattr(chunked, "forward", lambda x, wanted: seen.append(wanted.any) or forward(x, wanted))
    inputs = make()
    info_nce(**inputs, backend="chunked")
    with torch.no_grad():
        info_nce(**(inputs | {"query": inputs["query"].clone().requires_grad_()}), backend="chunked")
    assert seen == [False, False]


def test_the_gradient_of_the_gradient_is_refused():
    inputs = make()
    query = inputs["query"].clone().requires_grad_()
    for reduction in ("mean", "none"):
        loss = info_nce(**(inputs | {"query": query}), reduction=reduction, backend="chunked").sum()
        with pytest.raises(RuntimeError, match="backend='reference'"):
            torch.autograd.grad(loss, query, create_graph=True)


def test_derivatives_that_only_the_reference_has():
    inputs = make()
    query, tangent = inputs["query"], torch.randn(7, 5, dtype=torch.float64)

    def loss(backend):
        return lambda q: info_nce(**(inputs | {"query": q}), backend=backend)

    # so many that auto would not take the reference for their number
    many, key, direction = (torch.randn(2000, 4, dtype=torch.float64) for _ in range(3))
    leaf = many.clone().requires_grad_()
    exact = torch.autograd.grad(info_nce(leaf, key, scale=2.0, backend="reference"), leaf)[0]
    _, found = torch.func.jvp(lambda q: info_nce(q, key, scale=2.0), (many,), (direction,))
    torch.testing.assert_close(found, (exact * direction).sum())
    torch.testing.assert_close(torch.func.grad(lambda q: info_nce(q, key, scale=2.0))(many), exact)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.jvp(loss("chunked"), (query,), (tangent,))
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.grad(loss("chunked"))(query)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="backend='reference'"):
        loss("chunked")(forward_ad.make_dual(query, tangent))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_large_logits_in_float32(symmetric, reduction):
    """The sums are relative to exactly one of the logits, however large they are."""
    inputs = make(300, 400, 8, dtype=torch.float32) | {"scale": torch.tensor(1e6)}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    options = {"symmetric": symmetric, "reduction": reduction}
    found, expected = gradients(inputs, backend="chunked", **options), gradients(exact, backend="reference", **options)
    for a, b in zip(found[1:4], expected[1:4], strict=True):
        assert (a.double() - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("keys", [0, 3])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_rows(keys, symmetric, reduction):
    tensors = [torch.zeros(0, 2, requires_grad=True), torch.randn(keys, 2, requires_grad=True),
               torch.zeros(keys, requires_grad=True), torch.tensor(2.0, requires_grad=True)]
    query, key, log_q, scale = tensors
    loss = info_nce(query, key, log_q=log_q, scale=scale, symmetric=symmetric, key_ids=torch.arange(keys),
                    reduction=reduction, backend="chunked").sum()
    loss.backward()
    assert loss.item() == 0
    assert all(x.grad is not None and not x.grad.any() for x in tensors)


class Products(Simulation):
    """A simulation that keeps which products were formed, and of what."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__("cuda", capability)
        self.formed: list[tuple] = []  # (name, whether to a dtype that is asked for, dtypes of the factors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname.startswith(("mm", "addmm")):
            factors = [x.dtype for x in args if isinstance(x, torch.Tensor)][-2:]
            self.formed.append((func._opname.rstrip("_"), func._overloadname.startswith("dtype"), *factors))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("dtype,card,setting,narrow", [
    (torch.float16, (7, 5), None, True), (torch.float16, (9, 0), "accumulation", False),
    (torch.bfloat16, (8, 0), None, True), (torch.bfloat16, (9, 0), "accumulation", True),
    (torch.bfloat16, (7, 5), None, False), (torch.float16, (9, 0), "tuned", False)])
def test_products_with_float32_sums_on_a_gpu(dtype, card, setting, narrow, monkeypatch):
    """Where torch refuses to form them of narrow numbers, they are converted first."""
    torch.backends.cuda.matmul.allow_fp16_accumulation = setting == "accumulation"
    try:
        with Products(card).entered() as simulation:
            if setting == "tuned":
                monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: True)
            a, out = torch.ones(4, 100, dtype=dtype, device="cuda"), torch.ones(4, 4, device="cuda")
            assert product(a, a.T, torch.float32).dtype == torch.float32
            product(a, a.T, torch.float32, out)
            add_product(out, a, a.T)
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    kinds = (dtype, dtype) if narrow else (torch.float32, torch.float32)
    assert simulation.formed == [(name, narrow, *kinds) for name in ("mm", "mm", "addmm")]


@pytest.mark.parametrize("rows,keys,width", [(256, 1_000_000, 768), (1_000_000, 16, 768), (5000, 5000, 4096),
                                             (3, 7, 5)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("workspace_bytes", [1 << 20, 64 << 20])
def test_what_is_converted_for_products_is_within_the_workspace(rows, keys, width, symmetric, workspace_bytes):
    tile_rows, tile_keys, _ = routing.library_tile(rows, keys, 2, symmetric, workspace_bytes, width)
    scores = tile_rows * tile_keys * (10 + symmetric)  # in float32, the gradient in both dtypes, of keys by blocks
    assert scores <= workspace_bytes // 2 and 4 * width * max(tile_rows, tile_keys) <= workspace_bytes // 4
    assert 0 < tile_rows <= rows and 0 < tile_keys <= keys


NO_TRITON = """
import sys, warnings
from types import SimpleNamespace
import torch
from karma_kernels import info_nce, soft_prompt
from karma_kernels.info_nce import check_fused, routing
from karma_kernels.ranks import on_gpu
from karma_kernels.soft_prompt import checks, routing as prompts

torch.cuda.is_available, torch.version.cuda = lambda: True, "12.8"
torch.cuda.get_device_capability = lambda index: (9, 0)
gpu, many = torch.device("cuda", 0), 1 << 13
x = SimpleNamespace(device=gpu, dtype=torch.bfloat16, shape=(many, 64))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    print(routing.route(many, many, torch.bfloat16, gpu), routing.module_of("chunked", gpu, torch.float32),
          prompts.route(torch.bfloat16, 100, 576, gpu), on_gpu(x), len(said))
for check in (check_fused, checks.check_fused):
    try:
        check(x)
    except RuntimeError as error:
        print(error)
print(said[0].message)
"""


@pytest.mark.parametrize("environment,reason", [
    ({"PATH": ""}, "RuntimeError: Failed to find C compiler"),
    ({"CC": "false"}, "CalledProcessError: Command '['false'"),
    ({"TRITON_CACHE_DIR": "/dev/null/cache"}, "NotADirectoryError")])
def test_where_triton_cannot_launch_others_serve(environment, reason, tmp_path):
    """As on a GPU without a C compiler or Python's headers: slower, not broken; "fused" says why."""
    pytest.importorskip("triton")
    folders = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    known = {name: x for name, x in os.environ.items() if name != "CC"}
    done = subprocess.run([sys.executable, "-c", NO_TRITON], text=True, capture_output=True, timeout=120,
                          env=known | folders | {"PYTHONPATH": str(Path(routing.__file__).parents[2])} | environment)
    assert done.returncode == 0, done.stderr
    first, *errors, warning = done.stdout.splitlines()
    assert first == "chunked chunked chunked False 1"
    assert len(errors) == 2 and all("backend 'fused' needs Triton, which cannot launch" in x for x in errors)
    assert all(reason in x and "gcc, python3-dev" in x and "take backend='chunked'" in x for x in errors)
    assert warning.startswith("plain torch serves instead of Triton, which cannot launch") and reason in warning


def test_compiled_functions_ask_for_triton_and_conversions(monkeypatch):
    """What decides does not break the graph, though one of them is cached and runs other programs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: False)
    gpu = torch.device("cuda", 0)

    @torch.compile(backend="eager", fullgraph=True)
    def chosen(x):
        formed = routing.forms_gradients(8, 1 << 20, 768, x.dtype, gpu, False, False, "library", 64 << 20)
        return x + 1 if routing.has_triton() and formed else x - 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = routing.has_triton()
        narrow, wide = (chosen(torch.zeros(2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert (narrow == -1).all() and (wide == (1 if kept else -1)).all()


def test_automatic_choice():
    cpu, few, many = torch.device("cpu"), 16, 1 << 13
    assert routing.route(few, few, torch.float32, cpu) == "reference"
    assert routing.route(many, many, torch.float32, cpu) == "chunked"
    assert routing.route(many, many, torch.float32, torch.device("mps")) == "reference"


@pytest.mark.parametrize("cuda,card,half,full,module", [
    ("12.8", (9, 0), "fused", "chunked", "library"), ("12.8", (7, 5), "chunked", "chunked", "library"),
    ("12.8", (7, 0), "chunked", "chunked", "chunked"), (None, (9, 4), "chunked", "chunked", "chunked")])
def test_automatic_choice_on_gpus(cuda, card, half, full, module, monkeypatch):
    """torch calls those of AMD "cuda" too; the kernels are written and compiled for those of NVIDIA."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: card)
    gpu, many = torch.device("cuda", 0), 1 << 13
    assert routing.route(many, many, torch.bfloat16, gpu) == half
    assert routing.route(many, many, torch.float32, gpu) == full
    assert routing.module_of("chunked", gpu, torch.float32) == module
    assert routing.module_of("chunked", gpu, torch.float64) == "chunked"
    assert prompts.route(torch.bfloat16, 100, 576, gpu) == half
    assert prompts.route(torch.float64, 100, 576, gpu) == "chunked"
    assert on_gpu(SimpleNamespace(device=gpu)) == (module == "library")
