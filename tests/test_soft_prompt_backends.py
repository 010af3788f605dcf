"""embed_prompt: the definition, the chunked implementation, and the operator under autograd and torch.compile."""

import json

import pytest
import torch
from soft_prompt_inputs import LEAVES, exact, gradients, make, upstream
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

from karma_fast.model.soft_prompt import SoftPromptProjection
from karma_fast.planning.simulated import Simulation
from karma_kernels import embed_prompt, insert_soft_tokens, soft_prompt
from karma_kernels.soft_prompt import chunked, op, problem, routing

SIZES = [{}, {"num_tokens": 4}, {"learned": 0, "num_tokens": 3}, {"mid": 1, "width": 1, "hidden": 1},
         {"rows": 40, "length": 41, "hidden": 33, "mid": 35}, {"rows": 1, "batch": 1, "length": 1},
         {"rows": 0, "learned": 0}, {"rows": 0}, {"batch": 0}, {"length": 0}, {"rows": 3, "length": 50}]


def compare(inputs, wanted=LEAVES, rtol=1e-9, atol=1e-11):
    up = upstream(inputs)
    expected = gradients(inputs, up, wanted, backend="reference")
    torch.testing.assert_close(gradients(inputs, up, wanted, backend="chunked"), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_the_definition_is_both_steps_one_after_the_other(num_tokens):
    inputs = make(num_tokens=num_tokens)
    own = {name: x for name, x in inputs.items() if name in (*LEAVES[:5], "num_tokens", "token_norm")}
    expected = insert_soft_tokens(inputs["token_ids"], inputs["slots"], soft_prompt(**own),
                                  inputs["embedding_weight"], learned=inputs["learned"])
    assert torch.equal(embed_prompt(**inputs, backend="reference"), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("workspace_bytes", [1, 6000, 64 << 20])
def test_chunked_equals_the_definition(size, workspace_bytes, monkeypatch):
    monkeypatch.setattr(problem, "WORKSPACE_BYTES", workspace_bytes)
    compare(make(**size))


@pytest.mark.parametrize("workspace_bytes", [1, 6000, 64 << 20])
@pytest.mark.parametrize("places,count", [(1, 1), (5, 3), (301, 1), (64, 40), (17, 0), (0, 4)])
def test_sums_where_torch_has_no_order_of_its_own(places, count, workspace_bytes, monkeypatch):
    monkeypatch.setattr(problem, "WORKSPACE_BYTES", workspace_bytes)
    g = torch.Generator().manual_seed(places)
    values = torch.randn(places, 7, generator=g, dtype=torch.float64)
    rows = torch.randint(count + 1, (places,), generator=g)
    values[:2] = torch.nan  # stays in its row
    expected = torch.stack([values[rows == row].sum(0) for row in range(count)]) if count else values[:0]
    found = chunked.scanned_sums(values, rows, count, torch.float64)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_sums_of_half_precision_are_added_in_float32():
    ones, rows = torch.ones(700, 3, dtype=torch.bfloat16), torch.arange(700) % 2
    found = chunked.scanned_sums(ones, rows, 2, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and found.tolist() == [[350.0] * 3] * 2  # bfloat16 knows no 256 + 1
    assert chunked.scanned_sums(ones, rows, 2, torch.float32).dtype == torch.float32


class Watched(Simulation):
    """A simulation that keeps the names of the operators."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removesuffix("_"))
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_no_operator_adds_in_any_order_on_a_gpu():
    """What adds by atomics there: torch's backward of an embedding, for few rows, too."""
    inputs = make(rows=30, length=2000, learned=1, vocabulary=3, num_tokens=2, dtype=torch.bfloat16,
                  weights=torch.float32)
    with Watched("cuda").entered() as simulation:
        given = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        leaves = {name: given[name].requires_grad_() for name in LEAVES}
        embed_prompt(**given, backend="chunked").sum().backward()
        assert all(x.grad.dtype == x.dtype and x.grad.shape == x.shape for x in leaves.values())
    assert not simulation.names & {"aten::embedding_dense_backward", "aten::index_add", "aten::index_put",
                                   "aten::_index_put_impl", "aten::scatter_add", "aten::scatter_reduce"}
    assert "aten::sort" in simulation.names


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_gradcheck(num_tokens):
    inputs = make(rows=3, width=3, mid=4, hidden=5, num_tokens=num_tokens, length=5)

    def out(*tensors):
        return embed_prompt(**(inputs | dict(zip(LEAVES, tensors, strict=True))), backend="chunked")

    assert torch.autograd.gradcheck(out, [inputs[name].clone().requires_grad_() for name in LEAVES])


@pytest.mark.parametrize("only", LEAVES)
def test_only_one_gradient_wanted(only):
    compare(make(num_tokens=2), (only,))


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_projection_alone(num_tokens):
    inputs = make(num_tokens=num_tokens)
    own = {name: x for name, x in inputs.items() if name in (*LEAVES[:5], "num_tokens", "token_norm")}
    up = torch.linspace(-1, 2, 5 * num_tokens * 21, dtype=torch.float64).view(5, num_tokens, 21)
    expected, found = (gradients(own, up, LEAVES[:5], soft_prompt, backend=b) for b in ("reference", "chunked"))
    torch.testing.assert_close(found, expected)


def test_layouts_and_integers():
    inputs = make(num_tokens=2)
    for name in LEAVES:
        inputs[name] = inputs[name].repeat_interleave(2, -1)[..., ::2]
    inputs["token_ids"], inputs["slots"] = inputs["token_ids"].int(), inputs["slots"].T.contiguous().T.int()
    compare(inputs)
    inputs["token_norm"] = torch.tensor([3.0])
    compare(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_at_most_twice_that_of_plain_torch(dtype):
    """Also where the gradient points almost along the tokens, and the learned row stands in 400 places."""
    inputs = make(rows=17, hidden=33, mid=21, width=13, length=600, learned=1, num_tokens=2, dtype=dtype,
                  weights=torch.float32)
    inputs["slots"][:, ::3] = -2
    for up in (upstream(inputs), upstream(inputs) * 0.01 + embed_prompt(**inputs)):
        true = gradients(exact(inputs), up.double(), backend="reference")
        plain = gradients(inputs, up, backend="reference")
        for name, x in gradients(inputs, up, backend="chunked").items():
            assert x.dtype == plain[name].dtype
            error, limit = ((y.double() - true[name]).norm() for y in (x, plain[name]))
            assert error <= 2 * limit + 1e-6 * true[name].norm(), name


@pytest.mark.parametrize("length", [1e-36, 1e-30, 3e30])
def test_z_of_any_length(length):
    inputs = make(dtype=torch.float32) | {"token_norm": 1e-3 * length}
    inputs["w2"] = inputs["w2"] * length
    found, expected = (gradients(x, upstream(inputs), ("vectors", "w2", "learned"), backend=b)
                       for x, b in ((inputs, "chunked"), (exact(inputs), "reference")))
    for name, x in found.items():
        assert (x.double() - expected[name]).norm() <= 1e-5 * expected[name].norm() and expected[name].any()


def test_a_token_of_zeros_and_what_is_not_finite():
    inputs = make(rows=4, learned=0, batch=1, length=8) | {"slots": torch.tensor([[0, 1, 2, 3, 1, -1, -1, 0]])}
    inputs["b1"] = inputs["b1"] * 0
    inputs["vectors"][1] = 0
    compare(inputs)
    for place, value in (((2, 0), torch.nan), ((3, 1), torch.inf)):
        inputs["vectors"][place] = value
        found = gradients(inputs, upstream(inputs), backend="chunked")
        assert found["out"][0, place[0]].isnan().all() and found["vectors"][place[0]].isnan().all()
        assert torch.isfinite(found["out"][0, [0, 1, 4, 5, 6, 7]]).all()
    inputs = make(learned=0)
    inputs["w2"][3, 0] = torch.inf
    out = embed_prompt(**inputs, backend="chunked")
    assert torch.equal(out.isnan().all(-1), inputs["slots"] >= 0)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_what_does_not_exist(backend):
    inputs = make(rows=2, learned=1, vocabulary=3, batch=1, length=8)
    inputs["slots"] = torch.tensor([[-1, 2, -3, -1, -1, 1, -2, -(1 << 63)]])
    inputs["token_ids"] = torch.tensor([[0, 0, 0, 3, -1, 99, 99, 0]])
    for slot, token in ((2, 0), (-3, 0), (-1, 3), (-1, -1)):
        with pytest.raises(IndexError, match="slots: got|token_ids: got"):
            embed_prompt(**(inputs | {"slots": torch.full((1, 8), slot), "token_ids": torch.full((1, 8), token)}),
                         backend=backend)
    # what a compiled function does, like devices other than the CPU; a NaN row has no gradient
    call = torch.compile(embed_prompt, backend="aot_eager", fullgraph=True)
    found = gradients(inputs, upstream(inputs), function=call, backend=backend)
    assert found["out"][0].isnan().all(-1).tolist() == [False, True, True, True, True, False, False, True]
    assert all(torch.isfinite(x).all() for name, x in found.items() if name != "out")


@pytest.mark.parametrize("learned", [0, 2])
def test_opcheck(learned):
    inputs = make(num_tokens=2, learned=learned, dtype=torch.float32)
    leaves = {name: x.requires_grad_() if name in LEAVES else x for name, x in inputs.items()}
    rest = (torch.tensor(2.0), 2, 1e-6, "chunked")
    args = [leaves.get(name) for name in ("token_ids", "slots", *LEAVES)]
    torch.library.opcheck(op.embed_prompt_op, (*args, *rest))
    args = [None if x is None else x.detach() for x in args]
    before = op.embed_prompt_op(*args, *rest)[1]
    for bits in (127 if learned else 63, *list(op.BITS.values())[:7 if learned else 6]):
        torch.library.opcheck(op.backward_op, (*args, *rest, bits, before, upstream(inputs)),
                              test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(backend, dynamic):
    call = torch.compile(embed_prompt, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows, length in ((4, 6), (5, 7)):
        inputs = make(rows=rows, length=length, num_tokens=2, dtype=torch.float32)
        found = gradients(inputs, upstream(inputs), function=call, backend=backend)
        torch.testing.assert_close(found, gradients(inputs, upstream(inputs), backend=backend))


def test_autocast():
    inputs = make(dtype=torch.float32)
    expected = gradients(inputs, upstream(inputs), backend="chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the backward too
        found = gradients(inputs, upstream(inputs), backend="chunked")
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_derivatives_that_only_the_definition_has():
    inputs = make()
    leaf = inputs["vectors"].requires_grad_()
    with pytest.raises(RuntimeError, match="only backend='reference'"):
        torch.autograd.grad(embed_prompt(**inputs, backend="chunked").sum(), leaf, create_graph=True)
    with forward_ad.dual_level():
        dual = inputs | {"vectors": forward_ad.make_dual(leaf.detach(), torch.ones_like(leaf))}
        assert forward_ad.unpack_dual(embed_prompt(**dual)).tangent is not None
        with pytest.raises(RuntimeError, match="forward-mode"):
            embed_prompt(**dual, backend="chunked")
    norm = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    embed_prompt(**(inputs | {"token_norm": norm})).sum().backward()
    assert norm.grad is not None
    with pytest.raises(ValueError, match="token_norm requires a gradient"):
        embed_prompt(**(inputs | {"token_norm": norm}), backend="chunked")


def test_refusals():
    inputs = make()
    for change, error, message in (({"backend": "fast"}, ValueError, "backend: got 'fast'"),
                                   ({"slots": inputs["slots"][:1]}, ValueError, "both must be"),
                                   ({"embedding_weight": torch.randn(3, 4)}, ValueError, "width 21"),
                                   ({"learned": torch.randn(2, 4)}, ValueError, "learned: got shape"),
                                   ({"learned": inputs["slots"]}, TypeError, "learned: got dtype")):
        with pytest.raises(error, match=message):
            embed_prompt(**(inputs | change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_fused_needs_a_gpu():
    with pytest.raises(RuntimeError, match="backend 'fused' needs"):
        embed_prompt(**make(dtype=torch.float32), backend="fused")


def test_auto_on_a_cpu():
    device = torch.device("cpu")
    assert routing.route(torch.bfloat16, 400, 576, device) == "reference"
    assert routing.route(torch.bfloat16, 2000, 2048, device) == "chunked"


def peak_bytes(call, folder):
    """Largest sum of what torch had allocated at a time, over what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    found.export_chrome_trace(str(folder / "trace.json"))
    events = [e["args"] for e in json.loads((folder / "trace.json").read_text())["traceEvents"]
              if e.get("name") == "[memory]"]
    return max(e["Total Allocated"] for e in events) - (events[0]["Total Allocated"] - events[0]["Bytes"])


def test_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(problem, "WORKSPACE_BYTES", 1 << 20)
    inputs = make(rows=3000, width=16, mid=24, hidden=512, length=2000, dtype=torch.bfloat16, weights=torch.float32)
    names, up = ("norm_weight", "w1", "b1", "w2", "learned"), upstream(inputs)
    leaves = {name: inputs[name].requires_grad_() for name in names}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        embed_prompt(**inputs, backend="chunked")
    own = {x.data_ptr() for x in inputs.values() if isinstance(x, torch.Tensor)}
    assert sum(x.nbytes for x in kept if x.data_ptr() not in own) <= 3000 * 24 * 4 + 64
    del kept[:]

    def step(backend):
        out = embed_prompt(**inputs, backend=backend)
        return torch.autograd.grad(out, list(leaves.values()), up)

    # the output, (R, mid) numbers, integers for each place, the gradients twice
    small = sum(x.nbytes for x in leaves.values())
    limit = up.nbytes + 3000 * 24 * 4 + 4000 * 8 * 10 + 2 * small + (1 << 20)
    assert peak_bytes(lambda: step("chunked"), tmp_path) <= limit < peak_bytes(lambda: step("reference"), tmp_path) / 3


def test_module_with_learned_tokens():
    projection, inputs = SoftPromptProjection(7, 21, mid_features=9), make(dtype=torch.float32)
    out = projection.insert(*(inputs[name] for name in ("token_ids", "slots", "vectors", "embedding_weight",
                                                        "learned")))
    weights = projection.norm.weight, projection.up.weight, projection.up.bias, projection.down.weight
    expected = embed_prompt(inputs["token_ids"], inputs["slots"], inputs["vectors"], *weights,
                            inputs["embedding_weight"], learned=inputs["learned"])
    assert torch.equal(out, expected)
