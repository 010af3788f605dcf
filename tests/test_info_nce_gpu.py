"""info_nce on a GPU: against float64, captured in a CUDA graph, without waiting for the host, within its workspace."""

import itertools

import pytest
import torch

from karma_kernels import info_nce
from karma_kernels.info_nce import routing

pytestmark = pytest.mark.gpu
BACKENDS = ["chunked", "fused", "auto"]
# ids (2: of two kinds), log_q, symmetric, normalize
FLAGS = list(itertools.product([False, True, 2], *[[False, True]] * 3))


def make(rows, keys, width, dtype, ids=True, log_q=True):
    inputs = {"query": torch.randn(rows, width, device="cuda").to(dtype),
              "key": torch.randn(keys, width, device="cuda").to(dtype),
              "labels": torch.randperm(keys, device="cuda")[:rows],
              "scale": torch.tensor(8.0 / width**0.5, device="cuda")}
    if ids:
        kinds = (2,) if ids == 2 else ()
        inputs["key_ids"] = torch.randint(0, keys // 3 + 1, (keys, *kinds), device="cuda")
    if log_q:
        inputs["log_q"] = torch.rand(keys, device="cuda").log()
    return inputs


def gradients(inputs, **options):
    leaves = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    loss = info_nce(**leaves, **options)
    loss.sum().backward()
    return [loss.detach(), *(x.grad for x in leaves.values() if x.is_floating_point())]


def plain(inputs, **options):
    """The same in torch's own arithmetic for the inputs' dtype: whole scores in that dtype."""
    query, key = (inputs[n].clone().requires_grad_() for n in ("query", "key"))
    q, k = (torch.nn.functional.normalize(x) if options.get("normalize") else x for x in (query, key))
    scores = (inputs["scale"].to(q.dtype) * (q @ k.T))
    logits = scores - inputs["log_q"] if "log_q" in inputs else scores
    dropped = torch.zeros_like(logits, dtype=torch.bool)
    if "key_ids" in inputs:
        dropped = inputs["key_ids"][inputs["labels"]][:, None] == inputs["key_ids"]
        dropped = dropped.any(-1) if dropped.ndim > 2 else dropped
        dropped = dropped.scatter(1, inputs["labels"][:, None], False)
    loss = torch.nn.functional.cross_entropy(logits.masked_fill(dropped, -torch.inf).float(), inputs["labels"])
    if options.get("symmetric"):
        back = scores.masked_fill(dropped, -torch.inf)[:, inputs["labels"]].T.float()
        loss = (loss + torch.nn.functional.cross_entropy(back, torch.arange(len(q), device="cuda"))) / 2
    loss.backward()
    return [loss.detach(), query.grad, key.grad]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids,log_q,symmetric,normalize", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows,keys,width", [(300, 451, 96), (129, 1000, 513), (256, 256, 1024)])
def test_error_at_most_twice_that_of_plain_torch(backend, ids, log_q, symmetric, normalize, dtype, rows, keys, width):
    inputs = make(rows, keys, width, dtype, ids, log_q)
    options = {"symmetric": symmetric, "normalize": normalize}
    exact = gradients({n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}, backend="reference",
                      **options)
    for workspace_bytes in (1 << 18, 64 << 20):
        found = gradients(inputs, backend=backend, workspace_bytes=workspace_bytes, **options)
        for a, b, c in zip(found[1:3], plain(inputs, **options)[1:], exact[1:3], strict=True):
            floor = 1e-5 if dtype == torch.float32 else 1e-3
            assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + floor * c.norm()
        torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-4, atol=1e-5)
        for a, c in zip(found[3:], exact[3:], strict=True):
            assert (a.double() - c).norm() <= 2e-2 * c.norm() + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_float16_rows_of_different_lengths_in_pieces(backend, symmetric):
    """Short rows in one of the pieces of whole rows of scores, nothing but zeros in another."""
    rows, keys, workspace_bytes = 2400, 3000, 24 << 20
    tile = routing.library_tile(rows, keys, 2, symmetric, workspace_bytes)
    assert symmetric or tile == (1280, keys, True)
    inputs, length = make(rows, keys, 64, torch.float16), torch.full((rows, 1), 8.0, device="cuda")
    inputs["scale"] = torch.tensor(14.0, device="cuda")
    length[6], length[8], length[1280:] = 0.02, 0.5, 0.0
    inputs["query"] = torch.nn.functional.normalize(inputs["query"].float()).mul(length).half()
    exact = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    options = {"normalize": True, "symmetric": symmetric, "reduction": "sum"}
    found = gradients(inputs, backend=backend, workspace_bytes=workspace_bytes, **options)
    for a, b in zip(found, gradients(exact, backend="reference", **options), strict=True):
        a, b = (x if x.ndim == 2 else x[None] for x in (a.double(), b))
        assert ((a - b).norm(dim=-1) <= 1e-2 * b.norm(dim=-1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_same_bits_twice(backend, symmetric):
    inputs = make(3000, 4001, 200, torch.bfloat16)
    runs = [gradients(inputs, symmetric=symmetric, backend=backend) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [128, 512])
@pytest.mark.parametrize("symmetric", [False, True])
def test_in_a_cuda_graph_and_without_waiting(backend, width, symmetric):
    inputs = make(2048, 2048, width, torch.bfloat16)
    query, key = inputs["query"].requires_grad_(), inputs["key"].requires_grad_()

    def step():
        loss = info_nce(**inputs, symmetric=symmetric, backend=backend)
        return loss, *torch.autograd.grad(loss, (query, key))

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
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    with torch.no_grad():
        query.copy_(torch.randn_like(query))
    graph.replay()
    torch.testing.assert_close(captured[0], step()[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows,width,workspace_bytes", [(16384, 128, 32 << 20), (16384, 768, 32 << 20),
                                                        (4096, 128, 18 << 20)])  # so few: sums of a side in many parts
def test_memory(backend, symmetric, rows, width, workspace_bytes):
    inputs = make(rows, rows, width, torch.bfloat16)
    gradients(inputs, symmetric=symmetric, backend=backend, workspace_bytes=workspace_bytes)
    leaves = {n: x.clone().requires_grad_() if n in ("query", "key") else x for n, x in inputs.items()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info_nce(**leaves, symmetric=symmetric, backend=backend, workspace_bytes=workspace_bytes).backward()
    used = torch.cuda.max_memory_allocated() - before
    gradients_bytes = 2 * rows * width * (4 + 2 + 4)  # accumulators, results, and results before the upstream gradient
    assert used <= gradients_bytes + workspace_bytes + 200 * rows + (8 << 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend):
    inputs = make(1000, 1500, 128, torch.bfloat16)
    compiled = torch.compile(lambda **x: info_nce(**x, normalize=True, backend=backend), fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), info_nce(**inputs, normalize=True, backend=backend))
