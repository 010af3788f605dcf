"""InfoNCELoss(gather=True): parts of a batch in several processes give the loss and gradients of one process.

The processes run gather_worker.py under torchrun and under accelerate launch, once for each number of them.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import gather_worker as worker
import pytest
import torch

from karma_fast.losses.info_nce import InfoNCELoss

ROOT = Path(__file__).parent.parent
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}  # float64; what is left are sums in another order
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


def launch(*command, **environment):
    """Its error messages, None if it went well."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1",
                                "CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True,
                          timeout=300)
    return done.stderr if done.returncode else None


@functools.cache
def load(folder, processes):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def launched():
    """processes -> (folder, error messages): each number is started once, also if it fails."""
    return {}


@pytest.fixture(params=[2, 4])
def results(request, launched, tmp_path_factory):
    """What each of two or four processes found, by rank."""
    processes = request.param
    if processes not in launched:
        folder = tmp_path_factory.mktemp("gather")
        launched[processes] = folder, "not finished in time"
        launched[processes] = folder, launch("torch.distributed.run", "--standalone",
                                             f"--nproc-per-node={processes}", worker.__file__, str(folder))
    folder, error = launched[processes]
    assert error is None, error
    return load(folder, processes)


def one_process(case):
    """Loss and gradients by the name of the parameter, of the whole batch without a process group."""
    case = case._replace(sizes=(worker.BATCH,))
    model = worker.Model(case)
    values = worker.step(model, case, 0)
    return dict(zip(["loss", *(name for name, _ in model.named_parameters())], values, strict=True))


ALL = [(processes, case) for processes in (2, 4) for case in worker.cases(processes)]
WRONG = [(processes, case) for processes in (2, 4) for case in worker.wrong_cases(processes)]


def name(case):
    sizes, hard, symmetric, extras, variant = case
    return "-".join(["+".join(map(str, sizes)), f"{hard} hard", "symmetric" * symmetric, *extras, variant])


def averaged(results, case):
    return [found["steps"][worker.cases(len(results)).index(case)] for found in results]


@pytest.mark.parametrize("results,case", [(n, case) for n, case in ALL if (n, case) not in WRONG],
                         indirect=["results"], ids=lambda x: str(x) if isinstance(x, int) else name(x))
def test_parts_equal_the_whole(results, case):
    expected = one_process(case)
    assert all(grad.abs().max() > 1e-4 for grad in expected.values())  # else the comparison would show nothing
    assert ("log_q" in expected) == ("log_q" in case.extras)
    for values in averaged(results, case):
        for (key, value), found in zip(expected.items(), values, strict=True):
            if case.variant == "autocast" and key.startswith("tower"):  # bfloat16 on their way through the encoder
                assert (found - value).norm() < 0.02 * value.norm(), key
                continue
            tolerance = FLOAT32 if case.variant == "autocast" else TOLERANCE
            torch.testing.assert_close(found, value, **tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("results,case", WRONG, indirect=["results"],
                         ids=lambda x: str(x) if isinstance(x, int) else x.variant)
def test_rows_gathered_without_gradient_would_be_noticed(results, case):
    loss, weight, *_ = one_process(case._replace(variant="plain")).values()
    for found_loss, found_weight, *_ in averaged(results, case):
        torch.testing.assert_close(found_loss, loss, **TOLERANCE)  # the loss alone shows nothing
        assert (found_weight - weight).norm() > 0.1 * weight.norm()
        if case.variant == "whole loss":
            torch.testing.assert_close(found_weight, weight / len(results), **TOLERANCE)


@pytest.mark.parametrize("sizes", sorted({case.sizes for _, case in ALL if 0 not in case.sizes}))
def test_the_cases_have_copies_of_items_in_other_processes(sizes):
    parts = [worker.batch_part(1, sizes, rank) for rank in range(len(sizes))]
    for rank, part in enumerate(parts):
        others = torch.cat([other.key_ids for other in parts[:rank] + parts[rank + 1:]])
        assert torch.isin(part.query_ids, others).any()
    with_ids, without = (one_process(worker.Case(sizes, extras=extras))["loss"] for extras in (("ids",), ()))
    assert (with_ids - without).abs() > 0.01


@pytest.mark.parametrize("kind", worker.DTYPES)
def test_dtypes_under_autocast(results, kind):
    """The loss is that of the inputs as they are, in float32; each gradient has its input's dtype."""
    batch, processes, dtypes = worker.batch_part(1, (worker.BATCH,), 0), len(results), worker.DTYPES[kind]
    loss, query_grad, key_grad = worker.inputs_in(dtypes, 0, 1)
    found = [result["dtypes"][kind] for result in results]
    assert all(part[0].dtype == torch.float32 and (part[1].dtype, part[2].dtype) == dtypes for part in found)
    torch.testing.assert_close(torch.stack([part[0] for part in found]).mean(), loss, rtol=1e-6, atol=1e-6)
    eps = max(*(torch.finfo(dtype).eps for dtype in dtypes), 1e-6)
    precision = {"rtol": 0.0, "atol": 2 * eps * max(query_grad.abs().max(), key_grad.abs().max())}
    torch.testing.assert_close(torch.cat([part[1] for part in found]) / processes, query_grad, **precision)
    for rank, part in enumerate(found):
        own = worker.batch_part(1, (worker.BATCH // processes,) * processes, rank).key
        places = (own[:, None] == batch.key).all(dim=2).int().argmax(dim=1)
        torch.testing.assert_close(part[2] / processes, key_grad[places], **precision)


def test_gathered_rows(results):
    processes = len(results)
    total = 256.0 + processes - 1
    for rank, result in enumerate(results):
        found = result["rows"]
        expected = torch.cat([torch.full((n, 2), float(n)) for n in range(processes)])
        assert torch.equal(found["rows"], expected.bfloat16())
        assert torch.equal(found["grad"], torch.full((2, rank), total).bfloat16())
        assert torch.equal(found["same grad"], processes * torch.arange(3.0 * rank, 3.0 * rank + 3))
        assert torch.equal(found["upstream"], torch.arange(3.0 * processes))  # it belongs to the caller
        assert found["silent"]


def test_no_process_has_a_query(results):
    for result in results:
        loss, *grads = result["nothing"]
        assert loss == 0 and [grad.shape for grad in grads] == [(0, 3), (0, 3), ()] and grads[2] == 0


def test_all_refuse_instead_of_waiting(results):
    others = list(range(1, len(results)))
    for result in results:
        refusals = result["refusals"]
        for trial, first, rest in (("ids", "query, key, query_ids, key_ids of width 3", "query, key of width 3"),
                                   ("kinds", "key_ids, ids of two kinds of width 3", "key_ids of width 3"),
                                   ("width", "width 5", "width 3"), ("dtype", "torch.bfloat16", "torch.float32"),
                                   ("grad", "needed for key on [0]", f"needed for none on {others}")):
            message = refusals.pop(trial)
            assert "differ between the processes" in message
            assert first in message.split("; ")[1] and "on [0]" in message.split("; ")[1]
            assert rest in message.split("; ")[2] and f"on {others}" in message.split("; ")[2]
        assert list(refusals) == ["label"]
        assert "labels: got 0 to 2" in refusals["label"]  # and not the first key of the next process


def test_under_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    error = launch("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                   "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", worker.__file__,
                   str(tmp_path), "--accelerate", ACCELERATE_USE_CPU="true")
    assert error is None, error
    for values in load(tmp_path, 2):
        for case, case_values in zip(worker.accelerate_cases(), values, strict=True):
            torch.testing.assert_close(case_values, list(one_process(case).values()), **TOLERANCE)


def test_compiled_without_a_process_group():
    torch.manual_seed(0)
    query, key, ids = torch.randn(4, 3), torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    values = []
    for compiled in (False, True):
        loss_fn = InfoNCELoss(gather=True, symmetric=True)
        q = query.clone().requires_grad_()
        loss = (torch.compile(loss_fn, backend="aot_eager") if compiled else loss_fn)(q, key, key_ids=ids)
        loss.backward()
        values.append([loss.detach(), q.grad, loss_fn.log_scale.grad])
    torch.testing.assert_close(values[1], values[0])
