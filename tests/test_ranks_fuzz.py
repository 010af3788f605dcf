"""Hostile input to the ranking functions.

Every call either raises ValueError or TypeError, or gives the numbers of the torch path. `make sanitize` runs this
file with an extension that stops at the first read or write outside an array.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karma_fast.evaluation import Catalogue, paths, target_ranks, top_k

pytestmark = pytest.mark.skipif(not paths(), reason="the C++ extension was not built: no C++ compiler")
PATHS = list(paths())
# products are never smaller than 1e-38, below which the torch path may differ in the last bit
ORDINARY = [0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 3.0, 1 / 3, -0.1, 1e-4, 1e4]
EXTREME = [*ORDINARY, 1e-16, 6e-5, 1e18, -1e18, 6e4]
BAD = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e30]
INTEGERS = [-2**63, -2**31, -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**70]
LIMITS = [*INTEGERS, 1.5, np.nan, np.inf, "3", [], True]
RANGES = [(0, 0), (0, 3), (1, 20), [2, 2], (-1, 2), (3, 1), 5, (0, 2**70), (0, np.inf), (0.5, 2),
          "ab", (1, None), (0, 1, 2)]


def outcome(call):
    """What the call gives, as lists that can be compared; "refused" for the exceptions that are documented."""
    try:
        found = call()
    except (ValueError, TypeError):
        return "refused"
    arrays = found if isinstance(found, tuple) else (found.greater, found.ties, found.candidates)
    return [x.tolist() for x in arrays]


@st.composite
def matrices(draw, width):
    rows, values = draw(st.integers(0, 40)), draw(st.sampled_from([ORDINARY] * 12 + [EXTREME] * 5 + [EXTREME + BAD]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.choice(values, (rows, width)).astype(np.float32)
    if draw(st.booleans()):
        x *= rng.choice([0.75, 0.9, 0.99], x.shape).astype(np.float32)
    return draw(st.sampled_from(LAYOUTS))(x)


def torch_options(options):
    """The same for the torch path, which would start as many threads as it is told."""
    threads = options["threads"]
    small = min(threads, 2) if isinstance(threads, int) and 0 < threads < 2**31 else threads
    return {**options, "threads": small}


def misaligned(x):
    return np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1, count=x.size).reshape(x.shape)


def half(x):
    return np.clip(x, -6e4, 6e4).astype(np.float16)


FITTING = [
    lambda x: x, half, lambda x: torch.from_numpy(x), lambda x: torch.from_numpy(x).bfloat16(),
    lambda x: torch.from_numpy(half(x)), np.asfortranarray, lambda x: x[::-1], lambda x: np.repeat(x, 2, 1)[:, ::2],
    lambda x: x.astype(">f4"), lambda x: half(x).astype(">f2"), misaligned, lambda x: misaligned(half(x)),
    lambda x: np.broadcast_to(x[:1], x.shape) if len(x) else x,
]
UNFIT = [
    lambda x: x.astype(np.float64), lambda x: x.astype(object), lambda x: x.astype(np.complex64), lambda x: x.tolist(),
    lambda x: x[:, :-1], lambda x: x[None], lambda x: x.ravel(), lambda x: None,
]
LAYOUTS = FITTING * 15 + UNFIT


def csr(draw, rng, rows, num_items, least, most):
    """A pair of lists of different items, broken now and then."""
    lists = [rng.choice(num_items, min(num_items, rng.integers(least, most + 1)), replace=False) for _ in range(rows)]
    indptr = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
    indices = np.concatenate([np.zeros(0, np.int64), *lists])
    broken = draw(st.sampled_from([None] * 25 + [indptr, indices, "short"]))
    if isinstance(broken, str):
        indptr, indices = indptr[:draw(st.integers(0, len(indptr)))], indices[:draw(st.integers(0, len(indices)))]
    elif broken is not None and len(broken):
        broken[draw(st.integers(0, len(broken) - 1))] = draw(st.sampled_from(INTEGERS[:-1]))
    return draw(st.sampled_from([tuple, list]))((indptr, draw(st.sampled_from([indices, indices.tolist()]))))


@st.composite
def calls(draw):
    width = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 17, 70]))
    queries, items = draw(matrices(width)), draw(matrices(width))
    rows, num = (len(x) if hasattr(x, "__len__") else 3 for x in (queries, items))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    odd = [None, [[1, 2]], ["a"] * rows, [0.5] * rows, [True] * rows, 3, {}, [-1] * rows, [2**63 - 1] * rows,
           [2**70] * rows, np.full(rows, 2**64 - 1, np.uint64)]
    targets = draw(st.sampled_from(["one"] * 60 + ["several"] * 60 + odd))
    if isinstance(targets, str):
        targets = rng.integers(0, max(1, num), rows) if targets == "one" else csr(draw, rng, rows, num, 1, 3)
    options = {"threads": draw(st.sampled_from([0, 1, 2, 3] * 15 + [1000, 2**31 - 1, 2**31, 2**70, -1, 1.0, True]))}
    if draw(st.booleans()):
        options["seen"] = csr(draw, rng, rows, num, 0, 5)
    return queries, items, targets, options


@given(calls(), st.sampled_from([*PATHS, "auto"]), st.booleans(), st.data())
@settings(max_examples=500, deadline=None)
def test_target_ranks(call, path, packed, data):
    queries, items, targets, options = call
    options["largest_k"] = data.draw(st.sampled_from([None, 1, 2, 3] * 30 + LIMITS))
    options["item_range"] = data.draw(st.sampled_from([None] * 20 + [(0, 0), (0, 1)] * 5 + RANGES))

    def run(path, options):
        return target_ranks(queries, Catalogue(items) if packed else items, targets, path=path, **options)

    found, expected = outcome(lambda: run(path, options)), outcome(lambda: run("torch", torch_options(options)))
    # the torch path looks at all items, the others only at those that count
    assert found == expected or (expected == "refused" and options["item_range"] is not None)


@given(calls(), st.sampled_from([*PATHS, "auto"]),
       st.sampled_from([1, 2, 5, 41, 3000] * 8 + [*INTEGERS[:6], 2**62, 2**70, 2.0, None, "1"]))
@settings(max_examples=400, deadline=None)
def test_top_k(call, path, k):
    queries, items, _, options = call
    assert outcome(lambda: top_k(queries, items, k, path=path, **options)) == \
        outcome(lambda: top_k(queries, items, k, path="torch", **torch_options(options)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [1e38, 3e38])
def test_items_at_the_end_of_float32(path, size):
    """Sums within one such item overflow, products with short queries do not."""
    for width in (2, 8, 32, 100):
        rng = np.random.default_rng(width)
        items = rng.standard_normal((200, width)).astype(np.float32)
        items[5] = rng.choice([-size, size], width)
        queries = (rng.standard_normal((20, width)) * 1e-3 / width).astype(np.float32)
        queries[3] = 0
        for call in (lambda p, q=queries, x=items: target_ranks(q, x, np.arange(20), path=p),
                     lambda p, q=queries, x=items: top_k(q, x, 7, path=p)):
            expected = outcome(lambda call=call: call("torch"))
            assert expected != "refused" and outcome(lambda call=call: call(path)) == expected


@pytest.mark.parametrize("path", PATHS)
def test_scores_do_not_depend_on_the_arithmetic_of_the_calling_thread(path):
    """Subnormal numbers, of which small float16 numbers are full, count although torch was told to drop them."""
    rng = np.random.default_rng(0)
    items = (rng.standard_normal((300, 16)) * 2e-5).astype(np.float16)
    queries = rng.standard_normal((20, 16)).astype(np.float32)
    expected = [outcome(lambda: target_ranks(queries, items, np.arange(20), path="torch")),
                outcome(lambda: top_k(queries, items, 9, path="torch"))]
    try:
        torch.set_flush_denormal(True)
        for threads in (1, 3):
            assert [outcome(lambda n=threads: target_ranks(queries, items, np.arange(20), path=path, threads=n)),
                    outcome(lambda n=threads: top_k(queries, items, 9, path=path, threads=n))] == expected
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_target_outside_the_range_is_checked_too(path, bad):
    items = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    queries = items[:3].copy()
    items[40] = bad
    with pytest.raises(ValueError, match="items: NaN|overflow float32"):
        target_ranks(queries, items, [40, 1, 2], item_range=(0, 32), path=path)
