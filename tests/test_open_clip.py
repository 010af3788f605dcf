"""The drop-in for open_clip's loss against open_clip's own class, in one process and in two."""

import importlib.util
import itertools
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from karma_fast.integrations.open_clip import ClipLoss

COMBINATIONS = list(itertools.product([False, True], repeat=2))  # local_loss, gather_with_grad
SIZES = ((4, 4), (3, 6))  # open_clip needs the same size everywhere, we do not


def original():
    """open_clip's class from its one file, which needs torch alone; the package needs torchvision and timm too."""
    found = importlib.util.find_spec("open_clip")
    if found is None:
        return None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(found.origin).parent / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss


needs_open_clip = pytest.mark.skipif(original() is None, reason="open_clip_torch is not installed")


def make(rows=6, width=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(rows, width, generator=g, dtype=dtype)).requires_grad_() for _ in "it")
    return image, text, torch.tensor(1.5, dtype=dtype, requires_grad=True)


def dense(image, text, scale, ids=None, constant_keys=False):
    """What the formula says, from the score matrices."""
    labels, total = torch.arange(len(image)), 0.0
    for query, key in ((image, text), (text, image)):
        scores = scale * query @ (key.detach() if constant_keys else key).T
        if ids is not None:
            scores = scores.masked_fill((ids[:, None] == ids) & (labels[:, None] != labels), -torch.inf)
        total = total + F.cross_entropy(scores, labels) / 2
    return total


def values(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@needs_open_clip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_equals_open_clip(dtype, combination, biased):
    image, text, log_scale = make(9, 16, dtype=dtype)
    bias = torch.tensor(-3.0, dtype=dtype, requires_grad=True)
    extra, leaves = ({"logit_bias": bias}, [bias]) if biased else ({}, [])
    results = [values(cls(*combination, cache_labels=True)(image, text, log_scale.exp(), output_dict=True, **extra)[
        "contrastive_loss"], image, text, log_scale, *leaves) for cls in (ClipLoss, original())]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    if biased:
        assert results[0][-1] == 0


@pytest.mark.parametrize("ids", [None, [3, 1, 3, 3, 1, 0]])
def test_equals_the_formula(ids):
    image, text, log_scale = make()
    ids = None if ids is None else torch.tensor(ids)
    loss = ClipLoss()(image, text, log_scale.exp(), ids=ids)
    leaves = (image, text, log_scale)
    torch.testing.assert_close(values(loss, *leaves), values(dense(image, text, log_scale.exp(), ids), *leaves))


def test_half_precision_is_computed_in_float32():
    image, text, log_scale = (x.detach().requires_grad_() for x in make(dtype=torch.float32))
    half = [x.detach().bfloat16() for x in (image, text)]
    loss = ClipLoss()(*half, log_scale.exp())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dense(*(x.float() for x in half), log_scale.exp()))
    # one tower in half only, as under autocast
    torch.testing.assert_close(ClipLoss()(half[0], text, log_scale.exp()),
                               dense(half[0].float(), text, log_scale.exp()))


def test_refusals():
    image, text, log_scale = make()
    for options, message in (({"use_horovod": True}, "use_horovod: got True"),
                             ({"rank": 2, "world_size": 2}, "rank: got 2 with world_size 2")):
        with pytest.raises(ValueError, match=message):
            ClipLoss(**options)
    with pytest.raises(ValueError, match="one text for each image"):
        ClipLoss()(image, text[:5], log_scale.exp())
    with pytest.raises(ValueError, match=r"logit_bias: got shape \(6,\)"):
        ClipLoss()(image, text, log_scale.exp(), torch.zeros(6))
    with pytest.raises(ValueError, match=r"_ids: got shape \(5,\)"):
        ClipLoss()(image, text, log_scale.exp(), ids=torch.arange(5))
    with pytest.raises(RuntimeError, match="no default process group"):
        ClipLoss(world_size=2)(image, text, log_scale.exp())


# ---- two processes ----

def model():
    """Two towers and a scale, the same everywhere."""
    torch.manual_seed(0)
    towers = torch.nn.ModuleDict({"image": torch.nn.Linear(4, 3), "text": torch.nn.Linear(4, 3)}).double()
    towers.log_scale = torch.nn.Parameter(torch.tensor(1.2, dtype=torch.float64))
    return towers


def pairs(sizes):
    g = torch.Generator().manual_seed(1)
    return [(*torch.randn(2, n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g))
            for n in sizes]


def features(towers, images, texts):
    return [F.normalize(towers[name](x)) for name, x in (("image", images), ("text", texts))]


def one_step(loss_fn, part, with_ids=False):
    """[loss, gradients of both features, of the scale and of the parameters] of this process, and the latter averaged
    over the processes as DistributedDataParallel does."""
    towers = model()
    image, text = features(towers, *part[:2])
    image.retain_grad()
    text.retain_grad()
    loss = loss_fn(image, text, towers.log_scale.exp(), **({"ids": part[2]} if with_ids else {}))
    loss.backward()
    own = [loss.detach(), image.grad, text.grad, towers.log_scale.grad.clone()]
    average = [loss.detach().clone(), *(p.grad for p in towers.parameters())]
    for x in average:
        dist.all_reduce(x)
        x /= 2
    return own, average


def worker(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    out, theirs = {}, original()
    for combination in COMBINATIONS:
        place = {"rank": rank, "world_size": 2}
        for sizes, with_ids in itertools.product(SIZES, (False, True)):
            out[combination, sizes, with_ids] = one_step(ClipLoss(*combination, **place), pairs(sizes)[rank], with_ids)
        if theirs is not None:
            out[combination] = one_step(theirs(*combination, **place), pairs(SIZES[0])[rank])
    try:
        ClipLoss(rank=1 - rank, world_size=2)(*make()[:2], 2.0)
    except RuntimeError as error:
        out["refused"] = str(error)
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@needs_open_clip
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_two_processes_equal_open_clip(two_processes, combination):
    for rank in (0, 1):
        ours, theirs = two_processes[rank][combination, SIZES[0], False], two_processes[rank][combination]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_two_processes_against_one(two_processes, combination, sizes, with_ids):
    local_loss, gather_with_grad = combination
    towers = model()
    images, texts, ids = (torch.cat(x) for x in zip(*pairs(sizes), strict=True))
    loss = dense(*features(towers, images, texts), towers.log_scale.exp(), ids if with_ids else None,
                 constant_keys=local_loss and not gather_with_grad)
    loss.backward()
    share = 1.0 if local_loss or gather_with_grad else 0.5
    expected = [loss.detach(), *(p.grad * (1.0 if p is towers.log_scale else share) for p in towers.parameters())]
    for rank in (0, 1):
        own, average = two_processes[rank][combination, sizes, with_ids]
        torch.testing.assert_close(average, expected)
        if not local_loss:
            torch.testing.assert_close([own[0], own[3]], expected[:2])  # the same on every process


def test_wrong_place_is_refused(two_processes):
    for rank in (0, 1):
        assert f"rank {1 - rank} of 2 was given, but this is rank {rank} of 2" in two_processes[rank]["refused"]
