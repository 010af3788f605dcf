"""The soft-prompt projection and its insertion against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from karma_fast.model.soft_prompt import SoftPromptProjection
from karma_kernels import insert_soft_tokens, soft_prompt
from karma_kernels.soft_prompt.reference import insert_rows


def weights(width=3, mid=5, hidden=4, num_tokens=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((width,), (mid, width), (mid,), (num_tokens * hidden, mid))
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]


def plain(vectors, norm_weight, w1, b1, w2, num_tokens, token_norm):
    x = F.rms_norm(vectors, vectors.shape[1:], norm_weight, eps=1e-6)
    z = (F.gelu(x @ w1.T + b1) @ w2.T).reshape(len(vectors), num_tokens, len(w2) // num_tokens)
    return token_norm * z / z.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("rows,width,mid,hidden,num_tokens",
                         [(1, 1, 1, 1, 1), (4, 3, 5, 7, 2), (0, 3, 2, 5, 3), (9, 17, 6, 2, 1)])
def test_equals_plain_layers(rows, width, mid, hidden, num_tokens):
    vectors = torch.randn(rows, width, dtype=torch.float64)
    own = weights(width, mid, hidden, num_tokens)
    out = soft_prompt(vectors, *own, num_tokens=num_tokens, token_norm=3.0)
    assert out.shape == (rows, num_tokens, hidden)
    torch.testing.assert_close(out, plain(vectors, *own, num_tokens, 3.0))


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_gradcheck(num_tokens):
    inputs = [torch.randn(3, 3, dtype=torch.float64), *weights(num_tokens=num_tokens), torch.tensor(1.5).double()]

    def tokens(vectors, norm_weight, w1, b1, w2, token_norm):
        return soft_prompt(vectors, norm_weight, w1, b1, w2, num_tokens=num_tokens, token_norm=token_norm)

    assert torch.autograd.gradcheck(tokens, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    vectors, own = torch.randn(8, 33).to(dtype), weights(33, 17, 29, 2, dtype)
    out = soft_prompt(vectors, *own, num_tokens=2)
    exact = plain(vectors.double(), *(w.double() for w in own), 2, 1.0)
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft_prompt(vectors, *own, num_tokens=2), out)
    # vectors may be kept in half precision beside float32 weights
    own = weights(33, 17, 29, 2, torch.float32)
    assert torch.equal(soft_prompt(vectors, *own), soft_prompt(vectors.float(), *own))


def test_zero_and_nan_vectors():
    own = [w.requires_grad_() for w in weights()]
    with torch.no_grad():
        own[2].zero_()  # without a bias a zero vector gives z = 0
    out = soft_prompt(torch.zeros(1, 3, dtype=torch.float64), *own, num_tokens=2, token_norm=5.0)
    out.sum().backward()
    assert not out.any() and not own[3].grad.any()
    vectors = torch.ones(2, 3, dtype=torch.float64)
    vectors[1, 1] = float("nan")
    out = soft_prompt(vectors, *own, num_tokens=2)
    assert torch.isfinite(out[0]).all() and out[1].isnan().all()


def insert_loop(token_ids, slots, soft, table, learned):
    rows = [[soft[s] if s >= 0 else table[t] if s == -1 else learned[-2 - s] for t, s in zip(ts, ss, strict=True)]
            for ts, ss in zip(token_ids.tolist(), slots.tolist(), strict=True)]
    return torch.stack([torch.stack(row) for row in rows])


@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_insert_equals_a_loop(batch, length, rows, num_tokens, seed):
    g = torch.Generator().manual_seed(seed)
    soft = torch.randn(rows, num_tokens, 4, generator=g, dtype=torch.float64, requires_grad=True)
    table = torch.randn(6, 4, generator=g, dtype=torch.float64, requires_grad=True)
    token_ids = torch.randint(0, 6, (batch, length), generator=g)
    learned = torch.randn(2, 4, generator=g, dtype=torch.float64, requires_grad=True)
    slots = torch.randint(-3, rows * num_tokens, (batch, length), generator=g)  # slots repeat and are left out
    upstream = torch.randn(batch, length, 4, generator=g, dtype=torch.float64)
    results = []
    for insert, values in ((insert_soft_tokens, soft), (insert_loop, soft.flatten(0, 1))):
        soft.grad = table.grad = learned.grad = None
        out = insert(token_ids, slots, values, table, learned=learned)
        out.backward(upstream)
        results.append((out, *(torch.zeros_like(x) if x.grad is None else x.grad for x in (soft, table, learned))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_insert_gradcheck():
    token_ids, slots = torch.tensor([[0, 1, 2], [2, 2, 0]]), torch.tensor([[1, -1, 1], [-1, 0, -1]])
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs[1] = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda soft, table: insert_soft_tokens(token_ids, slots, soft, table), inputs)


def test_insert_leaves_a_frozen_table_alone():
    soft, table = torch.randn(1, 4, requires_grad=True), torch.randn(5, 4, dtype=torch.bfloat16)
    out = insert_soft_tokens(torch.tensor([[3, 0]], dtype=torch.int32), torch.tensor([[-1, 0]]), soft, table)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[0, 0], table[3]) and torch.equal(out[0, 1], soft[0].bfloat16())
    assert table.grad is None and torch.equal(soft.grad, torch.ones(1, 4))


def test_insert_reads_no_id_under_a_soft_token():
    soft, table = torch.ones(1, 2), torch.zeros(3, 2)
    out = insert_soft_tokens(torch.tensor([[-100, 2]]), torch.tensor([[0, -1]]), soft, table)
    assert torch.equal(out, torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]))
    # nothing to insert at all
    out = insert_soft_tokens(torch.tensor([[2]]), torch.tensor([[-1]]), torch.zeros(0, 2), table + 1)
    assert torch.equal(out, torch.ones(1, 1, 2))
    assert insert_soft_tokens(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long), soft,
                              table).shape == (0, 3, 2)


BAD_PLACES = [([[0, 0]], [[-2, 0]]), ([[0, 0]], [[1, 0]]), ([[3, 0]], [[-1, 0]]), ([[-1, 0]], [[-1, 0]])]


@pytest.mark.parametrize("token_ids,slots", BAD_PLACES)
def test_bad_slots_and_ids(token_ids, slots):
    token_ids, slots, soft, table = torch.tensor(token_ids), torch.tensor(slots), torch.ones(1, 2), torch.zeros(3, 2)
    with pytest.raises(IndexError, match="slots: got|token_ids: got"):
        insert_soft_tokens(token_ids, slots, soft, table)
    out = insert_rows(token_ids, slots, soft, table)  # what devices other than the CPU do
    assert out[0, 0].isnan().all() and torch.equal(out[0, 1], torch.ones(2))


@pytest.mark.gpu
@pytest.mark.parametrize("token_ids,slots", BAD_PLACES)
def test_bad_slots_and_ids_on_a_gpu(token_ids, slots):
    out = insert_soft_tokens(torch.tensor(token_ids, device="cuda"), torch.tensor(slots, device="cuda"),
                             torch.ones(1, 2, device="cuda"), torch.zeros(3, 2, device="cuda"))
    assert out[0, 0].isnan().all() and torch.equal(out[0, 1].cpu(), torch.ones(2))


V, W = torch.randn(2, 3), weights(dtype=torch.float32)


@pytest.mark.parametrize("change,error,message", [
    ({"vectors": V.long()}, TypeError, "vectors: got dtype"),
    ({"vectors": V[0]}, ValueError, "vectors: got shape"),
    ({"vectors": torch.randn(2, 4)}, ValueError, "do not fit"),
    ({"vectors": V.to("meta")}, ValueError, "vectors on meta"),
    ({"w1": W[1].double()}, TypeError, "same dtype"),
    ({"b1": W[2][:2]}, ValueError, "do not fit"),
    ({"w2": W[3][:7]}, ValueError, "multiple of num_tokens = 2"),
    ({"num_tokens": 0}, ValueError, "num_tokens: got 0"),
    ({"token_norm": torch.ones(2)}, ValueError, "token_norm: got shape"),
    ({"token_norm": "1"}, TypeError, "token_norm: got str"),
    ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
])
def test_projection_refusals(change, error, message):
    options = dict(zip(("norm_weight", "w1", "b1", "w2"), W, strict=True)) | {"vectors": V, "num_tokens": 2} | change
    with pytest.raises(error, match=message):
        soft_prompt(**options)


IDS, SOFT, TABLE = torch.zeros(2, 3, dtype=torch.long), torch.randn(4, 5), torch.randn(6, 5)


@pytest.mark.parametrize("arguments,error,message", [
    ((IDS.float(), IDS, SOFT, TABLE), TypeError, "token_ids: got dtype"),
    ((IDS, IDS.bool(), SOFT, TABLE), TypeError, "slots: got dtype"),
    ((IDS, IDS[:1], SOFT, TABLE), ValueError, "both must be"),
    ((IDS, IDS, SOFT[:, :4], TABLE), ValueError, "soft tokens of width 4"),
    ((IDS, IDS, SOFT.long(), TABLE), TypeError, "soft: got dtype"),
    ((IDS, IDS.to("meta"), SOFT, TABLE), ValueError, "slots on meta"),
    ((IDS, IDS, SOFT, TABLE[:0]), ValueError, "embedding_weight: got shape"),
])
def test_insert_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        insert_soft_tokens(*arguments)
    with pytest.raises(ValueError, match="only 'reference'"):
        insert_soft_tokens(IDS, IDS, SOFT, TABLE, backend="fused")
    with pytest.raises(ValueError, match="learned: got shape"):
        insert_soft_tokens(IDS, IDS, SOFT, TABLE, learned=torch.ones(5))


def test_module():
    projection = SoftPromptProjection(6, 8, num_tokens=2, token_norm=4.0)
    vectors, table = torch.randn(3, 6), torch.randn(10, 8)
    tokens = projection(vectors)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.full((3, 2), 4.0))
    learned = torch.randn(1, 8)
    token_ids, slots = torch.tensor([[1, 0, 0, 2, 0]]), torch.tensor([[-1, 4, 5, -1, -2]])
    out = projection.insert(token_ids, slots, vectors, table, learned)
    assert torch.equal(out[0], torch.stack([table[1], tokens[2, 0], tokens[2, 1], table[2], learned[0]]))
    assert sorted(dict(projection.named_parameters())) == ["down.weight", "norm.weight", "up.bias", "up.weight"]

    projection.token_norm.fill_(7.0)  # saved with the weights
    other = SoftPromptProjection(6, 8, num_tokens=2)
    other.load_state_dict(projection.state_dict())
    assert torch.equal(other(vectors), projection(vectors)) and other.token_norm == 7.0
    assert SoftPromptProjection(6, 8, mid_features=9).up.weight.shape == (9, 6)


def test_module_refusals():
    for arguments in ((0, 8), (6, 0), (6, 8, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            SoftPromptProjection(*arguments)
    with pytest.raises(ValueError, match="token_norm: got -1"):
        SoftPromptProjection(6, 8, token_norm=-1)
    with pytest.raises(ValueError, match=r"\(rows, 6\) is needed"):
        SoftPromptProjection(6, 8)(torch.randn(2, 5))


def test_module_trains_through_insert():
    torch.manual_seed(0)
    projection, head = SoftPromptProjection(4, 6), nn.Linear(6, 3)
    vectors, table = torch.randn(3, 4), torch.randn(5, 6)
    optimizer = torch.optim.Adam([*projection.parameters(), *head.parameters()], lr=0.02)
    slots = torch.tensor([[-1, 0], [-1, 1], [-1, 2]])
    for _ in range(150):
        out = head(projection.insert(torch.zeros(3, 2, dtype=torch.long), slots, vectors, table)[:, 1])
        loss = F.cross_entropy(out, torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
