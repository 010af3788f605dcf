"""Two processes with half of the batch each give the gradients of one process with the whole, for the whole loss."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
WORKER = """
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from karma_fast.config import DataConfig, KarmaConfig
from karma_fast.data import load_dataset, training_windows
from karma_fast.data.batches import log_sampling_probability
from karma_fast.model import backbone, karma

# float32, so that what is left of a difference is a fault and not rounding
backbone.compute_dtype = karma.compute_dtype = lambda device: torch.float32
folder, processes = Path(sys.argv[1]), int(sys.argv[2])
if processes > 1:
    dist.init_process_group("gloo")
rank = dist.get_rank() if processes > 1 else 0
data = load_dataset(DataConfig(**eval((folder / "data.txt").read_text())))
config = KarmaConfig(**eval((folder / "model.txt").read_text()))
sequences = data.sequences
events = len(sequences.items)
sequences.negatives_indptr = np.arange(events + 1, dtype=np.int64)
sequences.negatives = np.random.default_rng(0).integers(0, 40, events).astype(np.int32)
data.items.image_vectors = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32)
model = karma.KarmaModel.build(config, data.items, sequences, data.split, cache=folder, device="cpu")
starts, ends = training_windows(sequences, data.split, config.max_history, config.positions)
windows = list(zip(starts.tolist(), ends.tolist()))[:8]
collate = model.collator(sequences, log_sampling_probability(sequences, data.split, 40))
share = 8 // processes
output = model.train()(collate(windows[rank * share:(rank + 1) * share]))
output.loss.backward()
grads = {}
for name, p in model.named_parameters():
    if p.requires_grad:
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        if processes > 1:  # what DistributedDataParallel does
            dist.all_reduce(grad)
            grad /= processes
        grads[name] = grad
if rank == 0:
    torch.save(grads, folder / f"grads-{processes}.pt")
"""


@pytest.mark.parametrize("positions", ["last", "all"])
def test_gradients_do_not_depend_on_the_number_of_processes(tiny_config, tiny_dataset, tmp_path, positions):
    model = tiny_config.model.to_dict() | {"positions": positions, "decode_weight": 0.5, "decode_share": 0.7}
    (tmp_path / "data.txt").write_text(repr(tiny_dataset.to_dict()))
    (tmp_path / "model.txt").write_text(repr(model))
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run([sys.executable, *launch, "worker.py", str(tmp_path), str(processes)], cwd=tmp_path,
                              env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"grads-{n}.pt", weights_only=True) for n in (1, 2))
    assert set(one) == set(two)
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert one["decode_projection.down.weight"].abs().sum() > 0 and one["image_head.0.weight"].abs().sum() > 0
