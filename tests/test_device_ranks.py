"""The path for tensors on a GPU, here on CPU tensors, where the same functions are the definition in plain torch."""

import numpy as np
import pytest
import torch

from karma_fast.evaluation import csr_from_lists, device_ranks, target_ranks
from karma_fast.evaluation.counting import Targets


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("item_range", [(0, 90), (11, 60)])
def test_counts_are_those_of_a_cpu(several, item_range):
    queries, items = torch.randn(20, 12), torch.randn(90, 12)
    items[60:80] = items[:20]
    targets = csr_from_lists([range(q, q + 1 + q % 3) for q in range(20)]) if several else np.arange(20)
    seen = csr_from_lists([range(0, 90, 2 + q) for q in range(20)])
    goal = Targets.check(targets, 20, 90)
    expected = target_ranks(queries, items, targets, seen=seen, item_range=item_range, path="torch")
    found = device_ranks.count(queries, items, goal, seen, item_range)
    for a, b in zip(found, (expected.greater, expected.ties, expected.candidates), strict=True):
        assert a.dtype == np.int64 and np.array_equal(a, b)
    found = device_ranks.count(queries, items, goal, None, item_range)
    assert np.array_equal(found[0], target_ranks(queries, items, targets, item_range=item_range).greater)


def test_bad_values_are_named():
    goal = Targets.check([0], 1, 3)
    items = torch.ones(3, 2)
    items[1, 1] = torch.inf
    with pytest.raises(ValueError, match="items: NaN or infinite values in row 1 cannot"):
        device_ranks.count(torch.ones(1, 2), items, goal, None, (0, 3))
    with pytest.raises(ValueError, match="overflow float32"):
        device_ranks.count(torch.full((1, 2), 1e20), torch.full((3, 2), 1e20), goal, None, (0, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_on_a_gpu_are_ranked_there(dtype):
    queries, items = torch.randn(300, 64).to(dtype), torch.randn(7000, 64).to(dtype)
    seen = csr_from_lists([range(q, 7000, 97) for q in range(300)])
    for largest_k in (None, 50):
        expected = target_ranks(queries, items, np.arange(300), seen=seen, largest_k=largest_k)
        found = target_ranks(queries.cuda(), items.cuda(), np.arange(300), seen=seen, largest_k=largest_k)
        for name in ("greater", "ties", "candidates"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))
