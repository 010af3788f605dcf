"""KarmaTrainer: log, evaluation, checkpoints, exact resume, Ctrl-C, wrong settings."""

import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from karma_fast.checkpoints import COMPLETE, checkpoints, keep_log, last_checkpoint, mark_partial
from karma_fast.config import KarmaConfig
from karma_fast.data.batches import log_sampling_probability
from karma_fast.evaluation.evaluate import evaluate_model, protocol
from karma_fast.model.karma import KarmaModel
from karma_fast.step import OutOfMemory
from karma_fast.trainer import KarmaTrainer, shares, windows_of_a_step
from karma_fast.training_arguments import KarmaTrainingArguments

ROOT = Path(__file__).parent.parent


def trainer_of(run, data, folder, cache, callbacks=None, model_changes=None, **changes) -> KarmaTrainer:
    values = run.training | {"output_dir": str(folder)} | changes
    config = dataclasses.replace(run.model, **(model_changes or {}))
    model = KarmaModel.build(config, data.items, data.sequences, data.split, cache=cache, device="cpu")
    return KarmaTrainer(model, KarmaTrainingArguments(use_cpu=True, **values), data, callbacks)


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def curve(folder) -> list[tuple]:
    names = ("step", "loss", "act", "gen", "rec", "grad_norm", "scale", "learning_rate", "share_u/act", "eval_HR@10")
    return [tuple(line.get(n) for n in names) for line in read_log(folder) if "loss" in line or "eval_HR@10" in line]


def test_log_evaluation_and_best_checkpoint(tiny_config, tiny_data, tmp_path):
    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, eval_strategy="steps", eval_steps=2,
                         max_steps=4, load_best_model_at_end=True, share_steps=2)
    trainer.train()
    lines = read_log(tmp_path / "run")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    for line in training:
        assert {"act", "gen", "rec", "scale", "tokens_per_second", "peak_memory_bytes", "grad_norm"} <= set(line)
        total = line["act"] + 0.1 * (line["gen"] + line["rec"])
        assert line["loss"] == pytest.approx(total, abs=2e-3)
        assert line["share_u/act"] + line["share_u/rec"] == pytest.approx(1)
        assert line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 1e7
    shared = [line["step"] for line in training if "share_llm/gen" in line]
    assert shared == [1, 2, 4]
    evaluations = {line["step"]: line["eval_HR@10"] for line in lines if "eval_HR@10" in line}
    assert set(evaluations) == {2, 4}
    best = max(evaluations, key=evaluations.get)
    assert trainer.state.best_metric == evaluations[best]
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert evaluate_model(trainer.model, tiny_data, tiny_data.split.valid)["HR@10"] == evaluations[best]


def test_training_lowers_the_loss_and_beats_the_start(tiny_config, tiny_data, tmp_path):
    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, max_steps=40, save_strategy="no",
                         per_device_train_batch_size=16, projection_learning_rate=3e-2, learning_rate=1e-3,
                         model_changes={"history_shortcut": False})
    torch.nn.init.orthogonal_(trainer.model.interest_projection.weight)  # what is built already ranks well
    before = evaluate_model(trainer.model, tiny_data, tiny_data.split.test, ks=(10,))
    trainer.train()
    after = evaluate_model(trainer.model, tiny_data, tiny_data.split.test, ks=(10,))
    losses = [line["loss"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    assert after["MRR"] > before["MRR"]


def test_resume_after_kill_9_is_exact(tiny_config, tiny_data, tmp_path):
    options = {"max_steps": 6, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    whole = trainer_of(tiny_config, tiny_data, tmp_path / "whole", tmp_path, **options,
                       model_changes={"lora_dropout": 0.1})
    whole.train()
    script = tmp_path / "killed.py"
    script.write_text(f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from transformers import TrainerCallback
from karma_fast.config import DataConfig, KarmaConfig
from karma_fast.data import load_dataset
from karma_fast.model.karma import KarmaModel
from karma_fast import KarmaTrainer, KarmaTrainingArguments

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            (Path(args.output_dir) / "checkpoint-6").mkdir()  # as if killed while writing it
            os.kill(os.getpid(), signal.SIGKILL)

data = load_dataset(DataConfig(**{tiny_config.data.to_dict()!r}))
config = KarmaConfig(**{dataclasses.replace(tiny_config.model, lora_dropout=0.1).to_dict()!r})
model = KarmaModel.build(config, data.items, data.sequences, data.split, cache=Path({str(tmp_path)!r}), device="cpu")
values = {tiny_config.training | {"output_dir": str(tmp_path / "killed")} | options!r}
KarmaTrainer(model, KarmaTrainingArguments(use_cpu=True, **values), data, [Kill()]).train()
""")
    done = subprocess.run([sys.executable, script], env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
                          capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    resumed = trainer_of(tiny_config, tiny_data, tmp_path / "killed", tmp_path, **options,
                         model_changes={"lora_dropout": 0.1})
    resumed.train(resume_from_checkpoint=True)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    theirs = dict(whole.model.named_parameters())
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, theirs[name]), name


def test_a_tied_language_model_is_saved_and_resumed_whole(tiny_config, tiny_data, tiny_backbone, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tied = AutoConfig.from_pretrained(tiny_backbone, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(tied).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(tmp_path / "tied")
    options = {"max_steps": 4, "save_steps": 2,
               "model_changes": {"tuning": "full", "backbone": str(tmp_path / "tied")}}
    whole = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, **options)
    lm = whole.model.backbone
    start = lm.get_input_embeddings().weight.detach().clone()
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    whole.train()
    assert not torch.equal(lm.get_input_embeddings().weight, start)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    resumed.model.save_pretrained(tmp_path / "model")
    read = KarmaModel.from_pretrained(tmp_path / "model", device="cpu")
    for name, value in whole.model.state_dict().items():  # the tied weight under both of its names
        assert torch.equal(resumed.model.state_dict()[name], value), name
        assert torch.equal(read.state_dict()[name], value), name


def test_a_folder_with_checkpoints_is_kept_unless_told_otherwise(tiny_config, tiny_data, tmp_path):
    def trainer():
        return trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, max_steps=3)

    trainer().train()
    log, held = (tmp_path / "run" / "log.jsonl").read_text(), checkpoints(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run: holds checkpoints .*resume_from_checkpoint=True.*overwrite=True"):
        trainer().train()
    assert (tmp_path / "run" / "log.jsonl").read_text() == log and checkpoints(tmp_path / "run") == held
    others = tmp_path / "run" / "checkpoint-1"
    others.mkdir()
    (others / "weights.bin").touch()
    mark_partial(tmp_path / "run" / "checkpoint-9")
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3  # it was finished
    assert checkpoints(tmp_path / "run") == [others, *held] and (others / "weights.bin").exists()
    mark_partial(tmp_path / "run" / "checkpoint-9")
    with pytest.raises(ValueError, match="checkpoint-9: was not written to its end"):
        trainer().train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-9")
    trainer().train(overwrite=True)
    assert checkpoints(tmp_path / "run") == held
    assert [line["step"] for line in read_log(tmp_path / "run") if "loss" in line] == [1, 2, 3]


def test_going_on_takes_the_rates_and_intervals_of_now(tiny_config, tiny_data, tmp_path):
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            taken[state.global_step + 1] = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]

    taken, now = {}, {"learning_rate": 3e-5, "projection_learning_rate": 1e-4, "weight_decay": 0.3, "save_steps": 3,
                      "logging_steps": 2, "eval_steps": 3}
    options = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 3e-4,
               "projection_learning_rate": 2e-4, "weight_decay": 0.1, "save_total_limit": 5}
    trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, [Steps()], **options).train()
    before = taken.copy()
    old = {line["step"]: line for line in read_log(tmp_path / "run") if "loss" in line}
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, [Steps()], **options | now)
    adapters = {id(p) for p in resumed.model.backbone.parameters()}
    resumed.train(resume_from_checkpoint=True)
    for step in (3, 4):
        for group, (rate, decay), (was, decayed) in zip(resumed.optimizer.param_groups, taken[step], before[step],
                                                        strict=True):
            assert rate == pytest.approx(was * (0.1 if id(group["params"][0]) in adapters else 0.5))
            assert decay == (0.3 if decayed else 0.0)
    lines = {line["step"]: line for line in read_log(tmp_path / "run") if "loss" in line}
    assert list(lines) == [1, 2, 4]
    changed = taken[4][0][0] / before[4][0][0]
    assert lines[4]["learning_rate"] == pytest.approx(old[4]["learning_rate"] * changed)
    assert [line["step"] for line in read_log(tmp_path / "run") if "eval_HR@10" in line] == [2, 3, 4]
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_a_kill_while_older_checkpoints_are_removed(tiny_config, tiny_data, tmp_path, monkeypatch):
    options = {"max_steps": 6, "save_steps": 2, "save_total_limit": 1}
    whole = trainer_of(tiny_config, tiny_data, tmp_path / "whole", tmp_path, **options)
    whole.train()
    assert [p.name for p in checkpoints(tmp_path / "whole")] == ["checkpoint-6"]

    def killed(folder, **options):
        assert Path(folder).name == "checkpoint-2"
        (Path(folder) / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, **options).train()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"
    assert not (tmp_path / "run" / "checkpoint-2" / COMPLETE).exists()
    resumed = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    theirs = dict(whole.model.named_parameters())
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, theirs[name]), name


def test_the_best_and_the_newest_checkpoint_stay(tiny_config, tiny_data, tmp_path, monkeypatch):
    values = iter([0.1, 0.9, 0.3, 0.2])
    monkeypatch.setattr("karma_fast.trainer.evaluate_model",
                        lambda *args: {"HR@10": next(values), "NDCG@10": 0.0, "MRR": 0.0})
    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, max_steps=4, save_steps=1, eval_steps=1,
                         eval_strategy="steps", save_total_limit=2)
    trainer.train()
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]


def test_a_limit_of_one_keeps_where_a_run_stopped_beside_its_best(tiny_config, tiny_data, tmp_path, monkeypatch):
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    values = iter([0.9, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr("karma_fast.trainer.evaluate_model",
                        lambda *args: {"HR@10": next(values), "NDCG@10": 0.0, "MRR": 0.0})
    options = {"max_steps": 4, "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "save_total_limit": 1}
    interrupt = Interrupt()
    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, [interrupt], **options)
    trainer.train()
    assert trainer.interrupted and trainer.args.save_total_limit == 1
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-3"]
    trainer.remove_callback(interrupt)
    trainer.train(resume_from_checkpoint=True)  # by the same trainer
    assert not trainer.interrupted and trainer.state.global_step == 4
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-4"]
    again = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, **options | {"save_strategy": "no"})
    again.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-1")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1"]  # what came after it is of no run now


def test_ctrl_c_saves_and_stops(tiny_config, tiny_data, tmp_path):
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, [Interrupt()], max_steps=50,
                         save_steps=40)
    before = signal.getsignal(signal.SIGINT)
    trainer.train()
    assert trainer.interrupted and trainer.state.global_step == 2
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    assert signal.getsignal(signal.SIGINT) is before


def test_out_of_memory_between_steps_goes_on_as_if_nothing_had_happened(tiny_config, tiny_data, tmp_path, monkeypatch):
    options = {"max_steps": 4, "save_steps": 50, "eval_strategy": "steps", "eval_steps": 2,
               "model_changes": {"lora_dropout": 0.3}}
    whole = trainer_of(tiny_config, tiny_data, tmp_path / "whole", tmp_path, **options)
    whole.train()
    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, **options)

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("karma_fast.trainer.evaluate_model", fails)
    with pytest.raises(OutOfMemory) as caught:
        trainer.train()
    assert caught.value.part == "evaluation" and last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    monkeypatch.undo()
    resumed = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    theirs = dict(whole.model.named_parameters())
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, theirs[name]), name


def test_speed_leaves_evaluations_out(tiny_config, tiny_data, tmp_path, monkeypatch):
    def slow(*args, **kwargs):
        time.sleep(1.0)
        return {"HR@10": 0.5, "NDCG@10": 0.5, "MRR": 0.5}

    monkeypatch.setattr("karma_fast.trainer.evaluate_model", slow)
    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, max_steps=3, logging_steps=3,
                         eval_strategy="steps", eval_steps=2)
    tokens, seconds, step = [], [], trainer.training_step

    def timed(model, batch, n=None):
        start = time.perf_counter()
        loss = step(model, batch, n)
        seconds.append(time.perf_counter() - start)
        tokens.append(batch.num_tokens)
        return loss

    monkeypatch.setattr(trainer, "training_step", timed)
    start = time.perf_counter()
    trainer.train()
    total = time.perf_counter() - start - 1.0
    said = next(line["tokens_per_second"] for line in read_log(tmp_path / "run") if line["step"] == 3)
    assert sum(tokens) / total <= said <= sum(tokens) / sum(seconds)


def test_several_visible_gpus_are_not_one_batch(tiny_config, tiny_data, tmp_path, monkeypatch):
    args = KarmaTrainingArguments(use_cpu=True, **tiny_config.training | {"output_dir": str(tmp_path / "run")})
    monkeypatch.setattr(args, "_n_gpu", 2)
    model = KarmaModel.build(tiny_config.model, tiny_data.items, tiny_data.sequences, tiny_data.split, cache=tmp_path,
                             device="cpu")
    with pytest.warns(UserWarning, match="torchrun --nproc-per-node 2"):
        trainer = KarmaTrainer(model, args, tiny_data)
    assert trainer.args.train_batch_size == 4


@pytest.mark.parametrize(("settings", "processes", "wanted"), [
    ({"batch_size": 40}, 1, 10), ({"batch_size": 40}, 3, 4), ({"per_device_train_batch_size": 8}, 2, 5),
    ({"batch_size": 6}, 2, 3), ({}, 1, 32), ({"per_device_train_batch_size": 4}, 2, 4)])
def test_processes_have_no_windows_in_common(settings, processes, wanted):
    settings = {"batch_size": None, "per_device_train_batch_size": 32} | settings
    args = SimpleNamespace(world_size=processes, **settings)
    assert windows_of_a_step(args, "last", np.arange(10), np.arange(10) + 5) == wanted


@pytest.mark.parametrize("part", ["contrastive_loss", "clamp_"])
def test_out_of_memory_leaves_a_run_that_goes_on(tiny_config, tiny_data, tmp_path, monkeypatch, part):
    options = {"max_steps": 5, "save_steps": 50, "chunk_size": 2, "model_changes": {"lora_dropout": 0.2}}
    whole = trainer_of(tiny_config, tiny_data, tmp_path / "whole", tmp_path, **options)
    whole.train()
    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, **options)
    owner = trainer.model if part == "contrastive_loss" else trainer.model.loss.contrastive
    works, calls = getattr(owner, part), []

    def fails(*args, **kwargs):
        calls.append(part)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return works(*args, **kwargs)

    monkeypatch.setattr(owner, part, fails)
    with pytest.raises(OutOfMemory, match=r"2\.00 GiB") as caught:
        trainer.train()
    if part == "clamp_":  # the weights of step 4 may be half changed
        assert caught.value.part == "optimiser" and last_checkpoint(tmp_path / "run") is None
        return
    assert caught.value.part == "contrastive" and last_checkpoint(tmp_path / "run").name == "checkpoint-3"
    resumed = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    theirs = dict(whole.model.named_parameters())
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, theirs[name]), name
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_batch_size_counts_pairs_and_chunk_size_changes_nothing(tiny_config, tiny_data, tmp_path):
    curves = []
    for chunk_size in (None, 3):
        trainer = trainer_of(tiny_config, tiny_data, tmp_path / f"{chunk_size}", tmp_path, batch_size=48,
                             chunk_size=chunk_size)
        windows = trainer.train_dataset
        pairs = float((windows.ends - windows.starts - 1).mean())
        assert trainer.args.train_batch_size == round(48 / pairs) > 3
        trainer.train()
        curves.append([[line[n] for n in ("act", "gen", "rec", "share_u/act")]
                       for line in read_log(tmp_path / f"{chunk_size}") if "loss" in line])
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-2)
    for name in ("batch_size", "chunk_size"):
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            KarmaTrainingArguments(use_cpu=True, **{name: 0})


@pytest.mark.parametrize("name, value, said", [
    ("fp16", True, "got true; the model computes in bfloat16"),
    ("gradient_checkpointing", True, "got true; .*model.gradient_checkpointing in YAML"),
    ("torch_compile", True, "got true; a step is not compiled"),
    ("torch_compile_backend", "inductor", "got inductor; a step is not compiled"),
    ("torch_compile_mode", "default", "got default; a step is not compiled"),
    ("label_smoothing_factor", 0.1, "got 0.1; none of the losses"),
    ("torch_empty_cache_steps", 5, "got 5; .*lower chunk_size"),
    ("auto_find_batch_size", True, "got true; .*lower chunk_size")])
def test_settings_without_effect_are_refused(name, value, said):
    before = dict(os.environ)
    with pytest.raises(ValueError, match=f"^{name}: {said}"):
        KarmaTrainingArguments(use_cpu=True, **{name: value})
    assert os.environ == before


def test_a_checkpoint_of_another_model_is_refused(tiny_config, tiny_data, tmp_path):
    trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, max_steps=2).train()
    other = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, max_steps=4,
                       model_changes={"decode_weight": 0.0})
    with pytest.raises(ValueError, match="does not fit this model"):
        other.train(resume_from_checkpoint=True)


def test_nan_names_its_term(tiny_config, tiny_data, tmp_path):
    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path)
    with torch.no_grad():
        trainer.model.decode_projection.down.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="L_rec is nan"):
        trainer.train()


@pytest.mark.parametrize("what, said", [
    ("weight", "L_rec is nan within the last 2 batches up to step 2; lower"),
    ("gradient", "step 2 left weights that are not finite; lower")])
def test_nan_is_not_saved(tiny_config, tiny_data, tmp_path, what, said):
    """Neither where no line is logged at the step, nor where no loss has been made of the weights yet."""
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if what == "weight" and state.global_step == 1:
                weight.data.fill_(math.nan)

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if what == "gradient" and state.global_step == 1:
                weight.grad.fill_(math.nan)

    spoil = Spoil()
    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, [spoil], save_steps=1, logging_steps=50)
    weight = trainer.model.decode_projection.down.weight
    with pytest.raises(FloatingPointError, match=said):
        trainer.train()
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    trainer.remove_callback(spoil)
    trainer.train(resume_from_checkpoint=True)  # by the same trainer, which must not remember the NaN
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-3"


def test_accumulation_averages_the_same_batches(tiny_config, tiny_data, tmp_path):
    """Two batches of 4 accumulated: the parts logged are the means, the step is one."""
    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, max_steps=1,
                         gradient_accumulation_steps=2)
    trainer.train()
    line = read_log(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(line["act"] + 0.1 * (line["gen"] + line["rec"]), abs=2e-3)


def test_a_worker_makes_the_same_batches(tiny_config, tiny_data, tmp_path):
    curves = []
    for workers in (0, 1):
        folder = tmp_path / str(workers)
        trainer_of(tiny_config, tiny_data, folder, tmp_path, chunk_size=2, dataloader_num_workers=workers).train()
        curves.append(curve(folder))
    assert curves[0] == curves[1] and len(curves[0]) == 3


def test_scale_is_clamped_after_the_step(tiny_config, tiny_data, tmp_path):
    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, projection_learning_rate=0.5,
                         model_changes={"init_scale": 9.0, "max_scale": 9.1})
    trainer.train()
    assert all(line["scale"] <= 9.1 + 1e-4 for line in read_log(tmp_path / "run") if "scale" in line)


def test_arguments_and_protocol(tiny_data, tmp_path):
    args = KarmaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert 0 < args.projection_learning_rate <= args.learning_rate and args.max_grad_norm == 1.0
    line = protocol(tiny_data, tiny_data.split.test, 6)
    assert "40 items" in line and "seen items left out" in line and "last 6" in line
    assert "leave one out" in line.lower()


def test_each_parameter_has_its_rate(tiny_config, tiny_data, tmp_path):
    trainer = trainer_of(tiny_config, tiny_data, tmp_path / "run", tmp_path, learning_rate=3e-4,
                         projection_learning_rate=2e-4, weight_decay=0.1)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in trainer.create_optimizer().param_groups
             for p in group["params"]}
    named = {name: rates.pop(id(p)) for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert not rates
    of_order_one = {"shortcut.gain", "shortcut.age_logits", "loss.contrastive.log_scale"}
    for name, found in named.items():
        rate = 3e-4 if "lora_" in name else 2e-3 if name in of_order_one else 2e-4
        decay = 0.1 if trainer.model.get_parameter(name).ndim > 1 else 0.0
        assert found == (pytest.approx(rate), decay), name
    assert of_order_one < set(named) and any("lora_" in name for name in named)


def test_log_q_counts_the_training_part_only(tiny_data):
    log_q = log_sampling_probability(tiny_data.sequences, tiny_data.split, 40)
    counts = np.zeros(40)
    for user, end in enumerate(tiny_data.split.train_end):
        np.add.at(counts, tiny_data.sequences.items[tiny_data.sequences.indptr[user]:end], 1)
    np.testing.assert_allclose(np.exp(log_q), np.maximum(counts, 1) / counts.sum(), rtol=1e-5)


def test_keep_log_cuts_later_and_broken_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    keep_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    keep_log(path, 0)
    assert path.read_text() == ""
    keep_log(tmp_path / "none.jsonl", 1)


def test_shares_are_parts_of_one():
    found = shares({"a": torch.tensor(3.0), "b": torch.tensor(1.0), "none": torch.tensor(0.0)})
    assert found == {"a": 0.75, "b": 0.25, "none": 0.0}
    assert shares({"a": torch.tensor(0.0)}) == {}


def test_nothing_to_train_on_is_said(tiny_config, tiny_data, tmp_path):
    empty = dataclasses.replace(tiny_data, split=dataclasses.replace(
        tiny_data.split, train_end=tiny_data.sequences.indptr[:-1] + 1))
    model = KarmaModel.build(tiny_config.model, tiny_data.items, tiny_data.sequences, tiny_data.split, cache=tmp_path,
                             device="cpu")
    with pytest.raises(ValueError, match="nothing to train on"):
        KarmaTrainer(model, KarmaTrainingArguments(output_dir=str(tmp_path), use_cpu=True), empty)


def test_one_user_alone_teaches_nothing(tiny_config, tiny_data, tmp_path):
    sequences, split = copy.copy(tiny_data.sequences), tiny_data.split
    train_end = sequences.indptr[:-1] + 1
    train_end[7] = split.train_end[7]
    alone = dataclasses.replace(tiny_data, sequences=sequences, split=dataclasses.replace(split, train_end=train_end))
    with pytest.raises(ValueError, match="all training windows are of one user"):
        trainer_of(tiny_config, alone, tmp_path / "run", tmp_path)
    trainer_of(tiny_config, alone, tmp_path / "run", tmp_path, model_changes={"act_weight": 0.0})
    sequences.negatives_indptr = np.arange(len(sequences.items) + 1)
    sequences.negatives = np.zeros(len(sequences.items), np.int32)
    trainer_of(tiny_config, alone, tmp_path / "run", tmp_path, max_steps=1).train()
    assert read_log(tmp_path / "run")[0]["act"] > 0


def test_evaluation_without_a_target_is_refused(tiny_config, tiny_data, tmp_path):
    split = dataclasses.replace(tiny_data.split, valid=tiny_data.split.valid[:0])
    data = dataclasses.replace(tiny_data, split=split)
    with pytest.raises(ValueError, match=r"training.eval_strategy: got steps.*data.valid_time"):
        trainer_of(tiny_config, data, tmp_path / "run", tmp_path, eval_strategy="steps", eval_steps=2)
    trainer_of(tiny_config, data, tmp_path / "run", tmp_path)


def test_config_weights():
    config = KarmaConfig(decode_weight=0.5, rec_weight=2.0)
    assert config.weight("rec") == 1.0 and config.weight("act") == 1.0 and config.weight("gen") == 0.5
