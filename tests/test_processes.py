"""Two processes with half of the batch each give the gradients of one process with the whole, for the whole loss."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
COMMON = """
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from karma_fast.config import DataConfig, KarmaConfig
from karma_fast.data import load_dataset, training_windows
from karma_fast.data.batches import log_sampling_probability
from karma_fast.model import backbone, karma, reading
from karma_fast.processes import average_gradients
from karma_fast.step import backward

# float32, so that what is left of a difference is a fault and not rounding
backbone.compute_dtype = reading.compute_dtype = lambda device: torch.float32
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
"""
GRADIENTS = COMMON + """
starts, ends = training_windows(sequences, data.split, config.max_history, config.positions)
windows = list(zip(starts.tolist(), ends.tolist()))[:8]
log_q, share = log_sampling_probability(sequences, data.split, 40), 8 // processes
batch = model.collator(sequences, log_q, chunk_size=3 if processes > 1 else None)(windows[rank * share:][:share])
trained = {n: p for n, p in model.train().named_parameters() if p.requires_grad}
if processes == 1:
    model(batch).loss.backward()
else:
    backward(model, batch)
average_gradients(list(trained.values()), bucket=5000)
if rank == 0:
    torch.save({n: p.grad for n, p in trained.items()}, folder / f"out-{processes}.pt")
"""
TRAINING = COMMON + """
from karma_fast.trainer import KarmaTrainer, KarmaTrainingArguments

args = KarmaTrainingArguments(output_dir=folder / f"run-{processes}", max_steps=4, warmup_steps=0,
                              per_device_train_batch_size=6 // processes,
                              chunk_size=2 if processes > 1 else None, save_strategy="no", disable_tqdm=True,
                              gradient_accumulation_steps=2, learning_rate=1e-2, adam_epsilon=1e-3, use_cpu=True)
trainer = KarmaTrainer(model, args, data)
trainer.train()
if rank == 0:
    torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, folder / f"out-{processes}.pt")
"""


def run_with(processes: int, worker: str, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "worker.py").write_text(worker)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([sys.executable, *launch, "worker.py", str(folder), str(processes)], cwd=folder,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / f"out-{processes}.pt", weights_only=True)


def prepare(tiny_config, tiny_dataset, folder: Path, **model) -> None:
    (folder / "data.txt").write_text(repr(tiny_dataset.to_dict()))
    (folder / "model.txt").write_text(repr(tiny_config.model.to_dict() | {"decode_weight": 0.5} | model))


@pytest.mark.parametrize("positions", ["last", "all"])
def test_gradients_do_not_depend_on_processes_and_chunks(tiny_config, tiny_dataset, tmp_path, positions):
    prepare(tiny_config, tiny_dataset, tmp_path, positions=positions, decode_share=0.7)
    one, two = (run_with(processes, GRADIENTS, tmp_path) for processes in (1, 2))
    assert set(one) == set(two)
    for name, grad in one.items():
        assert (two[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-9, name
    assert one["decode_projection.down.weight"].abs().sum() > 0 and one["image_head.0.weight"].abs().sum() > 0


def test_training_does_not_depend_on_processes_and_chunks(tiny_config, tiny_dataset, tmp_path):
    prepare(tiny_config, tiny_dataset, tmp_path)
    one, two = (run_with(processes, TRAINING, tmp_path) for processes in (1, 2))
    for name, weight in one.items():
        assert (two[name] - weight).norm() <= 1e-3 * weight.norm() + 1e-9, name
