"""Hostile input to the C++ extension itself, below the checks of the functions that call it.

A call that is not well formed raises ValueError or TypeError; no call reads or writes outside an array.
`make sanitize` runs this file with an extension that stops at the first such access.
"""

import numpy as np
import pytest

from karma_fast.evaluation.scores import pair_scores

native = pytest.importorskip("karma_fast._C", reason="the C++ extension was not built: no C++ compiler")
PATHS = [name for name, _ in native.paths()]


def misaligned(x):
    return np.frombuffer(bytearray(b"\0" + x.tobytes()), x.dtype, offset=1, count=x.size).reshape(x.shape)


def extension_call(path, storage="float32"):
    """A well-formed call of the counting function by name of argument, and the object it is called on."""
    rng = np.random.default_rng(1)
    numbers = rng.integers(-3, 4, (300, 5)).astype(np.float32)
    rows = {"float32": numbers, "float16": numbers.astype(np.float16),
            "bfloat16": (numbers.view(np.uint32) >> 16).astype(np.uint16)}[storage]
    queries = rng.integers(-3, 4, (20, 5)).astype(np.float32)
    first, item = np.arange(0, 42, 2), rng.permutation(300)[:40].astype(np.int64)
    score = pair_scores(queries, numbers, np.arange(40) // 2, item)
    scores = queries @ numbers.T
    own = scores[np.arange(40) // 2]
    expected = [(own > score[:, None]).sum(1), (own == score[:, None]).sum(1) - 1]
    return native.Items(rows, storage, path, 0, 300, 1), rows, scores, expected, {
        "queries": queries, "first": first, "item": item, "score": score, "begin": 0, "end": 300,
        "greater": np.zeros(40, np.int64), "equal": np.zeros(40, np.int64), "threads": 2}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("threads", [-2**31, -1, 0, 1, 1000, 2**29, 2**31 - 1])
def test_extension_with_any_number_of_threads(path, storage, threads):
    packed, rows, scores, expected, call = extension_call(path, storage)
    packed = native.Items(rows, storage, path, 0, 300, threads)
    call["threads"] = threads
    packed.count(**call)
    assert np.array_equal([call["greater"], call["equal"]], expected)
    best, items = np.full((20, 4), -np.inf, np.float32), np.full((20, 4), -1)
    packed.top_k(call["queries"], None, best, items, threads)
    order = np.lexsort((np.broadcast_to(np.arange(300), scores.shape), -scores))[:, :4]
    assert np.array_equal(items, order) and np.array_equal(best, np.take_along_axis(scores, order, 1))
    again = native.pair_scores(call["queries"], rows, storage, np.arange(40) // 2, call["item"], threads)
    assert np.array_equal(again, call["score"])


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


WRONG = {  # argument -> values that must be refused, made from the right one
    "queries": [lambda x: x[:, :4], lambda x: x[:19], lambda x: x.astype(np.float64), lambda x: x[::-1],
                lambda x: x.astype(np.float16), lambda x: x[None], lambda x: None, lambda x: x * np.float32(np.nan)],
    "first": [lambda x: x[:-1], lambda x: x + 1, lambda x: np.append(x, 40), lambda x: x[::-1].copy(),
              lambda x: np.where(x == 10, -2**63, x), lambda x: np.where(x == 10, 2**63 - 1, x), lambda x: x[:0],
              lambda x: np.where(x == 10, 14, x), lambda x: x.astype(np.int32), lambda x: x.reshape(3, 7),
              lambda x: np.repeat(x, 2)[::2], lambda x: x.astype(">i8"), lambda x: np.array(0)],
    "item": [lambda x: x[:-1], lambda x: x.astype(np.uint64), lambda x: x.astype(float), lambda x: x[::-1],
             lambda x: np.where(x == x[0], -2**63, x), lambda x: np.where(x == x[0], 2**63 - 1, x),
             lambda x: np.where(x == x[0], 300, x), lambda x: x.reshape(2, 20), lambda x: x.tolist()],
    "score": [lambda x: x[1:], lambda x: x.astype(np.float64), lambda x: x[:, None], lambda x: x * np.float32(np.nan),
              lambda x: np.full_like(x, np.inf), lambda x: x[::-1]],
    "begin": [lambda x: -1, lambda x: 301, lambda x: -2**63, lambda x: 2**63 - 1, lambda x: 2**70, lambda x: 0.5],
    "end": [lambda x: -1, lambda x: 301, lambda x: -2**63, lambda x: 2**63 - 1, lambda x: 2**70, lambda x: None],
    "greater": [read_only, lambda x: x[1:], lambda x: x.astype(np.int32), lambda x: np.zeros((40, 2), np.int64)[:, 0],
                lambda x: x.astype(float), lambda x: x.reshape(2, 20)],
    "equal": [read_only, lambda x: x[1:], lambda x: x.astype(np.uint64), lambda x: np.zeros(80, np.int64)[::2]],
    "threads": [lambda x: 2**31, lambda x: -2**31 - 1, lambda x: 2**70, lambda x: "2", lambda x: 1.5],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", WRONG)
def test_extension_refuses(path, name):
    for wrong in WRONG[name]:
        packed, _, _, expected, call = extension_call(path)
        call[name] = wrong(call[name])
        with pytest.raises((ValueError, TypeError)):
            packed.count(**call)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("one, other", [("greater", "first"), ("greater", "item"), ("equal", "first"),
                                        ("equal", "greater"), ("equal", "item")])
def test_extension_refuses_results_in_the_memory_of_its_input(path, one, other):
    packed, _, _, _, call = extension_call(path)
    memory = np.zeros(41, np.int64)  # the arguments overlap, wherever they start
    size = len(call[other])
    memory[:size] = call[other]
    call[other], call[one] = memory[:size], memory[41 - 40:] if one != other else memory[:40]
    with pytest.raises(ValueError, match="shares memory"):
        packed.count(**call)


@pytest.mark.parametrize("path", PATHS)
def test_extension_refuses_bad_top_k(path):
    packed, rows, _, _, call = extension_call(path)
    queries, first, lists = call["queries"], np.arange(0, 42, 2), np.tile([3, 9], 20)

    def refused(*args):
        with pytest.raises((ValueError, TypeError)):
            packed.top_k(*args, 2)

    def room(k, rows=20):
        return np.full((rows, k), -np.inf, np.float32), np.full((rows, k), -1)

    for bad in ((first, lists[::-1].copy()), (first, np.tile([3, 3], 20)), (first[::-1].copy(), lists),
                (first, lists[1:]), (first[1:], lists), (first,), 3, (first, lists.astype(float)), "ab"):
        refused(queries, bad, *room(4))
    refused(queries, None, room(4)[0], room(5)[1])
    refused(queries, None, room(4)[0], room(4, 19)[1])
    refused(queries, None, *room(0))
    refused(queries, None, room(4)[0].astype(float), room(4)[1])
    refused(queries, None, read_only(room(4)[0]), room(4)[1])
    refused(queries, None, room(4)[0], read_only(room(4)[1]))
    refused(queries, None, queries[:, :4], room(4)[1])
    memory = np.zeros((20, 5), np.int64)
    refused(queries, None, memory.view(np.float32).reshape(-1)[:100].reshape(20, 5), memory)
    for k in (2**58 - 128, 2**60 - 1):  # sizes that overflow, of no queries
        packed.top_k(queries[:0], None, *room(k, 0), 2)


def test_extension_refuses_arrays_that_are_not_aligned():
    packed, rows, _, _, call = extension_call(PATHS[0])
    first, item, query = call["first"], call["item"], np.arange(40) // 2
    best, left_out = (np.full((20, 4), -np.inf, np.float32), np.full((20, 4), -1)), (first, np.tile([3, 9], 20))
    calls = [
        (packed.count, list(call.values()), (0, 1, 2, 3, 6, 7)),
        (packed.top_k, [call["queries"], None, *best, 2], (0, 2, 3)),
        (native.pair_scores, [call["queries"], rows, "float32", query, item, 1], (0, 3, 4)),
        (native.left_out, [*left_out, first, item, 300], (0, 1, 2, 3)),
        (native.count_listed, [rows, "float32", 1e3, call["queries"], first, item, call["score"], *left_out,
                               call["greater"], call["equal"], 1], (3, 4, 5, 6, 7, 8, 9, 10)),
    ]
    for function, arguments, arrays in calls:
        function(*arguments)
        for at in arrays:
            with pytest.raises(ValueError, match="not aligned"):
                function(*arguments[:at], misaligned(arguments[at]), *arguments[at + 1:])
    for lists in ((misaligned(first), left_out[1]), (first, misaligned(left_out[1]))):
        with pytest.raises(ValueError, match="not aligned"):
            packed.top_k(call["queries"], lists, *best, 2)


@pytest.mark.parametrize("storage, rows", [
    ("float16", np.zeros((4, 3), np.uint16)), ("bfloat16", np.zeros((4, 3), np.float16)), ("half", np.zeros((4, 3))),
    ("float16", np.zeros((4, 3), ">f2")), ("float32", np.zeros((4, 3), ">f4")),
    ("float32", np.zeros((4, 3), np.int32)), ("float32", np.zeros((4, 6), np.float32)[:, ::2]),
    ("float32", np.zeros((3, 4), np.float32).T),
    ("float32", np.zeros((4, 0), np.float32)), ("float32", np.zeros((1, 65537), np.float32)),
    ("float32", np.zeros(4, np.float32)), ("float32", misaligned(np.ones((4, 3), np.float32))),
    ("float16", misaligned(np.ones((4, 3), np.float16))), ("bfloat16", np.zeros((4, 3), "S2")),
])
def test_extension_refuses_rows(storage, rows):
    with pytest.raises((ValueError, TypeError)):
        native.Items(rows, storage, PATHS[0], 0, len(rows), 1)
    with pytest.raises((ValueError, TypeError)):
        native.pair_scores(np.zeros((2, rows.shape[-1]), np.float32), rows, storage, np.zeros(1, np.int64),
                           np.zeros(1, np.int64), 1)


def test_extension_refuses_lists():
    _, rows, _, _, call = extension_call(PATHS[0])
    first, item = call["first"], call["item"]
    for begin, end in ((-1, 3), (3, 2), (0, 301), (-2**63, 2**63 - 1)):
        with pytest.raises(ValueError, match="range"):
            native.Items(rows, "float32", PATHS[0], begin, end, 1)
    with pytest.raises(ValueError, match="path"):
        native.Items(rows, "float32", "auto", 0, 300, 1)
    for bad in (300, -1, 2**63 - 1, -2**63):
        wrong = np.where(np.arange(40) == 7, bad, item)
        with pytest.raises(ValueError, match="is allowed"):
            native.left_out(first, wrong, first, item, 300)
        with pytest.raises(ValueError, match="is allowed"):
            native.pair_scores(call["queries"], rows, "float32", np.arange(40) // 2, wrong, 1)
        with pytest.raises(ValueError, match="is allowed"):
            native.count_listed(rows, "float32", 1.0, call["queries"], first, item, call["score"], first, wrong,
                                call["greater"], call["equal"], 1)
    for bad in (first[:0], np.array(0), first[::-1].copy(), first + 1):
        with pytest.raises(ValueError, match="must rise"):
            native.left_out(bad, item, first, item, 300)
