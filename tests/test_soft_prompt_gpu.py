"""embed_prompt on a GPU: against float64, in a CUDA graph, without waiting for the host, in bounded memory."""

import pytest
import torch
from soft_prompt_inputs import LEAVES, exact, gradients, make, upstream

from karma_fast.model.soft_prompt import SoftPromptProjection
from karma_kernels import embed_prompt, soft_prompt
from karma_kernels.soft_prompt import routing

pytestmark = pytest.mark.gpu
BACKENDS = ["chunked", "fused", "auto"]
WEIGHTS = ("norm_weight", "w1", "b1", "w2", "learned")


def on_gpu(**changes):
    sizes = {"rows": 300, "width": 96, "mid": 112, "hidden": 200, "vocabulary": 500, "batch": 3, "length": 257,
             "weights": torch.float32, "device": "cuda"}
    return make(**(sizes | changes))


def plain(inputs, grad):
    """The same with all inputs in the dtype of the token embeddings and torch's own arithmetic."""
    dtype = inputs["embedding_weight"].dtype
    narrow = {name: x.to(dtype) if name in LEAVES else x for name, x in inputs.items()}
    leaves = {name: narrow[name].detach().clone().requires_grad_() for name in LEAVES if name in narrow}
    x = torch.nn.functional.rms_norm(leaves["vectors"], leaves["norm_weight"].shape, leaves["norm_weight"], 1e-6)
    z = torch.nn.functional.gelu(x @ leaves["w1"].T + leaves["b1"]) @ leaves["w2"].T
    z = z.view(-1, leaves["embedding_weight"].shape[1])
    rows = [3.0 * torch.nn.functional.normalize(z, dim=1), leaves["embedding_weight"]]
    at = torch.where(inputs["slots"] >= 0, inputs["slots"], len(z) + inputs["token_ids"])
    if "learned" in leaves:
        rows.append(leaves["learned"])
        at = torch.where(inputs["slots"] < -1, len(z) + len(rows[1]) - 2 - inputs["slots"], at)
    out = torch.nn.functional.embedding(at, torch.cat(rows))
    out.backward(grad)
    return {"out": out.detach()} | {name: x.grad for name, x in leaves.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [{}, {"num_tokens": 4, "learned": 0}, {"mid": 2, "width": 3, "hidden": 3},
                                   {"mid": 256, "width": 256, "hidden": 1536, "rows": 1000},
                                   {"mid": 704, "width": 704, "hidden": 577, "num_tokens": 2}], ids=str)
def test_error_at_most_twice_that_of_plain_torch(backend, dtype, sizes):
    inputs = on_gpu(dtype=dtype, **sizes)
    along = embed_prompt(**exact(inputs), backend="reference").to(dtype)
    for grad in (upstream(inputs), upstream(inputs) * 0.01 + along):
        true = gradients(exact(inputs), grad.double(), backend="reference")
        rough = plain(inputs, grad)
        for name, x in gradients(inputs, grad, backend=backend).items():
            assert x.dtype == (dtype if name == "out" else inputs[name].dtype)
            error, limit = ((y.double() - true[name]).norm() for y in (x, rough[name]))
            assert error <= 2 * limit + (1e-5 if dtype == torch.float32 else 1e-3) * true[name].norm(), name


@pytest.mark.parametrize("twice_mid", [0, 512])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_same_bits_twice(twice_mid, num_tokens, monkeypatch):
    monkeypatch.setattr(routing, "TWICE_MID", twice_mid)
    inputs = on_gpu(rows=2000, length=3000, hidden=576, num_tokens=num_tokens, dtype=torch.bfloat16)
    runs = [gradients(inputs, upstream(inputs), backend="fused") for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("twice_mid", [0, 512])
def test_in_a_cuda_graph_and_without_waiting(backend, twice_mid, monkeypatch):
    monkeypatch.setattr(routing, "TWICE_MID", twice_mid)
    inputs = on_gpu(rows=1000, length=2000, hidden=576, num_tokens=2, dtype=torch.bfloat16)
    inputs["slots"][0, 0] = 10**9  # nobody looks
    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    grad = upstream(inputs)

    def step():
        out = embed_prompt(**inputs, backend=backend)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        inputs["vectors"].copy_(torch.randn_like(inputs["vectors"]))
    graph.replay()
    torch.testing.assert_close(captured[0], step()[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mid", [256, 1024])
def test_memory(mid):
    """Kept: (R, mid) numbers. Besides: the output, gradients, weights in bfloat16, the workspace, some integers."""
    rows, hidden = 8192, 2048
    inputs = on_gpu(rows=rows, width=256, mid=mid, hidden=hidden, batch=1, length=32768, dtype=torch.bfloat16)
    for name in WEIGHTS:
        inputs[name].requires_grad_()
    grad, leaves = upstream(inputs), [inputs[name] for name in WEIGHTS]
    gradients(inputs, grad, WEIGHTS, backend="fused")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = embed_prompt(**inputs, backend="fused")
    kept = torch.cuda.memory_allocated() - before
    assert kept <= out.nbytes + rows * mid * 4 + (1 << 20)
    torch.autograd.grad(out, leaves, grad)
    small = sum(x.nbytes for x in leaves)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= out.nbytes + rows * mid * 8 + 3 * small + (64 << 20) + 100 * (rows + 32768) + (8 << 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_exist_is_nan(backend):
    inputs = on_gpu(rows=2, learned=1, vocabulary=3, batch=1, length=8, dtype=torch.bfloat16)
    inputs["slots"] = torch.tensor([[-1, 2, -3, -1, -1, 1, -2, -(1 << 63)]], device="cuda")
    inputs["token_ids"] = torch.tensor([[0, 0, 0, 3, -1, 99, 99, 0]], device="cuda")
    found = gradients(inputs, upstream(inputs), backend=backend)
    assert found["out"][0].isnan().all(-1).tolist() == [False, True, True, True, True, False, False, True]
    assert all(torch.isfinite(x).all() for name, x in found.items() if name != "out")


@pytest.mark.parametrize("sizes", [{"rows": 0}, {"rows": 0, "learned": 0}, {"batch": 0}, {"length": 0}], ids=str)
@pytest.mark.parametrize("twice_mid", [0, 512])
def test_nothing_there(sizes, twice_mid, monkeypatch):
    monkeypatch.setattr(routing, "TWICE_MID", twice_mid)
    inputs = on_gpu(**sizes, dtype=torch.float32)
    found, expected = (gradients(inputs, upstream(inputs), backend=b) for b in ("fused", "reference"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("length", [1e-36, 1e-30, 3e30])
@pytest.mark.parametrize("twice_mid", [0, 512])
def test_z_of_any_length(length, twice_mid, monkeypatch):
    monkeypatch.setattr(routing, "TWICE_MID", twice_mid)
    inputs = on_gpu(dtype=torch.float32) | {"token_norm": 1e-3 * length}
    inputs["w2"] = inputs["w2"] * length
    true = gradients(exact(inputs), upstream(inputs).double(), ("vectors", "w2"), backend="reference")
    for name, x in gradients(inputs, upstream(inputs), ("vectors", "w2"), backend="fused").items():
        assert (x.double() - true[name]).norm() <= 1e-4 * true[name].norm(), name


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_projection_alone(num_tokens):
    inputs = on_gpu(num_tokens=num_tokens, dtype=torch.float32)
    own = {name: x for name, x in inputs.items() if name in (*LEAVES[:5], "num_tokens", "token_norm")}
    grad = torch.randn(300, num_tokens, 200, device="cuda")
    expected, found = (gradients(own, grad, LEAVES[:5], soft_prompt, backend=b) for b in ("reference", "auto"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_compiled_module():
    inputs = on_gpu(dtype=torch.bfloat16)
    module = SoftPromptProjection(96, 200, mid_features=112).cuda()
    args = [inputs[name] for name in ("token_ids", "slots", "vectors", "embedding_weight", "learned")]
    torch.testing.assert_close(torch.compile(module.insert, fullgraph=True)(*args), module.insert(*args))
