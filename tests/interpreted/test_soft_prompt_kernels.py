"""The Triton kernels of the soft-prompt projection, interpreted: against the definition in float64."""

import importlib

import pytest
import torch
from soft_prompt_inputs import LEAVES, exact, gradients, make, upstream

from karma_kernels import embed_prompt, soft_prompt
from karma_kernels.soft_prompt import problem, routing

SIZES = [{}, {"num_tokens": 4}, {"learned": 0, "num_tokens": 3}, {"mid": 1, "width": 1, "hidden": 1},
         {"rows": 1, "batch": 1, "length": 1},
         {"rows": 0, "learned": 0}, {"rows": 0}, {"batch": 0}, {"length": 0}, {"rows": 3, "length": 50}]
# NaN is what these cases are about
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=["twice", "once"], autouse=True)
def path(request, monkeypatch):
    """twice: z is formed in registers, for its length and for the output; once: it goes through the workspace."""
    if request.param == "once":
        monkeypatch.setattr(routing, "TWICE_MID", 0)


def compare(inputs, wanted=LEAVES, rtol=1e-9, atol=1e-11):
    up = upstream(inputs)
    expected = gradients(inputs, up, wanted, backend="reference")
    found = gradients(inputs, up, wanted, backend="fused")
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_definition(size):
    compare(make(**size))


@pytest.mark.parametrize("size,workspace_bytes", [({"num_tokens": 2}, 1), ({"rows": 19, "length": 18, "hidden": 33,
                                                                            "mid": 35}, 20000)])
def test_any_workspace(size, workspace_bytes, monkeypatch):
    monkeypatch.setattr(problem, "WORKSPACE_BYTES", workspace_bytes)
    compare(make(**size))


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("learned", [0, 2])
def test_gradcheck(num_tokens, learned):
    inputs = make(rows=3, width=3, mid=4, hidden=5, num_tokens=num_tokens, learned=learned, length=5)
    names = [name for name in LEAVES if name in inputs]

    def out(*tensors):
        return embed_prompt(**(inputs | dict(zip(names, tensors, strict=True))), backend="fused")

    assert torch.autograd.gradcheck(out, [inputs[name].clone().requires_grad_() for name in names], fast_mode=True)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("rows", [0, 1, 19])
def test_projection_alone(num_tokens, rows):
    inputs = make(rows=rows, num_tokens=num_tokens)
    own = {name: x for name, x in inputs.items() if name in (*LEAVES[:5], "num_tokens", "token_norm")}
    up = torch.linspace(-1, 2, rows * num_tokens * 21, dtype=torch.float64).view(rows, num_tokens, 21)
    expected, found = (gradients(own, up, LEAVES[:5], soft_prompt, backend=b) for b in ("reference", "fused"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("only", LEAVES)
def test_only_one_gradient_wanted(only):
    compare(make(num_tokens=2), (only,))


def test_every_number_is_written(monkeypatch):
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))
    compare(make(num_tokens=2))


def fill(x):
    return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(1)


def test_layouts_and_integers():
    inputs = make(num_tokens=2)
    for name in LEAVES:
        inputs[name] = inputs[name].repeat_interleave(2, -1)[..., ::2]  # every other number
    inputs["token_ids"], inputs["slots"] = inputs["token_ids"].int(), inputs["slots"].T.contiguous().T.int()
    compare(inputs)
    inputs["vectors"] = inputs["vectors"][:1].expand(5, -1)
    compare(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_token_embeddings(dtype):
    inputs = make(rows=17, hidden=33, mid=21, width=13, length=30, num_tokens=2, dtype=dtype, weights=torch.float32)
    inputs["embedding_weight"] = inputs["embedding_weight"] / 8
    found, expected = (gradients(x, upstream(inputs), backend=b)
                       for x, b in ((inputs, "fused"), (exact(inputs), "reference")))
    for name, x in found.items():
        assert x.dtype == (dtype if name == "out" else inputs[name].dtype)
        error = (x.double() - expected[name]).norm() / expected[name].norm()
        assert error <= {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype], (name, error)


@pytest.mark.parametrize("length", [1e-36, 1e-30, 1.0, 3e30])
def test_z_of_any_length(length):
    """z overflows or vanishes when it is squared; its direction does not."""
    inputs = make(dtype=torch.float32) | {"token_norm": 1e-3 * length}
    inputs["w2"] = inputs["w2"] * length
    found, expected = (gradients(x, upstream(inputs), ("vectors", "w2", "learned"), backend=b)
                       for x, b in ((inputs, "fused"), (exact(inputs), "reference")))
    for name, x in found.items():
        assert (x.double() - expected[name]).norm() <= 1e-5 * expected[name].norm() and expected[name].any()


def test_a_token_of_zeros_and_what_is_not_finite():
    inputs = make(rows=4, learned=0, batch=1, length=8) | {"slots": torch.tensor([[0, 1, 2, 3, 1, -1, -1, 0]])}
    inputs["b1"] = inputs["b1"] * 0  # a vector of zeros gives z = 0
    inputs["vectors"][1] = 0
    compare(inputs)
    assert not gradients(inputs, upstream(inputs), backend="fused")["vectors"][1].any()
    for name, place, value, bad in (("vectors", (2, 0), torch.nan, 2), ("vectors", (3, 1), torch.inf, 3)):
        inputs[name][place] = value
        found = gradients(inputs, upstream(inputs), backend="fused")
        assert found["out"][0, bad].isnan().all() and found["vectors"][bad].isnan().all()
        assert torch.isfinite(found["out"][0, [0, 1, 4, 5, 6, 7]]).all()
    inputs = make(num_tokens=1, learned=0)
    inputs["w2"][3, 0] = torch.inf  # one number of each z
    out = embed_prompt(**inputs, backend="fused")
    assert torch.equal(out.isnan().all(-1), inputs["slots"] >= 0) and torch.isfinite(out[inputs["slots"] < 0]).all()


def test_what_does_not_exist_is_nan(monkeypatch):
    """As on a GPU, where nobody looks at the values before; such places have no gradient."""
    inputs = make(rows=2, learned=1, vocabulary=3, batch=1, length=8)
    inputs["slots"] = torch.tensor([[-1, 2, -3, -1, -1, 1, -2, -(1 << 63)]])
    inputs["token_ids"] = torch.tensor([[0, 0, 0, 3, -1, 99, 99, 0]])
    with pytest.raises(IndexError, match="slots: got"):
        embed_prompt(**inputs, backend="fused")
    # the function of the same name hides the module
    monkeypatch.setattr(importlib.import_module("karma_kernels.soft_prompt"), "check_values", lambda *_: None)
    out = embed_prompt(**inputs, backend="fused")[0]
    assert out.isnan().all(-1).tolist() == [False, True, True, True, True, False, False, True]
    assert torch.isfinite(out[[0, 5, 6]]).all()
    found, expected = (gradients(inputs, upstream(inputs), backend=b) for b in ("fused", "reference"))
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("vocabulary", [1, 12])
def test_rows_of_the_table_are_added_in_float32(vocabulary):
    """Few rows in parts, more in one; the first stands everywhere."""
    inputs = make(batch=1, length=320, vocabulary=vocabulary, dtype=torch.bfloat16, weights=torch.float32)
    inputs |= {"slots": torch.full((1, 320), -1), "token_ids": torch.zeros(1, 320, dtype=torch.int64)}
    found = gradients(inputs, torch.ones(1, 320, 21), ("embedding_weight",), backend="fused")["embedding_weight"]
    assert found.dtype == torch.bfloat16 and not found[1:].any()
    assert found[0].tolist() == [320.0] * 21  # bfloat16 knows no 256 + 1


def test_same_bits_twice():
    inputs = make(rows=9, length=20, num_tokens=2, dtype=torch.float32)
    once, again = (gradients(inputs, upstream(inputs), backend="fused") for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)
