"""What the filter of ranks takes for sure: its margin holds against a model of tensor cores that cuts what it can."""

import pytest
import torch

from karma_kernels.ranks import configs, launch, reference


def vectors(rows, width, seed=0, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def thresholds(queries, items):
    """Copies of both sides and what the filter allows for each pair, (Q, N) float64 in scaled units."""
    device, dim = queries.device, queries.shape[1]
    tile, width = configs.filter_tile(device), launch.copy_width(dim)
    buffers = [torch.empty((len(x) + 16) * width, dtype=torch.float16) for x in (queries, items)]
    scale = launch.power_of_two(torch.linalg.vector_norm(queries, torch.inf, dim=1))
    q = launch.Copies.of(queries, torch.arange(len(queries)), scale, tile.targets, buffers[0])
    scale = launch.power_of_two(torch.linalg.vector_norm(items, torch.inf).view(1))
    x = launch.Copies.of(items, None, scale, tile.items, buffers[1])
    t = launch.Thresholds.of(torch.zeros(len(queries)), q, x, dim, tile.items)
    block = torch.arange(len(items)) // tile.items
    margin = (t.per_lost.double()[:, None] * t.block_lost[block] + t.per_kept.double()[:, None] * t.block_kept[block]
              + t.floor.double()[:, None])
    return q, x, margin


def truncated(q, x, block):
    """Products as a tensor core adds them at worst: a block's terms cut at 24 bits of the largest, then the sum."""
    acc = torch.zeros(len(q), len(x), dtype=torch.float64)
    for start in range(0, q.shape[1], block):
        terms = torch.cat([acc[..., None], q[:, None, start:start + block] * x[None, :, start:start + block]], 2)
        ulp = torch.frexp(terms.abs().amax(2, keepdim=True)).exponent - 24
        total = torch.ldexp(torch.ldexp(terms, -ulp).trunc(), ulp).sum(2)
        ulp = torch.frexp(total).exponent - 24
        acc = torch.ldexp(torch.ldexp(total, -ulp).trunc(), ulp)
    return acc


@pytest.mark.parametrize("sign", ["any", "positive"])
@pytest.mark.parametrize("width", [1, 20, 256])
def test_the_margin_covers_the_error(sign, width):
    """Of the copies, of cutting in blocks of 4 and 16, and of the chain; and for random rows it is not far above."""
    queries, items = vectors(15, width), vectors(40, width, 1)
    if sign == "positive":
        queries, items = queries.abs(), items.abs()
    items[3] *= 1e-7
    q, x, margin = thresholds(queries, items)
    unit = q.scale.double()[:, None] * x.scale.double()
    rows, columns = (y.reshape(-1) for y in torch.meshgrid(torch.arange(15), torch.arange(40), indexing="ij"))
    defined = reference.pair_scores(queries, items, rows, columns).view(15, 40).double() * unit
    a, b = q.values[:15].double(), x.values[:40].double()
    for block in (4, 16):
        error = (truncated(a, b, block) - defined).abs()
        assert (error <= margin).all()
    assert (margin <= 4 * width * 2.0**-11 * 2.0**30).all()
    lost = (a[:, :width] - queries.double() * q.scale.double()[:, None]).norm(dim=1)
    assert (q.lost[:15] >= lost).all() and torch.allclose(q.lost[:15], lost, rtol=1e-3)
    assert torch.equal(q.values[15:], torch.zeros_like(q.values[15:]))


def test_copies_of_half_precision_lose_nothing():
    for dtype in (torch.float16, torch.bfloat16):
        q, x, _ = thresholds(vectors(16, 30, dtype=dtype), vectors(16, 30, 1, dtype=dtype))
        assert (q.lost < 1e-9).all() and (x.lost < 1e-9).all()


def test_powers_of_two():
    largest = torch.tensor([1.0, 1.999, 2.0, 2.0**-149, 3.4e38, 0.0, 65504.0])
    scale = launch.power_of_two(largest)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((7,), 0.5))
    scaled = (largest * scale)[[0, 1, 2, 4, 6]]
    assert ((scaled >= 2.0**14) & (scaled < 2.0**15)).all() and torch.isfinite(scale).all()
