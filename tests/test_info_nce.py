"""The InfoNCE definition against a dense cross-entropy."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from info_nce_inputs import make_ids
from torch.nn import functional as F

from karma_fast.losses.info_nce import InfoNCELoss
from karma_kernels import info_nce
from karma_kernels.info_nce.reference import info_nce_rows

# labels, ids (2: of two kinds), log_q, symmetric, normalize
FLAGS = list(itertools.product([False, True], [False, True, 2], *[[False, True]] * 3))


def make(rows=5, keys=7, width=3, seed=0, dtype=torch.float64, labels=True, ids=True, log_q=True):
    g = torch.Generator().manual_seed(seed)
    return {
        "query": torch.randn(rows, width, generator=g, dtype=dtype),
        "key": torch.randn(keys, width, generator=g, dtype=dtype),
        "labels": torch.randperm(keys, generator=g)[:rows] if labels else None,
        "key_ids": make_ids(keys, ids, g) if ids else None,
        "log_q": torch.rand(keys, generator=g, dtype=dtype).log() if log_q else None,
    }


def dense(query, key, labels=None, *, scale=20.0, query_ids=None, key_ids=None, log_q=None, symmetric=False,
          reduction="mean", normalize=False):
    """The same from F.cross_entropy and loops, in float64."""
    query, key = query.double(), key.double()
    labels = torch.arange(len(query)) if labels is None else labels
    if normalize:
        query, key = F.normalize(query), F.normalize(key)
    scores = scale * query @ key.T
    logits = scores if log_q is None else scores - log_q.double()
    ids = key_ids[labels] if query_ids is None and key_ids is not None else query_ids
    row_drop, column_drop = torch.zeros_like(logits).bool(), torch.zeros(len(query), len(query)).bool()
    if key_ids is not None:
        for i in range(len(query)):
            for j in range(len(key)):
                row_drop[i, j] = (key_ids[j] == ids[i]).any() and j != labels[i]
            for k in range(len(query)):
                column_drop[i, k] = (ids[k] == key_ids[labels[i]]).any() and k != i
    out = F.cross_entropy(logits.masked_fill(row_drop, -torch.inf), labels, reduction=reduction)
    if symmetric:
        back = scores[:, labels].T.masked_fill(column_drop, -torch.inf)
        out = (out + F.cross_entropy(back, torch.arange(len(query)), reduction=reduction)) / 2
    return out


@pytest.mark.parametrize("labels,ids,log_q,symmetric,normalize", FLAGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_dense_cross_entropy(labels, ids, log_q, symmetric, normalize, reduction):
    inputs = make(labels=labels, ids=ids, log_q=log_q)
    options = {"scale": 3.0, "symmetric": symmetric, "normalize": normalize, "reduction": reduction}
    torch.testing.assert_close(info_nce(**inputs, **options), dense(**inputs, **options))


@pytest.mark.parametrize("labels,ids,log_q,symmetric,normalize", FLAGS)
def test_gradcheck(labels, ids, log_q, symmetric, normalize):
    inputs = make(rows=3, keys=5, labels=labels, ids=ids, log_q=log_q)
    names = [name for name in ("query", "key", "log_q") if inputs[name] is not None]
    fixed = {name: x for name, x in inputs.items() if name not in names}

    def loss(scale, *tensors):
        return info_nce(**fixed, **dict(zip(names, tensors, strict=True)), scale=scale, symmetric=symmetric,
                        normalize=normalize, reduction="none")

    values = [torch.tensor(1.7, dtype=torch.float64), *(inputs[name] for name in names)]
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in values])


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 9), st.integers(0, 10**6), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_shape(rows, extra, width, seed, symmetric, own_query_ids):
    inputs = make(rows, rows + extra, width, seed)
    if own_query_ids:
        inputs["query_ids"] = torch.randint(0, 4, (rows,), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(info_nce(**inputs, symmetric=symmetric), dense(**inputs, symmetric=symmetric))


@given(st.integers(0, 10**6), st.permutations(range(6)))
@settings(max_examples=30, deadline=None)
def test_order_of_keys_does_not_matter(seed, order):
    inputs = make(4, 6, 3, seed)
    order = torch.tensor(order)
    moved = {"query": inputs["query"], "key": inputs["key"][order], "key_ids": inputs["key_ids"][order],
             "log_q": inputs["log_q"][order], "labels": order.argsort()[inputs["labels"]]}
    torch.testing.assert_close(info_nce(**moved, symmetric=True), info_nce(**inputs, symmetric=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    inputs = make(17, 33, 21, dtype=dtype)
    loss = info_nce(**inputs, normalize=True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), dense(**inputs, normalize=True), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(**inputs, normalize=True), loss)
    query = inputs["query"].requires_grad_()
    info_nce(**inputs).backward()
    assert query.grad.dtype == dtype


def test_one_sure_row_keeps_its_digits():
    """p of the positive is 1 - 2e-18: 1 - p and the loss must not round to 0, nor the gradient vanish."""
    query, key = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[1.0], [0.0]])
    loss = info_nce(query, key, scale=40.0)
    loss.backward()
    assert loss.item() == pytest.approx(4.248354255291589e-18, rel=1e-5, abs=0)
    assert query.grad.item() == pytest.approx(-40 * 4.248354255291589e-18, rel=1e-5, abs=0)


def test_large_scale_at_width_4096():
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(9, 4096, generator=g), torch.randn(11, 4096, generator=g)
    for shift in (0.0, 0.6**0.5 / 0.4**0.5 * 64):  # the second gives a cosine of about 0.6 between all rows
        q, k = query.clone(), key.clone()
        q[:, 0] += shift
        k[:, 0] += shift
        torch.testing.assert_close(info_nce(q, k, scale=100.0, normalize=True).double(),
                                   dense(q, k, scale=100.0, normalize=True), rtol=1e-4, atol=1e-4)


def test_everything_masked_and_duplicates():
    query, key = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    ids = torch.zeros(5, dtype=torch.long)
    for symmetric in (False, True):
        loss = info_nce(query, key, key_ids=ids, symmetric=symmetric)
        loss.backward()
        assert loss.item() == 0 and not query.grad.any() and not key.grad.any()
    # identical keys without ids are ordinary negatives
    assert info_nce(torch.ones(4, 2), torch.ones(4, 2)).item() == pytest.approx(torch.tensor(4.0).log().item())


def test_a_copy_of_the_item_asked_for_is_no_negative():
    query, key = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    masked = info_nce(query, key, key_ids=torch.tensor([7, 8, 7]), reduction="none")
    assert masked[0] == info_nce(query, key[:2], reduction="none")[0]
    # the id asked for decides, not the id of the key
    other = info_nce(query, key, query_ids=torch.tensor([8, 8]), key_ids=torch.tensor([7, 8, 7]), reduction="none")
    assert other[0] == info_nce(query[:1], key[[0, 2]], reduction="none")[0]


def test_gradients_follow_the_upstream_gradient():
    inputs = make()
    weights = torch.tensor([1.0, -2.0, 0.0, 3.5, 0.25], dtype=torch.float64)
    grads = []
    for loss in (info_nce, dense):
        query = inputs["query"].clone().requires_grad_()
        (loss(**(inputs | {"query": query}), reduction="none") * weights).sum().backward()
        grads.append(query.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("keys", [0, 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_rows(keys, symmetric):
    tensors = [torch.zeros(0, 2, requires_grad=True), torch.randn(keys, 2, requires_grad=True),
               torch.zeros(keys, requires_grad=True), torch.tensor(2.0, requires_grad=True)]
    query, key, log_q, scale = tensors
    loss = info_nce(query, key, log_q=log_q, scale=scale, symmetric=symmetric, key_ids=torch.arange(keys))
    loss.backward()
    assert loss.item() == 0
    assert all(x.grad is not None and not x.grad.any() for x in tensors)
    assert info_nce(query, key, reduction="none").shape == (0,)


def test_zero_rows_normalize_to_zero_without_gradient():
    query = torch.tensor([[0.0, 0.0], [3e30, 4e30]], requires_grad=True)
    loss = info_nce(query, torch.eye(2), scale=1.0, normalize=True, reduction="none")
    loss.sum().backward()
    assert loss[0].item() == pytest.approx(0.693147, abs=1e-6)
    assert loss[1].item() == pytest.approx(dense(query[1:] / 1e30, torch.eye(2), torch.tensor([1]), scale=1.0,
                                                 normalize=True).item())
    assert not query.grad[0].any() and torch.isfinite(query.grad).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["query", "key", "extra key", "masked key", "log_q", "scale", "number"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_not_finite_shows(bad, where, symmetric, normalize):
    inputs = make(dtype=torch.float32, labels=False)
    inputs["query"][:, 0] = -1.0  # an infinite key would score -inf for all rows and vanish from their sums
    inputs["key_ids"] = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    scale = torch.tensor(5.0)
    if where in ("query", "log_q"):
        inputs[where][1] = bad
    elif where.endswith("key"):
        inputs["key"][{"key": 1, "extra key": 5, "masked key": 6}[where], 0] = bad
    else:
        scale = torch.tensor(bad) if where == "scale" else bad
    query = inputs["query"].requires_grad_()
    loss = info_nce(**inputs, scale=scale, symmetric=symmetric, normalize=normalize)
    loss.backward()
    assert not torch.isfinite(loss)
    assert not torch.isfinite(query.grad).all()


def test_same_bits_twice():
    inputs = make(40, 60, 16, dtype=torch.float32)
    runs = []
    for _ in range(2):
        query, key = inputs["query"].clone().requires_grad_(), inputs["key"].clone().requires_grad_()
        loss = info_nce(**(inputs | {"query": query, "key": key}), symmetric=True)
        loss.backward()
        runs.append((loss, query.grad, key.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


Q, K = torch.randn(3, 2), torch.randn(4, 2)
REFUSED = [
    ({"query": [[1.0]]}, TypeError, "query: got list"),
    ({"query": Q.long()}, TypeError, "query: got dtype torch.int64"),
    ({"query": Q.double()}, TypeError, "both must be the same"),
    ({"query": Q[0]}, ValueError, r"query: got shape \(2,\)"),
    ({"query": torch.randn(3, 5)}, ValueError, "query has width 5 and key 2"),
    ({"query": Q[:, :0], "key": K[:, :0]}, ValueError, "width 0"),
    ({"key": K.to("meta")}, ValueError, "key on meta"),
    ({"key": K[:2]}, ValueError, "3 queries but 2 keys"),
    ({"key": K[:0], "labels": torch.zeros(3, dtype=torch.long)}, ValueError, "no keys"),
    ({"labels": torch.tensor([0, 1])}, ValueError, r"labels: got shape \(2,\); \(3,\)"),
    ({"labels": torch.tensor([0.0, 1, 2])}, TypeError, "labels: got dtype torch.float32"),
    ({"labels": torch.tensor([True, False, True])}, TypeError, "labels: got dtype torch.bool"),
    ({"labels": torch.tensor([0, 1, 4])}, ValueError, "labels: got 0 to 4; with 4 keys 0 to 3"),
    ({"labels": torch.tensor([0, -1, 2])}, ValueError, "labels: got -1 to 2"),
    ({"labels": torch.tensor([0, 1, 1]), "symmetric": True}, ValueError, "distinct labels"),
    ({"query_ids": torch.arange(3)}, ValueError, "query_ids given without key_ids"),
    ({"query_ids": torch.arange(4), "key_ids": torch.arange(4)}, ValueError, "query_ids: got shape"),
    ({"key_ids": torch.arange(3)}, ValueError, "key_ids: got shape"),
    ({"key_ids": torch.zeros(4, 3, dtype=torch.long)}, ValueError, r"key_ids: got shape \(4, 3\); \(4,\) or \(4, 2\)"),
    ({"key_ids": torch.zeros(4, 2, dtype=torch.long), "query_ids": torch.arange(3)}, ValueError, "both need one kind"),
    ({"key_ids": torch.rand(4)}, TypeError, "key_ids: got dtype"),
    ({"log_q": torch.zeros(3)}, ValueError, "log_q: got shape"),
    ({"log_q": torch.zeros(4, dtype=torch.long)}, TypeError, "log_q: got dtype"),
    ({"log_q": [0.0] * 4}, TypeError, "log_q: got list"),
    ({"scale": torch.ones(2)}, ValueError, "scale: got shape"),
    ({"scale": torch.tensor(1)}, ValueError, "scale: got shape"),
    ({"scale": "20"}, TypeError, "scale: got str"),
    ({"scale": torch.tensor(1.0, device="meta")}, ValueError, "scale is on meta"),
    ({"reduction": "avg"}, ValueError, "mean, sum or none"),
    ({"backend": "dense"}, ValueError, "backend: got 'dense'; auto, reference, chunked or fused"),
    ({"backend": "fused"}, RuntimeError, "needs tensors on a CUDA device|needs Triton"),
    ({"workspace_bytes": 0}, ValueError, "workspace_bytes: got 0"),
]


@pytest.mark.parametrize("change,error,message", REFUSED)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        info_nce(**({"query": Q, "key": K} | change))


def test_wrong_labels_give_nan_where_they_are_not_looked_at():
    for labels, symmetric in (([0, 1, 4], False), ([0, -1, 2], False), ([0, 1, 1], True)):
        query = Q.clone().requires_grad_()
        rows = info_nce_rows(query, K, torch.tensor(labels), torch.tensor(1.0), None, None, None, symmetric, False)
        rows.sum().backward()
        assert query.grad.isnan().all()


@pytest.mark.gpu
def test_wrong_labels_on_a_gpu_give_nan():
    query, key = torch.randn(3, 2, device="cuda", requires_grad=True), torch.randn(4, 2, device="cuda")
    for labels, symmetric in (([0, 1, 4], False), ([0, -1, 2], False), ([0, 1, 1], True)):
        loss = info_nce(query, key, torch.tensor(labels, device="cuda"), symmetric=symmetric)
        loss.backward()
        assert loss.isnan() and query.grad.isnan().any()


def test_module_scale():
    loss_fn = InfoNCELoss(scale=99.0, max_scale=100.0)
    assert loss_fn.scale.item() == pytest.approx(99.0)
    with torch.no_grad():
        loss_fn.log_scale.add_(1.0)
    loss_fn(torch.eye(3), torch.eye(3).roll(1, 0)).backward()
    assert loss_fn.log_scale.grad.item() > 0  # above the limit the gradient is alive
    loss_fn.clamp_()
    assert loss_fn.scale.item() == pytest.approx(100.0)
    fixed = InfoNCELoss(scale=5.0, learnable=False)
    assert list(fixed.parameters()) == [] and "log_scale" in fixed.state_dict()
    with pytest.raises(ValueError, match="scale: got 200"):
        InfoNCELoss(scale=200.0)
    with pytest.raises(ValueError, match="scale: got 0"):
        InfoNCELoss(scale=0.0)


def test_module_is_the_function():
    inputs = make()
    loss = InfoNCELoss(scale=7.0, symmetric=True).double()(**inputs)
    torch.testing.assert_close(loss, dense(**inputs, scale=torch.tensor(7.0).log().double().exp(), symmetric=True,
                                           normalize=True))
    # gather without a process group is the same
    torch.testing.assert_close(InfoNCELoss(scale=7.0, symmetric=True, gather=True).double()(**inputs), loss)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_linear_tower_beside_an_embedding_under_autocast(backend, symmetric):
    """Autocast makes the linear layer's output half; the loss is that of both outputs in float32."""
    torch.manual_seed(0)
    user, item = torch.nn.Linear(5, 8), torch.nn.Embedding(9, 8)
    features, ids = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 1, 5, 7, 8])
    loss_fn = InfoNCELoss(scale=10.0, symmetric=symmetric, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        query, key = user(features), item(ids)
        assert (query.dtype, key.dtype) == (torch.bfloat16, torch.float32)
        loss = loss_fn(query, key, key_ids=ids)
        again = loss_fn(query.detach().float(), key.detach(), key_ids=ids)  # of one dtype, and float32 stays float32
    loss.backward()
    assert loss.dtype == torch.float32 and user.weight.grad.any() and item.weight.grad.any()
    expected = loss_fn(query.detach().float(), key.detach(), key_ids=ids)
    assert torch.equal(loss, expected) and torch.equal(again, expected)
    with pytest.raises(TypeError, match="query is torch.bfloat16 and key is torch.float32"):
        info_nce(query, key)
    for wrong, said in ((ids, "key: got dtype torch.int64"), ([1.0], "key: got list")):
        with pytest.raises(TypeError, match=said):
            loss_fn(query, wrong)
