"""The shipped Triton kernels, interpreted: against the definition in float64, with every combination of flags."""

import itertools
import sys

import pytest
import torch
from info_nce_inputs import gradients
from info_nce_inputs import make as inputs_of

from karma_kernels import info_nce
from karma_kernels.info_nce import configs, fused, launch, library, op, routing
from karma_kernels.info_nce.problem import Wanted

# labels, ids (2: of two kinds), log_q, symmetric, normalize
FLAGS = list(itertools.product([False, True], [False, True, 2], *[[False, True]] * 3))
PATHS = ["rows", "staged", "library"]
# NaN is what these cases are about
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """rows: fused, a whole row of the gradient at once; staged: fused, wide rows; library: chunked on a GPU."""
    if request.param == "library":
        monkeypatch.setattr(op, "implementation", lambda backend, query: library)
        monkeypatch.setattr(sys.modules["karma_kernels.info_nce"], "module_of", lambda *_: "library")
        monkeypatch.setattr(routing, "LIBRARY_ONE_PASS_ROWS", 1)
        monkeypatch.setattr(routing, "whole_blocks", lambda n: max(1, n))
        return "chunked"
    if request.param == "staged":
        monkeypatch.setattr(configs, "rows", lambda *_: None)
    return "fused"


def make(**changes):
    """Two tiles of keys, a part of one of queries."""
    return inputs_of(**({"rows": 5, "keys": 18, "width": 7} | changes))


@pytest.mark.parametrize("labels,ids,log_q,symmetric,normalize", FLAGS)
def test_equals_the_definition(path, labels, ids, log_q, symmetric, normalize):
    inputs = make(labels=labels, ids=ids, log_q=log_q)
    options = {"symmetric": symmetric, "normalize": normalize}
    for reduction, weights in (("none", torch.linspace(-1, 2, 5, dtype=torch.float64)), ("mean", torch.tensor(0.7))):
        expected = gradients(inputs, weights, reduction=reduction, backend="reference", **options)
        found = gradients(inputs, weights, reduction=reduction, backend=path, **options)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("labels,ids,log_q,symmetric,normalize", FLAGS)
def test_gradcheck(path, labels, ids, log_q, symmetric, normalize):
    inputs = make(rows=3, keys=5, width=3, labels=labels, ids=ids, log_q=log_q)
    names = [name for name, x in inputs.items() if x.is_floating_point()]

    def loss(*tensors):
        return info_nce(**(inputs | dict(zip(names, tensors, strict=True))), symmetric=symmetric, normalize=normalize,
                        reduction="none", backend=path)

    values = [inputs[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size,workspace_bytes", [((3, 5, 3), 1), ((21, 37, 19), 6144), ((21, 37, 19), 1 << 20)])
def test_any_workspace(path, symmetric, size, workspace_bytes):
    inputs = make(**dict(zip(("rows", "keys", "width"), size, strict=True)))
    weights = torch.tensor(1.0)
    expected = gradients(inputs, weights, symmetric=symmetric, backend="reference")
    found = gradients(inputs, weights, symmetric=symmetric, backend=path, workspace_bytes=workspace_bytes)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_narrow_inputs(path, dtype, tolerance, symmetric):
    """The products of narrow numbers are exact there, so what remains is the rounding of G and of the results."""
    inputs = make(rows=17, keys=33, width=21, dtype=dtype)
    inputs["scale"] = inputs["scale"].float()
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    options = {"symmetric": symmetric, "normalize": True}
    found = gradients(inputs, torch.tensor(1.0), backend=path, **options)
    expected = gradients(exact, torch.tensor(1.0), backend="reference", **options)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_small_gradients_survive_float16(path):
    """One p is 1e-7 and the upstream gradient 1e-6: G, stored in float16, must not round to 0."""
    key = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float16)
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float16)
    found = gradients({"query": query, "key": key, "scale": torch.tensor(16.118)}, torch.tensor(1e-3), backend=path)
    p = 1 / (1 + torch.tensor(16.118, dtype=torch.float64).exp())
    assert found[3].item() == pytest.approx(-p.item() * 1e-3, rel=2e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("length", [0.01, 0.3, 20000.0])
def test_float16_rows_of_any_length(path, length, symmetric):
    """G with the inverse lengths in it must neither overflow nor vanish in float16."""
    inputs = make(rows=17, keys=33, width=16, dtype=torch.float16)
    inputs["scale"], inputs["log_q"] = torch.tensor(14.0), inputs["log_q"].float()
    for name in ("query", "key"):
        inputs[name] = torch.nn.functional.normalize(inputs[name].double()).mul(length).half()
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    # so large that float16 holds the results
    upstream, options = torch.tensor(length), {"normalize": True, "symmetric": symmetric, "reduction": "sum"}
    found = gradients(inputs, upstream, backend=path, **options)
    expected = gradients(exact, upstream, backend="reference", **options)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a.double() - b).norm() <= 2e-3 * b.norm()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("wanted", [("query", "key", "log_q", "scale"), ("scale",), ("log_q",)])
def test_float16_rows_of_different_lengths_in_pieces(path, symmetric, wanted):
    """Pieces of 5 rows, in one pass where there is one: short rows in one of them, nothing but zeros in another."""
    inputs = make(rows=17, keys=33, width=16, dtype=torch.float16)
    inputs["scale"], inputs["log_q"] = torch.tensor(14.0), inputs["log_q"].float()
    length = torch.full((17, 1), 8.0)
    length[6], length[8], length[10:15] = 0.02, 0.5, 0.0
    inputs["query"] = torch.nn.functional.normalize(inputs["query"].float()).mul(length).half()
    options = {"normalize": True, "symmetric": symmetric, "reduction": "sum"}
    leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in inputs.items()}
    info_nce(**leaves, backend=path, workspace_bytes=33 * 5 * 6, **options).backward()
    exact = {name: x.double().requires_grad_(name in wanted) if x.is_floating_point() else x
             for name, x in inputs.items()}
    info_nce(**exact, backend="reference", **options).backward()
    for name in wanted:  # row by row: the shortest has by far the largest gradient
        error, size = ((x if name in ("query", "key") else x[None]).norm(dim=-1)
                       for x in (leaves[name].grad - exact[name].grad, exact[name].grad))
        assert (error <= 2e-3 * size).all(), name


@pytest.mark.parametrize("symmetric", [False, True])
def test_nothing_but_zeros_in_float16(path, symmetric):
    inputs = make(dtype=torch.float16, ids=False) | {"query": torch.zeros(5, 7, dtype=torch.float16)}
    options = {"normalize": True, "symmetric": symmetric}
    found = gradients(inputs, torch.tensor(1.0), backend=path, **options)
    expected = gradients(inputs, torch.tensor(1.0), backend="reference", **options)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_large_logits_in_float32(path, symmetric):
    """The sums are relative to exactly one of the logits, however large they are."""
    inputs = make(rows=17, keys=33, width=16, dtype=torch.float32) | {"scale": torch.tensor(1e5)}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    for reduction in ("none", "mean"):
        options = {"symmetric": symmetric, "reduction": reduction}
        found = gradients(inputs, torch.tensor(1.0), backend=path, **options)
        expected = gradients(exact, torch.tensor(1.0), backend="reference", **options)
        for a, b in zip(found[1:4], expected[1:4], strict=True):
            assert (a.double() - b).norm() <= 1e-3 * b.norm()


def test_products_follow_torchs_setting(path, monkeypatch):
    """Whichever of torch's ways TF32 was asked for by; reading it by another one would raise."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert launch.precision(torch.float32) == setting
            assert launch.precision(torch.bfloat16) == "ieee"
            gradients(make(dtype=torch.float32), torch.tensor(1.0), backend=path)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("symmetric", [False, True])
def test_hard_inputs(path, symmetric):
    """Scale 100 and rows alike, sure rows, everything masked, one row."""
    g = torch.Generator().manual_seed(1)
    alike = torch.randn(1, 40, generator=g, dtype=torch.float64) * 1.2
    base = make(rows=9, keys=18, width=40)
    close = {"query": base["query"] + alike, "key": base["key"] + alike, "scale": torch.tensor(100.0).double()}
    cases = [base | close, base | {"key_ids": torch.zeros(18, dtype=torch.long)},
             make(rows=1, keys=1), make(rows=1, keys=17),
             {"query": torch.eye(4).double(), "key": torch.eye(4).double(), "scale": torch.tensor(200.0).double()}]
    for inputs in cases:
        expected = gradients(inputs, torch.tensor(1.0), symmetric=symmetric, normalize=True, backend="reference")
        found = gradients(inputs, torch.tensor(1.0), symmetric=symmetric, normalize=True, backend=path)
        small = 1e-200 if len(inputs["query"]) == 4 else 1e-13  # the sure rows' losses are e^-200
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=small)


def test_repeated_labels_and_own_query_ids(path):
    inputs = make() | {"labels": torch.tensor([3, 3, 0, 3, 17]), "query_ids": torch.tensor([0, 1, 2, 3, 9])}
    expected = gradients(inputs, torch.tensor(1.0), backend="reference")
    torch.testing.assert_close(gradients(inputs, torch.tensor(1.0), backend=path), expected)


@pytest.mark.parametrize("layout", ["columns", "expanded", "every other row", "part of a wider row"])
def test_layouts(path, layout):
    inputs = make(rows=5, keys=18)
    change = {"columns": lambda x: x.t().contiguous().t(), "expanded": lambda x: x[:1].expand(x.shape),
              "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
              "part of a wider row": lambda x: torch.cat([x, x], 1)[:, :x.shape[1]]}[layout]
    changed = inputs | {name: change(inputs[name]) for name in ("query", "key")}
    whole = changed | {name: changed[name].contiguous() for name in ("query", "key")}
    torch.testing.assert_close(gradients(changed, torch.tensor(1.0), normalize=True, backend=path),
                               gradients(whole, torch.tensor(1.0), normalize=True, backend="reference"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(path, bad):
    for name, place in (("query", (1, 0)), ("key", (17, 0)), ("log_q", (3,)), ("scale", ())):
        for normalize in (False, True):
            inputs = make(labels=False) | {"key_ids": torch.arange(18) % 9}
            inputs[name] = inputs[name].clone()
            inputs[name][place] = bad
            found = gradients(inputs, torch.tensor(1.0), normalize=normalize, backend=path)
            assert found[0].isnan() and found[1].isnan().any()


def test_rows_of_extreme_length(path):
    inputs = make()
    zero = inputs | {"query": inputs["query"].clone()}
    zero["query"][2] = 0
    expected = gradients(zero, torch.tensor(1.0), normalize=True, backend="reference")
    torch.testing.assert_close(gradients(zero, torch.tensor(1.0), normalize=True, backend=path), expected)
    for factor in (2.0**-49, 2.0**49):
        far = inputs | {"query": inputs["query"] / inputs["query"].norm(dim=1, keepdim=True) * factor}
        expected = gradients(far, torch.tensor(1.0), normalize=True, backend="reference")
        torch.testing.assert_close(gradients(far, torch.tensor(1.0), normalize=True, backend=path), expected)
        # beyond, the loss says so
        assert gradients(far | {"query": far["query"] * factor}, torch.tensor(1.0), normalize=True,
                         backend=path)[0].isnan()


def test_every_number_is_written(path, monkeypatch):
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))
    for flags in ({}, {"symmetric": True, "normalize": True}):
        for inputs in (make(), make(log_q=False, ids=False)):
            found = gradients(inputs, torch.tensor(1.0), backend=path, **flags)
            assert all(torch.isfinite(x).all() for x in found)


def fill(x):
    return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(1)


def test_same_bits_twice(path):
    inputs = make(rows=21, keys=37, dtype=torch.float32)
    once, again = (gradients(inputs, torch.tensor(1.0), symmetric=True, backend=path) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("only", ["query", "key", "scale", "log_q"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_only_one_gradient_wanted(path, only, symmetric):
    inputs = make()
    whole = dict(zip(["loss", "query", "key", "log_q", "scale"],
                     gradients(inputs, torch.tensor(1.0), symmetric=symmetric, backend="reference"), strict=True))
    leaf = inputs[only].clone().requires_grad_()
    info_nce(**(inputs | {only: leaf}), symmetric=symmetric, backend=path).backward()
    torch.testing.assert_close(leaf.grad, whole[only])


def test_the_library_path_forms_gradients_in_the_forward_or_not():
    """One pass where a tile of whole rows fits, else the backward forms the scores again: both were tested above."""
    inputs = make()
    args = [inputs.get(n) for n in ("query", "key", "labels", "scale", "query_ids", "key_ids", "log_q")]
    for symmetric, workspace_bytes, formed in ((False, 1 << 20, True), (True, 1 << 20, False)):
        x = op.problem(*args, symmetric, False, workspace_bytes)
        assert (library.forward(x, Wanted(True, True, True, True))[2].query is not None) == formed
    assert fused.forward(op.problem(*args, False, False, 1 << 20), Wanted(True, True, True, True))[2].query is None
