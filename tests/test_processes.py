"""Two processes with half of the batch each give the gradients of one with the whole, and stop together.

The processes' group is made before or after the model: by `karma-fast train` before, by a loop in Python after, where
the training's arguments make it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
COMMON = """
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from karma_fast import KarmaTrainer, KarmaTrainingArguments
from karma_fast.config import DataConfig, KarmaConfig
from karma_fast.data import load_dataset, training_windows
from karma_fast.data.batches import log_sampling_probability
from karma_fast.model import backbone, karma, reading
from karma_fast.processes import average_gradients
from karma_fast.step import backward

# float32, so that what is left of a difference is a fault and not rounding
backbone.compute_dtype = reading.compute_dtype = lambda device: torch.float32
folder, processes = Path(sys.argv[1]), int(sys.argv[2])
data = load_dataset(DataConfig(**eval((folder / "data.txt").read_text())))
config = KarmaConfig(**eval((folder / "model.txt").read_text()))
sequences = data.sequences
events = len(sequences.items)
sequences.negatives_indptr = np.arange(events + 1, dtype=np.int64)
sequences.negatives = np.random.default_rng(0).integers(0, 40, events).astype(np.int32)
data.items.image_vectors = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32)
"""
GROUP = """
if processes > 1:
    dist.init_process_group("gloo")
rank = dist.get_rank() if processes > 1 else 0
"""
BUILD = """
model = karma.KarmaModel.build(config, data.items, sequences, data.split, cache=folder, device="cpu")
"""
GRADIENTS = COMMON + BUILD + GROUP + """
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
if processes > 1:
    dist.destroy_process_group()  # a process that ends within a collective's last moments may abort
"""
TRAINING = COMMON + BUILD + """
import itertools
from types import SimpleNamespace

import karma_fast.trainer

# a clock that ticks when it is read, so that what is said of a second is the same for any number of processes
karma_fast.trainer.time = SimpleNamespace(perf_counter=itertools.count().__next__)
karma_fast.trainer.evaluate_model = lambda *given: {"HR@10": 10 + trainer.args.process_index}
args = KarmaTrainingArguments(output_dir=folder / f"run-{processes}", max_steps=4, warmup_steps=0,
                              per_device_train_batch_size=6 // processes,
                              chunk_size=2 if processes > 1 else None, save_strategy="no", disable_tqdm=True,
                              gradient_accumulation_steps=2, learning_rate=1e-2, adam_epsilon=1e-3, use_cpu=True,
                              logging_steps=2, eval_strategy="steps", eval_steps=2)
trainer = KarmaTrainer(model, args, data)
trainer.train()
logs = trainer.state.log_history
assert [line["eval_HR@10"] for line in logs if "eval_HR@10" in line] == [10, 10]  # those of the first process
if args.process_index == 0:
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    speeds = [line["tokens_per_second"] for line in logs if "tokens_per_second" in line]
    torch.save({"weights": weights, "speeds": speeds}, folder / f"out-{processes}.pt")
trainer.leave_processes()
"""
INTERRUPTED = COMMON + GROUP + BUILD + """
import os, signal, time
from transformers import Trainer, TrainerCallback


class Signals(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if rank == 1 and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    def on_save(self, args, state, control, **kwargs):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGINT)  # its first, so it must not stop at once
            found["whole"] = (folder / "run" / "checkpoint-2" / "rng_state_1.pth").exists()


def train(self, train=Trainer.train, **options):
    found["entered"] = time.time()
    return train(self, **options)


Trainer.train = train
args = KarmaTrainingArguments(output_dir=folder / "run", max_steps=20, per_device_train_batch_size=3, save_steps=50,
                              disable_tqdm=True, use_cpu=True)
trainer, found = KarmaTrainer(model, args, data, [Signals()]), {"wrote": False}
save, save_weights = trainer._save_rng_state, model.save_weights
model.save_weights = lambda folder: found.update(wrote=True) or save_weights(folder)
if rank == 1:
    trainer._save_rng_state = lambda folder: time.sleep(1) or save(folder)
else:
    time.sleep(1)  # as if it had ranked requests
found["called"] = time.time()
trainer.train()
found |= {"step": trainer.state.global_step, "interrupted": trainer.interrupted}
every = [None, None]
dist.all_gather_object(every, found)
if rank == 0:
    torch.save(every, folder / "out-2.pt")
trainer.leave_processes()
"""
NAN = COMMON + GROUP + BUILD + """
args = KarmaTrainingArguments(output_dir=folder / "run", max_steps=4, per_device_train_batch_size=3, save_steps=2,
                              logging_steps=50, disable_tqdm=True, use_cpu=True)
trainer = KarmaTrainer(model, args, data)
step = trainer.training_step

def spoiled(*inputs):
    loss = step(*inputs)
    if rank == 1 and trainer.state.global_step == 0:
        trainer._sums["act"] += torch.nan
    return loss

trainer.training_step, said = spoiled, ""
try:
    trainer.train()
except FloatingPointError as error:
    said = str(error)
every = [None, None]
dist.all_gather_object(every, said)
if rank == 0:
    torch.save(every, folder / "out-2.pt")
trainer.leave_processes()
"""

PROGRAM = """
import contextlib
import os
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
import torch
import torch.distributed as dist
from karma_fast import KarmaTrainer, cli

folder, threads, timeouts = Path(sys.argv[1]), [], []


def names():
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it ended
            found.append((task / "comm").read_text().strip())
    return found


def leave(trainer, leave=KarmaTrainer.leave_processes):
    timeouts.append(dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds())
    threads.append(names())
    leave(trainer)
    for wait in range(50):  # a thread that was joined may be listed a moment longer
        if not any("gloo" in name for name in names()):
            break
        time.sleep(0.1)
    threads.append(names())


KarmaTrainer.leave_processes = leave
status = cli.main(["train", "tiny.yaml"])
if os.environ["RANK"] == "0":
    torch.save({"status": status, "threads": threads, "timeouts": timeouts}, folder / "out-2.pt")
"""


def run_with(processes: int, worker: str, folder: Path):
    """What the worker's first process saved."""
    (folder / "worker.py").write_text(worker)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([sys.executable, *launch, "worker.py", str(folder), str(processes)], cwd=folder,
                          env=environment, capture_output=True, text=True, timeout=300)
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
    assert one["speeds"] == two["speeds"] and len(one["speeds"]) == 2
    for name, weight in one["weights"].items():
        assert (two["weights"][name] - weight).norm() <= 1e-3 * weight.norm() + 1e-9, name


def test_a_signal_to_one_process_stops_all_after_the_same_step(tiny_config, tiny_dataset, tmp_path):
    prepare(tiny_config, tiny_dataset, tmp_path)
    first, second = run_with(2, INTERRUPTED, tmp_path)
    assert first["step"] == second["step"] == 2 and first["interrupted"] and second["interrupted"]
    held = {p.name for p in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"complete", "rng_state_0.pth", "optimizer.pt"} <= held and "partial" not in held
    assert first["wrote"] and not second["wrote"]  # else they would write into one file
    assert first["whole"]  # it was not complete before the other had written its part
    assert second["entered"] >= first["called"]  # no collective of the training waited for the late one


def test_a_nan_of_one_process_stops_all_before_a_checkpoint(tiny_config, tiny_dataset, tmp_path):
    prepare(tiny_config, tiny_dataset, tmp_path)
    first, second = run_with(2, NAN, tmp_path)
    assert first == second and "L_act is nan within the last 2 batches up to step 2" in first
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the names of native threads are read from /proc")
def test_the_program_trains_with_two_processes_and_leaves_no_thread_of_theirs(tiny_config, tmp_path):
    # a thread of gloo that gives up a tensor while Python shuts down aborts the process
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config.to_dict()), encoding="utf-8")
    found = run_with(2, PROGRAM, tmp_path)
    before, after = ([name for name in names if "gloo" in name] for names in found["threads"])
    assert found["status"] == 0 and before and not after
    assert found["timeouts"] == [14400]  # what the documentation says, of torch's own group too
