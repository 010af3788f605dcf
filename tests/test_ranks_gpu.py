"""Counting ranks on a GPU: the counts of a CPU, in every dtype, at any workspace, beyond 2^31 numbers."""

import itertools

import pytest
import torch

from karma_fast.evaluation import target_ranks
from karma_kernels.ranks import count_ranks, pair_scores, reference

pytestmark = pytest.mark.gpu
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def vectors(rows, width, seed, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_gpu(queries, items, rows, chosen, **options):
    """(scores, greater, equal), back on the CPU."""
    queries, items, rows, chosen = (x.cuda() for x in (queries, items, rows, chosen))
    scores = pair_scores(queries, items, rows, chosen)
    return [x.cpu() for x in (scores, *count_ranks(queries, items, rows, scores, **options))]


def check(queries, items, chosen, **options):
    """Against ``target_ranks`` on the CPU, which leaves the target itself out of its ties."""
    rows = torch.arange(len(queries))
    scores, greater, equal = on_gpu(queries, items, rows, chosen, **options)
    assert torch.equal(scores, reference.pair_scores(queries, items, rows, chosen))
    expected = target_ranks(queries, items, chosen)
    assert greater.tolist() == expected.greater.tolist() and (equal - 1).tolist() == expected.ties.tolist()


def test_scores_equal_the_definition_to_the_last_bit():
    """Tiny, huge and subnormal ones too: a GPU must neither flush them nor round twice."""
    rows, chosen = torch.arange(300).repeat(2), torch.arange(600) * 7 % 500
    for width, scale in itertools.product((1, 3, 4, 64, 257), (1.0, 2.0**-70, 2.0**-74, 2.0**60)):
        queries, items = vectors(300, width, 0) * scale, vectors(500, width, 1) * scale
        found = pair_scores(*(x.cuda() for x in (queries, items, rows, chosen))).cpu()
        assert torch.equal(found, reference.pair_scores(queries, items, rows, chosen))


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, repeat=2)))
@pytest.mark.parametrize("width", [1, 33, 256, 1000])
def test_ranks_equal_those_of_a_cpu(dtypes, width):
    queries, items = vectors(150, width, 0, dtypes[0]), vectors(3001, width, 1, dtypes[1])
    items[2000:] = items[:1001].clone()
    check(queries, items, torch.arange(150) * 17)


@pytest.mark.parametrize("workspace_bytes", [1, 1 << 18, 1 << 22, 1 << 28])
def test_any_workspace(workspace_bytes):
    """Several parts, groups made smaller, and parts counted exactly."""
    queries, items = vectors(700, 96, 0), vectors(20000, 96, 1)
    items[5000:9000] = items[5000]
    check(queries, items, torch.arange(700) * 11, workspace_bytes=workspace_bytes)


def test_hard_inputs():
    """All items alike; rows of very different lengths; all positive; off by the last bits."""
    queries, items = vectors(130, 64, 0), vectors(5000, 64, 1)
    chosen = torch.arange(130) * 3
    near = items[:1].repeat(5000, 1)
    near[torch.arange(5000), torch.arange(5000) % 64] *= 1 + 2.0**-22
    for table in (items[:1].repeat(5000, 1), items * torch.logspace(-6, 6, 5000)[:, None], items.abs(), near):
        check(queries, table, chosen)
        check(queries.abs(), table, chosen)


def test_near_the_limits_of_the_filter():
    """Rows whose products all have one sign and size, where cutting in a tensor core adds up the most."""
    for width in (64, 1024, 4096):
        queries, items = 1 + vectors(128, width, 0).abs() * 1e-3, 1 + vectors(4096, width, 1).abs() * 1e-3
        check(queries, items, torch.arange(128) * 31)


def test_several_targets_a_query():
    queries, items = vectors(90, 48, 0), vectors(4000, 48, 1)
    rows, chosen = torch.arange(90).repeat_interleave(7), torch.arange(630) * 13 % 4000
    scores, greater, equal = on_gpu(queries, items, rows, chosen)
    expected = target_ranks(queries, items, (torch.arange(91) * 7, chosen))
    assert greater.tolist() == expected.greater.tolist() and (equal - 1).tolist() == expected.ties.tolist()


def test_same_counts_twice():
    queries, items = vectors(1000, 64, 0), vectors(50000, 64, 1)
    rows, chosen = torch.arange(1000), torch.arange(1000) * 50
    once, again = (on_gpu(queries, items, rows, chosen) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("workspace_bytes", [8 << 20, 64 << 20])
def test_memory(workspace_bytes):
    queries, items = (torch.randn(n, 128, device="cuda") for n in (4000, 300_000))
    items[:100_000] = items[0]  # exact tiles too
    rows = torch.arange(4000, device="cuda")
    scores = pair_scores(queries, items, rows, rows)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    count_ranks(queries, items, rows, scores, workspace_bytes=workspace_bytes)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= workspace_bytes + 200 * 4000 + 100 * 65536 + (1 << 20)


def test_beyond_two_to_the_31_numbers():
    """Items whose offsets do not fit in 32 bits: the last one is the target, and has a copy at the start."""
    width, count = 256, (1 << 23) + 1000
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("holds 4.3 GB of items and as much again while they are made")
    items = torch.randn(count, width, device="cuda", dtype=torch.bfloat16)
    queries = torch.randn(4, width, device="cuda", dtype=torch.bfloat16)
    items[3] = items[-1]
    rows, chosen = torch.arange(4, device="cuda"), torch.full((4,), count - 1, device="cuda")
    scores = pair_scores(queries, items, rows, chosen)
    assert torch.equal(scores.cpu(), reference.pair_scores(queries.cpu(), items[-1:].cpu(), rows.cpu(),
                                                          torch.zeros(4, dtype=torch.int64)))
    greater, equal = count_ranks(queries, items, rows, scores)
    close = torch.cat([queries.float() @ part.float().T for part in items.split(1 << 20)], 1) - scores[:, None]
    slack = 1e-2  # far more than either way of adding can be off
    assert ((close > slack).sum(1) <= greater).all() and (greater <= (close > -slack).sum(1)).all()
    assert (equal >= 2).all()
