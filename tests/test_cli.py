"""The command line: exit codes, messages and files, with a tiny language model and tiny data."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import yaml

from karma_fast import __version__
from karma_fast.cli import build_parser, explain, main, split_settings
from karma_fast.commands.common import model_folder, requests_to_rank
from karma_fast.config import ConfigError, RunConfig, convert
from karma_fast.evaluation import paths
from karma_fast.run_setup import prepare_folder, training_settings

ROOT = Path(__file__).resolve().parent.parent


def karma(*words, folder, code=0, environment=()):
    """Runs the real command in a process of its own; its (stdout, stderr)."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, "-m", "karma_fast", *map(str, words)], cwd=folder, text=True, timeout=300,
                          capture_output=True, env=os.environ | {"PYTHONPATH": path} | dict(environment))
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tiny_backbone, tiny_dataset):
    """A folder with shop.yaml, and runs/tiny trained from it by the command."""
    folder = tmp_path_factory.mktemp("shop")
    config = {"data": {k: getattr(tiny_dataset, k) for k in ("interactions", "items", "name")},
              "model": {"backbone": str(tiny_backbone), "quantization": "none", "lora_rank": 4, "embedding_dim": 16,
                        "max_history": 6, "max_text_tokens": 12, "id_dim": 8, "num_soft_tokens": 2},
              "training": {"max_steps": 50, "per_device_train_batch_size": 4, "logging_steps": 1, "warmup_steps": 1,
                           "use_cpu": True}}
    (folder / "shop.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    out, _ = karma("train", "shop.yaml", "--max_steps", "3", "--save-steps=2", folder=folder,
                   environment={"XDG_CACHE_HOME": str(folder / "cache")})
    (folder / "out.txt").write_text(out, encoding="utf-8")
    return folder


@pytest.fixture
def here(shop, monkeypatch):
    monkeypatch.chdir(shop)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shop / "cache"))
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back what the command sets
    return shop


# ---- without any model ---------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy():
    code = ("import sys, karma_fast.cli as c; c.build_parser(); "
            "print([m for m in ('torch', 'transformers', 'numpy', 'polars', 'yaml') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "[]"


def test_auto_chunks_are_what_fits_the_gpu(tiny_config, tiny_data, tmp_path):
    from karma_fast.run_setup import fit_to_gpu, training_arguments
    from karma_fast.trainer import KarmaTrainer

    tiny_config.training |= {"chunk_size": "auto", "batch_size": 100, "use_cpu": True}
    args, said = training_arguments(tiny_config, tmp_path), []
    with pytest.raises(ValueError, match="propose"):
        KarmaTrainer(SimpleNamespace(config=tiny_config.model), args, tiny_data)
    config = fit_to_gpu(args, tiny_config.model, tiny_data, said.append, budget=10**12)
    assert args.chunk_size > 10 and not config.gradient_checkpointing and not said
    args.chunk_size = "auto"
    config = fit_to_gpu(args, tiny_config.model, tiny_data, said.append, budget=10**6)
    assert args.chunk_size == 1 and config.gradient_checkpointing
    assert "hardly fit" in said[0] and "quantization 4bit" in said[0]
    args.chunk_size = "auto"
    assert fit_to_gpu(args, tiny_config.model, tiny_data, said.append) == tiny_config.model and args.chunk_size is None


def test_auto_chunks_where_nothing_is_predicted(tiny_config, tiny_data, tmp_path, monkeypatch):
    from karma_fast.planning import Unpredicted, plan_memory
    from karma_fast.run_setup import UNPLANNED_CHUNK, fit_to_gpu, predicted_memory, training_arguments

    def unknown(*args, **options):
        raise NotImplementedError  # without a message, from within the simulation

    tiny_config.training |= {"chunk_size": "auto", "use_cpu": True}
    args, said = training_arguments(tiny_config, tmp_path), []
    monkeypatch.setattr("karma_fast.planning.plan.simulated_model", unknown)
    assert fit_to_gpu(args, tiny_config.model, tiny_data, said.append, budget=10**12) == tiny_config.model
    assert args.chunk_size == UNPLANNED_CHUNK and len(said) == 1
    assert "NotImplementedError" in said[0] and "training.chunk_size" in said[0]
    model = SimpleNamespace(config=tiny_config.model, tokenizer=None)
    found = predicted_memory(SimpleNamespace(args=args, model=model), tiny_data)
    assert "could not be predicted (NotImplementedError" in found
    with pytest.raises(Unpredicted, match="NotImplementedError"):
        plan_memory(tiny_config.model)
    monkeypatch.undo()
    args.chunk_size = "auto"
    with pytest.raises(ConfigError, match="backbone"):  # what training could not read either
        fit_to_gpu(args, dataclasses.replace(tiny_config.model, backbone=str(tmp_path)), tiny_data, said.append, 10**9)


def test_auto_chunks_and_the_prediction_know_the_card(tiny_config, tiny_data, tmp_path, monkeypatch):
    import torch

    from karma_fast import KarmaTrainingArguments
    from karma_fast.planning import capability_of, propose
    from karma_fast.planning.plan import CUDA_CONTEXT
    from karma_fast.run_setup import fit_to_gpu, predicted_memory, training_arguments

    tiny_config.training |= {"chunk_size": "auto", "per_device_train_batch_size": 8, "use_cpu": True}
    args, chunks, predicted = training_arguments(tiny_config, tmp_path), {}, []
    need = propose(tiny_config.model, 10**12, 8, data=tiny_data, optimiser=args.optim.value).peak
    monkeypatch.setattr(KarmaTrainingArguments, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (need - CUDA_CONTEXT, 10**12))
    for card in ((8, 0), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, card=card: card)
        assert capability_of(args.device) == card
        args.chunk_size = "auto"
        fit_to_gpu(args, tiny_config.model, tiny_data, print)
        chunks[card] = args.chunk_size
    assert chunks[8, 0] == 8 > chunks[7, 5]

    def plan_memory(*_, **known):
        predicted.append(known["capability"])
        return SimpleNamespace(peak=10**9)

    monkeypatch.setattr("karma_fast.planning.plan_memory", plan_memory)
    model = SimpleNamespace(config=tiny_config.model, tokenizer=None)
    assert "1.0 GB of the GPU" in predicted_memory(SimpleNamespace(args=args, model=model), tiny_data)
    assert predicted == [(7, 5)]


@pytest.mark.parametrize("recipe", ["karma", "ra_rec"])
def test_the_banner_names_the_negatives_that_are_read(recipe, tiny_config, tiny_data, tmp_path, monkeypatch):
    from karma_fast import recipes
    from karma_fast.data.windows import training_windows
    from karma_fast.run_setup import banner, training_arguments
    from karma_fast.trainer import Windows

    tiny_config.training |= {"use_cpu": True}
    args, config = training_arguments(tiny_config, tmp_path), recipes.recipe(recipe).Config()
    own = recipes.recipe(recipe).model_class()
    windows = Windows(*training_windows(tiny_data.sequences, tiny_data.split, 6, config.positions))
    monkeypatch.setattr("karma_fast.run_setup.causal_lm", lambda model: SimpleNamespace(num_parameters=lambda: 0))
    monkeypatch.setattr("karma_fast.run_setup.predicted_memory", lambda *_: "")
    model = SimpleNamespace(config=config, parameters=list, backbone=SimpleNamespace(parameters=list))
    model.further_negatives = lambda sequences: own.further_negatives(model, sequences)
    trainer = SimpleNamespace(args=args, model=model, train_dataset=windows)
    for negatives in (None, np.zeros(1, np.int32)):
        data = dataclasses.replace(tiny_data, sequences=dataclasses.replace(tiny_data.sequences, negatives=negatives))
        named = "shown but unchosen" in banner(trainer, data, tmp_path)
        assert named == (recipe == "karma" and negatives is not None)
    if recipe == "ra_rec":
        config.num_negatives = 64
        assert "negatives, and 64 drawn items a process" in banner(trainer, data, tmp_path)


def test_processes_wait_for_the_first_ranking(tiny_config, tmp_path):
    from karma_fast.run_setup import training_arguments

    assert training_arguments(tiny_config, tmp_path).ddp_timeout == 4 * 3600
    tiny_config.training["ddp_timeout"] = 60
    assert training_arguments(tiny_config, tmp_path).ddp_timeout == 60


def test_plan_says_what_fits(tmp_path):
    config = tmp_path / "shop.yaml"
    config.write_text("model: {backbone: smollm2-135m-instruct, positions: last}\ntraining: {chunk_size: 4}\n")
    out, _ = karma("plan", "shop.yaml", "--gpu-memory", "4GB", "--batch-size", "64", "--max_history", "10",
                   folder=tmp_path)
    assert "it fits" in out and "batch_size                   64" in out and "chunk_size                   4" in out
    assert "up to 63 negatives" in out and "every window has 10 items" in out
    out, _ = karma("plan", "shop.yaml", "--gpu-memory", "4GB", "--batch-size", "8", "--training.chunk_size", "auto",
                   folder=tmp_path)
    assert "it fits" in out and "chunk_size                   8" in out  # auto is what plan looks for anyway
    found = json.loads(karma("plan", "--model", "qwen2.5-7b", "--gpu-memory", "1GB", "--chunk-size", "1", "--json",
                             folder=tmp_path, code=1)[0])
    assert not found["fits"] and found["parts"]["frozen weights"] > 3e9
    _, error = karma("plan", "shop.yaml", "--gpu-memory", "4GB", "--model.quantization", "8bit", folder=tmp_path,
                     code=2)
    assert "could not be predicted" in error and "training.chunk_size" in error and "Traceback" not in error


def test_help_names_commands_settings_and_exit_codes(tmp_path):
    from transformers import TrainingArguments

    from karma_fast import KarmaTrainingArguments

    out, _ = karma("--help", folder=tmp_path)
    commands = build_parser()[1]
    assert set(commands) == {"demo", "train", "evaluate", "recommend", "embed", "check-data", "plan", "doctor",
                             "baselines", "diagnose", "select"}
    assert all(name in out for name in commands) and "130" in out
    text = commands["train"].format_help()
    assert "decode_weight=0.1" in text and "user_column" in text
    own = {field.name for field in dataclasses.fields(KarmaTrainingArguments)} - \
        {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {"batch_size", "chunk_size", "projection_learning_rate"} <= own <= set(text.replace(",", "").split())
    assert karma("--version", folder=tmp_path)[0].strip() == f"karma-fast {__version__}"


def test_usage_errors(capsys):
    assert main([]) == 2
    for words in (["fly"], ["recommend", "runs/x"], ["recommend", "m", "--user", "1", "--history", "2"],
                  ["recommend", "m", "--user", "1", "--k", "0"], ["evaluate", "m", "--modle", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
    assert "--modle" in capsys.readouterr().err


def test_settings_are_told_from_options():
    train = build_parser()[1]["train"]
    words = ["train", "--max_steps", "3", "a.yaml", "--resume", "--learning-rate=-1e-4", "--bf16", "--test-users", "5"]
    rest, settings = split_settings(words, train)
    assert rest == ["train", "a.yaml", "--resume", "--test-users", "5"]
    assert settings == {"max_steps": "3", "learning_rate": "-1e-4", "bf16": "true"}


def test_options_may_be_spelled_as_settings_and_a_switch_leaves_the_file_alone():
    commands = build_parser()[1]
    rest, settings = split_settings(["train", "--eval_on_start", "a.yaml", "--test_users", "5"], commands["train"])
    assert rest == ["train", "a.yaml", "--test-users", "5"] and settings == {"eval_on_start": "true"}
    rest, settings = split_settings(["baselines", "--no_sasrec", "--test_users=5", "--user_column", "who", "b.yml"],
                                    commands["baselines"])
    assert rest == ["baselines", "--no-sasrec", "--test-users=5", "b.yml"] and settings == {"user_column": "who"}
    rest, settings = split_settings(["plan", "--chunk_size", "auto", "--max_steps", "3"], commands["plan"])
    assert settings == {"max_steps": "3"} and build_parser()[0].parse_args(rest).chunk_size == "auto"  # as the setting


def test_a_section_of_comments_alone_is_empty(tmp_path):
    path = tmp_path / "shop.yaml"
    path.write_text("data:\nmodel:\n  # backbone: x\ntraining:\n", encoding="utf-8")
    assert RunConfig.load(path) == RunConfig()
    assert RunConfig.load(path, {"max_steps": "3"}).training == {"max_steps": "3"}
    path.write_text("training: 0\n", encoding="utf-8")
    for overrides in ({}, {"max_steps": "3"}):
        with pytest.raises(ConfigError, match="config.training: got 0; a section with settings is needed"):
            RunConfig.load(path, overrides)


def test_messages_and_codes_of_errors():
    assert explain(ConfigError("model.x: no")) == (2, "model.x: no")
    assert explain(MemoryError("set it lower")) == (1, "set it lower")
    assert explain(KeyError("no item has the id 'x'")) == (1, "no item has the id 'x'")
    assert explain(KeyError("x"))[1] is None  # a fault of the program: shown as a traceback
    assert explain(TypeError("unexpected"))[1] is None
    assert explain(FileNotFoundError(2, "No such file", "a.csv"))[1].startswith("a.csv: no such file")
    assert "faiss" in explain(ModuleNotFoundError("No module named 'faiss'", name="faiss"))[1]


# ---- data and doctor -----------------------------------------------------------------------------------------------


def test_check_data(tiny_dataset, tmp_path, capsys):
    good = ["check-data", "--interactions", tiny_dataset.interactions, "--items", tiny_dataset.items]
    assert main([*good, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["counts"]["items"] == 40 and report["counts"]["users"] == 30
    bad = tmp_path / "bad.csv"
    bad.write_text("user_id,item_id,timestamp\nu1,i1,1\nu1,i999,2\nu1,i2,x\n", encoding="utf-8")
    assert main(["check-data", "--interactions", str(bad), "--items", tiny_dataset.items]) == 1
    text = capsys.readouterr().out
    assert "line 3" in text and "i999" in text and "line 4" in text
    assert main(["check-data"]) == 2
    assert main([*good, "--user_colum", "x"]) == 2
    assert "did you mean user_column" in capsys.readouterr().err


def test_check_data_says_what_training_wants_of_queries(tiny_searches, tiny_dataset, tmp_path, capsys):
    said = "recipe karma will not train on queries with model.positions all, its default; set model.positions: last"

    def told(data, **sections) -> bool:
        path = tmp_path / "a.yaml"
        path.write_text(yaml.safe_dump({"data": {"interactions": data.interactions, "items": data.items}} | sections))
        assert main(["check-data", str(path), "--json"]) == 0
        return any(said in text for text in json.loads(capsys.readouterr().out)["warnings"])

    assert told(tiny_searches) and told(tiny_searches, model={"max_history": 6})
    assert not told(tiny_dataset)
    assert not told(tiny_searches, model={"positions": "last"}) and not told(tiny_searches, recipe="ra_rec")
    files = ["check-data", "--interactions", tiny_searches.interactions, "--items", tiny_searches.items]
    assert main(files) == 0 and said in capsys.readouterr().out
    assert main([*files, "--query_column", "false"]) == 0 and said not in capsys.readouterr().out


@pytest.mark.parametrize("words", [["baselines"], ["check-data"], ["plan"], ["select"], ["train"]])
def test_a_data_file_in_place_of_the_config_is_told_where_to_go(words, tmp_path, tiny_dataset, capsys):
    where = ("data files are named as data.interactions and data.items of a YAML file or, for check-data, baselines, "
             "plan and select, with --interactions FILE --items FILE in its place")
    assert main([*words, tiny_dataset.interactions]) == 2
    error = capsys.readouterr().err
    assert f"{tiny_dataset.interactions}: a data file, but CONFIG.yaml is needed there; {where}" in error
    for name, content, said in (
            ("clicks.jsonl", b'{"user": 1, "item": 2}\n', "a data file"),
            ("clicks.parquet", b"PAR1\xff\xfe", "a data file"),
            ("clicks", b"user_id,item_id\nu1,i1\n", "needs sections data:, model: and training:, got str"),
            ("clicks.xlsx", b"PK\x03\x04\xff\xfe", "not a text in UTF-8, but CONFIG.yaml is needed there")):
        (tmp_path / name).write_bytes(content)
        assert main([*words, str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert f"{name}: {said}" in error and where in error


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["packages"]["torch"] and found["cores"] >= 1
    assert "smollm2-135m-instruct" in found["backbones"]
    assert found["ranking"] == list(paths())


def test_doctor_says_how_ranking_runs():
    from karma_fast.commands.doctor import examine, to_text

    found = examine()
    assert "ranking   in C++: avx2, portable" in to_text(found | {"ranking": ["avx2", "portable"]})
    without = to_text(found | {"ranking": [], "ranking_problem": "was not built; install a C++17 compiler"})
    assert "ranking   by torch, many times slower than the C++ extension, which was not built; install" in without


def test_doctor_says_why_triton_does_not_launch():
    from karma_fast.commands.doctor import examine, to_text

    found = examine()
    assert found["gpus"] or found["triton_problem"] is None
    without = to_text(found | {"triton_problem": "which cannot launch kernels here (...): install a C compiler"})
    assert "kernels   by plain torch, slower than Triton, which cannot launch kernels here (...): install" in without
    assert "kernels   " not in to_text(found | {"triton_problem": None})


def test_doctor_without_a_needed_package(capsys, monkeypatch):
    from karma_fast.commands import doctor

    monkeypatch.setattr(doctor, "version", lambda name: _missing(name) if name == "peft" else "1.0")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert '-m pip install "peft' in text and "cannot start" in text


def _missing(name):
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_the_program_is_named_as_this_shell_finds_it(tmp_path, monkeypatch):
    from karma_fast.commands.common import program

    script = tmp_path / "an env" / "bin" / "karma-fast"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script), "demo"])
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "karma-fast"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(program()) == [str(script)]
    monkeypatch.chdir(tmp_path)
    assert shlex.split(program()) == ["an env/bin/karma-fast"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "karma_fast" / "__main__.py")])
    assert shlex.split(program()) == [sys.executable, "-m", "karma_fast"]


# ---- training ------------------------------------------------------------------------------------------------------


def test_train_writes_the_whole_run(shop):
    run = shop / "runs" / "tiny"
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["rows"]) == ["popularity", "item_knn", "title_tfidf", "karma_start", "karma"]
    assert {"HR@1", "HR@5", "HR@10", "HR@50", "HR@200", "NDCG@10", "MRR"} <= set(metrics["rows"]["karma"])
    assert metrics["steps"] == 3 and metrics["requests"] == 30 and metrics["peak_rss_bytes"] > 1e8
    assert "40 items" in metrics["protocol"] and "train shop.yaml --max_steps 3" in metrics["command"]
    assert 0 < sum(metrics["stage_seconds"].values()) < metrics["seconds"]
    decoding = metrics["decoding"]
    assert decoding["users"] == 30 and 0 <= decoding["share_better"] <= 1 and decoding["matched_loss"] > 0
    assert decoding["mean_loss"] > 0
    examples = json.loads((run / "examples.json").read_text(encoding="utf-8"))
    assert all(len(e["top"]) == 5 and 1 <= e["target_rank"] <= 40 and isinstance(e["decoded"], str) for e in examples)
    assert not any(entry["title"] in e["history"] for e in examples for entry in e["top"])
    attention = json.loads((run / "attention.json").read_text(encoding="utf-8"))
    for name in ("before", "after"):
        weights = np.array(attention[name])
        assert weights.shape == (len(attention["labels"]),) * 2 and np.allclose(weights.sum(axis=1), 1, atol=2e-2)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3]
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["training"]["max_steps"] == 3 and Path(config["data"]["items"]).is_absolute()
    assert (run / "report.html").stat().st_size > 1000 and (run / "report.md").is_file()
    assert list(run.rglob("events.out.tfevents*"))
    out = (shop / "out.txt").read_text(encoding="utf-8")
    assert "step 3/3" in out and "negatives" in out and "KARMA at the start" in out and "came next" in out


def test_a_run_is_not_overwritten_and_can_go_on(here, capsys):
    before = (here / "runs/tiny/metrics.json").read_text(encoding="utf-8")
    assert main(["train", "shop.yaml", "--max_steps", "3"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (here / "runs/tiny/metrics.json").read_text(encoding="utf-8") == before
    assert main(["train", "shop.yaml", "--resume", "--embedding_dim", "8"]) == 2
    assert "model.embedding_dim" in capsys.readouterr().err


def test_a_run_started_with_a_relative_backbone_can_go_on(tiny_config, tiny_backbone, monkeypatch):
    monkeypatch.chdir(tiny_backbone.parent)
    folder = Path(tiny_config.training["output_dir"])
    prepare_folder(folder, tiny_config, resume=False, overwrite=False)
    (folder / "metrics.json").touch()
    started = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    started["model"]["backbone"] = tiny_backbone.name  # as an earlier version wrote it
    (folder / "config.yaml").write_text(yaml.safe_dump(started), encoding="utf-8")
    tiny_config.model.backbone = str(tiny_backbone)
    prepare_folder(folder, tiny_config, resume=True, overwrite=False)
    assert RunConfig.load(folder / "config.yaml").model.backbone == str(tiny_backbone)


def test_overwrite_removes_what_the_earlier_run_wrote_and_nothing_else(tmp_path):
    from karma_fast.run_setup import RESULTS

    event, ours = "events.out.tfevents.1700000000.host.1.0", ["config.yaml", *RESULTS]
    ours += [f"runs/Nov23_10-00-00_host/{event}", "checkpoint-3/model.safetensors", "checkpoint-3/complete",
             "model/model.safetensors", "model/items.safetensors", "model/items.jsonl", "model/README.md",
             "model/index.json", "model/index.safetensors", "model/id_model/id_model.json"]
    others = ["model/mine.py", "runs/demo/metrics.json", f"runs/demo/runs/Nov20_10-00-00_host/{event}",
              "runs/notes.txt", "checkpoint-notes/a.txt", "src/a.py"]

    def replace(folder, *names, config="karma"):
        for name in (*names, "metrics.json", "model/config.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        (folder / "model" / "config.json").write_text(json.dumps({config: {}}), encoding="utf-8")
        prepare_folder(folder, RunConfig(), resume=False, overwrite=True)
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    assert replace(tmp_path / "project", *ours, *others) == {"config.yaml", *others}
    assert not (tmp_path / "project" / "runs" / "Nov23_10-00-00_host").exists()
    assert replace(tmp_path / "run", *ours, "model/model.safetensors.part-7") == {"config.yaml"}
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "runs").exists()
    foreign = ["model/model.safetensors", "model/config.json"]  # of someone's language model
    assert replace(tmp_path / "other", *foreign, config="model_type") == {"config.yaml", *foreign}


def test_home_is_known_in_paths(tiny_config, tiny_backbone, tiny_dataset, tmp_path, monkeypatch):
    import karma_fast.run
    from karma_fast.data import load_dataset

    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for name, path in (("shop", Path(tiny_dataset.items).parent), ("model", tiny_backbone)):
        (home / name).symlink_to(path)
    tiny_config.data.interactions, tiny_config.data.items = "~/shop/clicks.csv", "~/shop/items.csv"
    assert dataclasses.replace(tiny_config.model, backbone="~/model").backbone == str(tiny_backbone)
    assert dataclasses.replace(tiny_config.model, backbone="~/none").backbone == str(home / "none")

    def stop(config, say):
        assert len(load_dataset(config.data).items) == 40
        raise KeyboardInterrupt

    monkeypatch.setattr(karma_fast.run, "checked_data", stop)
    with pytest.raises(KeyboardInterrupt):
        karma_fast.run.run(tiny_config, "~/run", say=lambda text: None)
    kept = RunConfig.load(home / "run" / "config.yaml")
    assert kept.data.items == str(Path(tiny_dataset.items).resolve())
    assert kept.training["output_dir"] == str(home / "run")
    assert not list(here.iterdir())


def test_vector_files_of_a_run_are_found_from_any_folder(tiny_config, tiny_dataset, tmp_path, monkeypatch):
    from karma_fast.data import load_dataset

    for folder, names in (("shop", ("id.npy", "image.npy")), ("here", ("image.npy",)), ("there", ())):
        (tmp_path / folder).mkdir()
        for name in names:
            np.save(tmp_path / folder / name, np.full((40, 2), float(folder == "here"), np.float32))
    (tmp_path / "shop" / "items.csv").write_bytes(Path(tiny_dataset.items).read_bytes())
    monkeypatch.chdir(tmp_path / "here")
    tiny_config.data = dataclasses.replace(tiny_config.data, items="../shop/items.csv", image_column="image.npy",
                                           id_vector_column="id.npy")  # in this folder, and beside the items

    def vectors(config):
        items = load_dataset(config).items
        return items.image_vectors[0, 0], items.id_vectors[0, 0]

    found = vectors(tiny_config.data)
    prepare_folder(tmp_path / "run", tiny_config, resume=False, overwrite=False)
    monkeypatch.chdir(tmp_path / "there")
    assert vectors(RunConfig.load(tmp_path / "run" / "config.yaml").data) == found == (1.0, 0.0)
    named = dataclasses.replace(tiny_config.data, image_column="missing.npy", id_vector_column="vectors")
    prepare_folder(tmp_path / "other", RunConfig(data=named), resume=False, overwrite=False)
    assert (named.image_column, named.id_vector_column) == ("missing.npy", "vectors")  # nothing to find, a column


@pytest.mark.parametrize("before, now, refused", [
    ({}, {"optim": "adafactor"}, "optim"), ({"adam_beta2": 0.99}, {}, "adam_beta2"),
    ({"seed": 1}, {"seed": 2}, "seed"), ({}, {"lr_scheduler_type": "linear"}, "lr_scheduler_type"),
    ({"lr_scheduler_type": "greedy"}, {"lr_scheduler_type": "greedy", "learning_rate": 1e-5}, "learning_rate"),
    ({}, {"learning_rate": 1e-5, "weight_decay": 0, "max_steps": 9, "save_steps": 7, "seed": 42}, None),
    ({"metric_for_best_model": "MRR"}, {"metric_for_best_model": "MRR", "chunk_size": 4}, None)])
def test_training_settings_that_cannot_change_when_a_run_goes_on(tmp_path, before, now, refused):
    def prepare(training, resume):
        prepare_folder(tmp_path, RunConfig(training=training_settings(training)), resume, False)
        return (tmp_path / "config.yaml").read_text(encoding="utf-8")

    held = prepare(before, False)
    (tmp_path / "checkpoint-3").mkdir()
    if refused is None:
        assert prepare(now, True) != held
        return
    with pytest.raises(ConfigError, match=f"^training.{refused}: .* was started with .* set it back, or start anew"):
        prepare(now, True)
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == held


def test_resume_after_a_kill_gives_the_same_model(here, capsys):
    """A second run, cut back to its checkpoint at step 2, ends where the uninterrupted one did."""
    import shutil

    import torch
    from safetensors.torch import load_file

    shutil.copytree("runs/tiny", "runs/again")
    for name in ("model", "checkpoint-3"):
        shutil.rmtree(f"runs/again/{name}")
    Path("runs/again/metrics.json").unlink()
    assert main(["train", "shop.yaml", "--max_steps", "3", "--save_steps", "2", "--output_dir", "runs/again",
                 "--resume", "--test-users", "10"]) == 0
    assert "going on from runs/again/checkpoint-2" in capsys.readouterr().out
    one, two = (load_file(f"runs/{name}/model/model.safetensors") for name in ("tiny", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    metrics = json.loads(Path("runs/again/metrics.json").read_text(encoding="utf-8"))
    assert (metrics["requests"], metrics["drawn_from"]) == (10, 30)
    assert "10 requests, drawn by seed from 30, ranked against all 40 items" in metrics["protocol"]


def test_a_backbone_without_attention_leaves_its_map_out(here, tiny_backbone, tmp_path, capsys):
    import torch
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    folder, backbone = tmp_path / "run", tmp_path / "mamba"
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    tokenizer.save_pretrained(backbone)
    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4,
                                 bos_token_id=None, eos_token_id=0, pad_token_id=0)).save_pretrained(backbone)
    words = ["--backbone", str(backbone), "--lora_targets", "in_proj", "--max_steps", "2", "--test-users", "5"]
    assert main(["train", "shop.yaml", *words, "--output_dir", str(folder)]) == 0
    assert "MambaForCausalLM: none of its layers reports attention weights" in capsys.readouterr().out
    assert (folder / "metrics.json").is_file() and not (folder / "attention.json").exists()
    assert "## Attention" not in (folder / "report.md").read_text(encoding="utf-8")
    assert main(["diagnose", str(folder), "--requests", "20", "--decoder-steps", "0"]) == 0
    assert "not measured: no layer of MambaForCausalLM reports attention weights" in capsys.readouterr().out
    assert main(["recommend", str(folder), "--history", "i5,i6", "--k", "3", "--json", "--explain"]) == 0


def test_ctrl_c_saves_and_exits_with_130(shop):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
                                "XDG_CACHE_HOME": str(shop / "cache")}
    words = ["train", "shop.yaml", "--output_dir", "runs/stopped", "--max_steps", "100000", "--save_steps", "100000"]
    with subprocess.Popen([sys.executable, "-m", "karma_fast", *words], cwd=shop, text=True, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGINT)
                break
        said = process.stdout.read()
    assert process.returncode == 130, said
    assert "--resume goes on from there" in said and "Traceback" not in said
    assert list((shop / "runs" / "stopped").glob("checkpoint-*/complete"))


@pytest.mark.parametrize("part, chunk_size, said", [
    ("prompts", 8, "chunk_size to 4 .now 8; the gradients stay the same., or set model.gradient_checkpointing"),
    ("prompts", None, "chunk_size to 16 .now 32"),
    ("prompts", 1, "set model.gradient_checkpointing to true"),
    ("prompts", "checkpointing", "set model.max_history below 20"),
    ("contrastive", 8, "per_device_train_batch_size to 16 .now 32.*half the negatives"),
    ("contrastive", "pairs", "training.batch_size to 300 .now 600"),
    ("reconstruction", 8, "the decoder's pass .*chunk_size to 4"),
    ("optimiser", 8, "set training.optim to paged_adamw_8bit"), ("evaluation", None, "model.max_history below 20")])
def test_out_of_memory_says_what_to_lower(tmp_path, part, chunk_size, said):
    from karma_fast import KarmaTrainingArguments
    from karma_fast.config import KarmaConfig
    from karma_fast.run_setup import explain_memory
    from karma_fast.step import OutOfMemory

    special = chunk_size if isinstance(chunk_size, str) else None
    args = KarmaTrainingArguments(per_device_train_batch_size=32, chunk_size=1 if special else chunk_size,
                                  batch_size=600 if special == "pairs" else None, use_cpu=True)
    config = KarmaConfig(gradient_checkpointing=special == "checkpointing")
    with pytest.raises(MemoryError, match=f"2 GiB; .*{said}" if "pass" not in said else said) as caught, \
            explain_memory(args, config, tmp_path):
        raise OutOfMemory(part, "tried to allocate 2 GiB")
    assert "--resume" not in str(caught.value)
    anew = "max_history" in said or "optim " in said
    assert ("start anew" in str(caught.value)) == anew
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "complete").touch()
    with pytest.raises(MemoryError) as caught, explain_memory(args, config, tmp_path):
        raise OutOfMemory(part, "tried to allocate 2 GiB")
    goes_on = "checkpoint-3 holds the last complete step, and --resume goes on from it"
    assert (goes_on in str(caught.value)) == (not anew)
    with pytest.raises(RuntimeError, match="shape"), explain_memory(args, config, tmp_path):
        raise RuntimeError("shape mismatch")  # other errors stay as they are


@pytest.mark.parametrize("words, said", [
    (["--learnin_rate", "1e-4"], "training.learnin_rate: no such setting; did you mean learning_rate?"),
    (["--max_steps", "many"], "training.max_steps: got 'many'"),
    (["--model.positions", "first"], "model.positions: got 'first'; allowed: last, all"),
    (["--model.max_history", "inf"], "model.max_history: got 'inf'; a whole number is needed"),
    (["--model.max_history", "nan"], "model.max_history: got 'nan'; a number is needed"),
    (["--valid_time", "2024-09-01"], "data.valid_time: got '2024-09-01'; a number is needed (in seconds since 1970 "
     "2024-09-01 is 1725148800, in UTC)"),
    (["--model.lora_alpha", "nan"], "model.lora_alpha: got 'nan'; a number is needed"),
    (["--lr_scheduler_type", "cosin"], "training:"),
    (["--backbone", "/no/such/folder"], "model.backbone: '/no/such/folder' cannot be loaded"),
])
def test_wrong_settings_are_named(here, capsys, words, said):
    assert main(["train", "shop.yaml", "--output_dir", "runs/wrong", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error


@pytest.mark.parametrize(("line", "said"), [
    ("valid_time: 2024-09-01", "data.valid_time: got 2024-09-01; a number is needed (in seconds since 1970 2024-09-01 "
     "is 1725148800, in UTC)"),
    ("test_time: 2024-09-01 02:00:00.5+02:00", "2024-09-01 02:00:00.500000+02:00 is 1725148800.5, in UTC)"),
    ("time_column: yes", "data.time_column: got True; text or false is needed"),
])
def test_dates_and_switches_in_yaml(tmp_path, line, said):
    path = tmp_path / "a.yaml"
    path.write_text(f"data:\n  {line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    assert said in str(caught.value)


def test_an_index_that_needs_faiss_is_refused_before_the_training(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("karma_fast.run.checked_data", lambda *args: pytest.fail("the run went on without faiss"))
    assert main(["train", "shop.yaml", "--output_dir", "runs/no-faiss", "--model.index", "ivf"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.index: this index needs faiss") and "pip install faiss-cpu" in error
    assert not Path("runs/no-faiss").exists()


def test_data_that_cannot_be_trained_on(here, capsys, tmp_path):
    assert main(["train", "missing.yaml"]) == 2
    few = tmp_path / "few.csv"
    few.write_text("user_id,item_id,timestamp\nu1,i1,1\nu1,i2,2\n", encoding="utf-8")
    assert main(["train", "shop.yaml", "--interactions", str(few), "--output_dir", str(tmp_path / "run")]) == 1
    assert "min_user_events" in capsys.readouterr().err
    assert main(["train", "shop.yaml", "--interactions", "none.csv", "--output_dir", str(tmp_path / "run")]) == 1
    assert "none.csv: no such file" in capsys.readouterr().err


def test_traceback_on_request(here, capsys):
    assert main(["--traceback", "recommend", "nowhere", "--history", "i1"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "error: nowhere: no model there" in error


@pytest.fixture(scope="module")
def searching(shop, tiny_searches):
    """runs/searches in the shop: a model that was trained on data with queries; what the command said of it."""
    out, _ = karma("train", "shop.yaml", "--interactions", tiny_searches.interactions, "--name", "searches",
                   "--positions", "last", "--max_steps", "1", folder=shop,
                   environment={"XDG_CACHE_HOME": str(shop / "cache")})
    return out


def test_where_requests_have_queries_a_baseline_reads_them_too(searching, here, capsys):
    said = "; queries are read by the model and, of the baselines, by query TF-IDF and query kNN alone; leave one out"
    metrics = json.loads(Path("runs/searches/metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["rows"]) == ["popularity", "item_knn", "title_tfidf", "query_tfidf", "query_knn",
                                     "karma_start", "karma"]
    assert metrics["rows"]["query_tfidf"]["HR@10"] == 1 and "best of the baselines 1.0000" in searching
    assert said in searching and "query TF-IDF: HR@10" in searching  # the verdict's rival
    assert "query TF-IDF" in Path("runs/searches/report.md").read_text(encoding="utf-8")
    assert main(["evaluate", "runs/searches", "--baselines"]) == 0
    out = capsys.readouterr().out
    assert said in out and out.count("query TF-IDF") > 2
    assert "quer" not in json.loads(Path("runs/tiny/metrics.json").read_text(encoding="utf-8"))["protocol"]


# ---- using the model -----------------------------------------------------------------------------------------------


class Title(str):
    """Counts how often one is put into lower case."""

    read = 0

    def lower(self):
        Title.read += 1
        return super().lower()


def test_a_typed_history_reads_every_title_once(monkeypatch):
    from karma_fast.commands.recommend import find_items
    from karma_fast.data import Items

    titles = ["Usual Suspects, The", "Toy Story", "toy story 2", "Tea", "tea", ""]
    items = Items(np.array(["a", "b", "c,d", "e", "f", "g"], dtype=object), [""] * 6, list(map(Title, titles)))
    items.index("a")
    with monkeypatch.context() as patched:
        patched.setattr(Items, "_unknown", lambda *_: pytest.fail("looked for near ids"))
        typed = "usual suspects, the, Toy Story, story 2, b, the, g, toy story 2, " * 40
        assert find_items(items, typed).tolist() == [0, 1, 2, 1, 0, 5, 2] * 40
        assert Title.read == len(titles)
        with pytest.raises(KeyError, match=r"'TEA' fits 2 items: e \(Tea\), f \(tea\); give the id of one"):
            find_items(items, "a, TEA")
        with pytest.raises(KeyError, match=r"'toy' fits 2 items: b \(Toy Story\), c,d \(toy story 2\)"):
            find_items(items, "toy")
    with pytest.raises(KeyError, match="no item has the id 'Usual Suspekts'; near: a"):
        find_items(items, "b, Usual Suspekts, The")


def test_recommend_by_history_and_user(here, capsys):
    assert main(["recommend", "runs/tiny", "--history", "red rocket, i1, Choir, Red", "--k", "3"]) == 1
    assert "'Choir' fits 2 items" in capsys.readouterr().err
    assert main(["recommend", "runs/tiny", "--history", "red rocket, i1, red choir", "--k", "37", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["history"] == ["Red Rocket", "Red Orbit", "Red Choir"]
    assert len(listed["items"]) == 37 and not {"i0", "i1", "i32"} & {row["id"] for row in listed["items"]}
    scores = [row["score"] for row in listed["items"]]
    assert scores == sorted(scores, reverse=True)
    assert main(["recommend", "runs/tiny", "--history", "i0, i1, i32", "--k", "40", "--json", "--unmasked"]) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 40  # those of the history too
    assert main(["recommend", "runs/tiny/model", "--user", "u3", "--explain", "--query", "a spoon"]) == 0
    assert "decoded interest:" in (text := capsys.readouterr().out) and "a spoon" in text
    for words, said in ((["--user", "u99"], "no user has the id 'u99'"), (["--history", "Red Rokcet"], "Red Rocket")):
        assert main(["recommend", "runs/tiny", *words]) == 1
        assert said in capsys.readouterr().err


def test_recommend_agrees_with_the_model(here, capsys):
    from karma_fast import KarmaModel

    assert main(["recommend", "runs/tiny", "--history", "i5,i6", "--k", "1", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["items"][0]
    model = KarmaModel.from_pretrained("runs/tiny/model")
    scores = (model.encode_users([[5, 6]]) @ model.encode_items().T)[0]
    scores[[5, 6]] = -9
    assert model.items.ids[int(scores.argmax())] == row["id"] and abs(float(scores.max()) - row["score"]) < 1e-3


def test_the_page_on_serving_finds_what_recommend_finds(here, capsys):
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    exec(code.replace("runs/my-shop", "runs/tiny").replace("B07X", "i5").replace("B08Y", "i6"), {})
    printed = capsys.readouterr().out
    assert main(["recommend", "runs/tiny", "--history", "i5,i6", "--query", "running shoes", "--json"]) == 0
    found = [row["id"] for row in json.loads(capsys.readouterr().out)["items"]]
    assert printed == f"{found}\n" and len(found) == 10


def test_evaluate(here, capsys):
    assert main(["evaluate", "runs/tiny", "--json", "--baselines"]) == 0
    found = json.loads(capsys.readouterr().out)
    recorded = json.loads(Path("runs/tiny/metrics.json").read_text(encoding="utf-8"))
    assert found["protocol"] == recorded["protocol"]
    for name in ("popularity", "item_knn", "title_tfidf", "karma"):
        assert found["rows"][name]["HR@10"] == pytest.approx(recorded["rows"][name]["HR@10"], abs=0.04)
    assert main(["evaluate", "runs/tiny", "--json", "--unmasked"]) == 0
    kept = json.loads(capsys.readouterr().out)
    assert "seen items kept" in kept["protocol"] and "seen items left out" in found["protocol"]
    assert kept["rows"]["karma"] != found["rows"]["karma"]
    assert main(["evaluate", "runs/none"]) == 1
    assert "no model there" in capsys.readouterr().err


def test_at_most_so_many_requests_are_ranked_unless_all_are_asked_for(here, capsys, monkeypatch):
    monkeypatch.setattr("karma_fast.commands.common.MOST_REQUESTS", 12)
    said = ("12 of 30 requests are drawn and ranked, so HR has a standard error of at most 0.1444; --test-users 0 "
            "ranks all\n")
    found = []
    for words in ((), ("--test-users", "12"), ("--test-users", "0")):
        assert main(["evaluate", "runs/tiny", "--json", *words]) == 0
        out, err = capsys.readouterr()
        found.append(json.loads(out))
        assert err == ("" if words else said)
    assert found[0] == found[1] and [part["requests"] for part in found[1:]] == [12, 30]
    assert "12 requests, drawn by seed from 30, ranked" in found[0]["protocol"] and found[0]["drawn_from"] == 30
    assert "30 requests ranked" in found[2]["protocol"] and "drawn" not in found[2]["protocol"]
    with pytest.raises(SystemExit):
        main(["evaluate", "runs/tiny", "--test-users", "-1"])


def test_evaluate_shows_a_bar_for_each_row_on_a_terminal(here, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["evaluate", "runs/tiny", "--json", "--baselines"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) and all(f"{name}: 100%" in err for name in (
        "popularity", "item-kNN", "title TF-IDF", "encoding users", "ranking"))


def test_the_standard_error_of_the_requests_that_are_drawn():
    said = []
    assert len(requests_to_rank(np.arange(50_000), None, said.append)) == 50_000 and not said
    assert len(requests_to_rank(np.arange(50_001), 0, said.append)) == 50_001 and not said
    drawn = requests_to_rank(np.arange(50_001), None, said.append)
    assert len(drawn) == 50_000 and "50,000 of 50,001" in said[0] and "at most 0.0023" in said[0]


def test_embed(here, capsys, tmp_path):
    import polars as pl

    items, users = tmp_path / "items.parquet", tmp_path / "users.npy"
    assert main(["embed", "runs/tiny", "--items", str(items), "--users", str(users)]) == 0
    frame = pl.read_parquet(items)
    assert frame.columns == ["id", "embedding"] and frame.height == 40 and frame["id"][3] == "i3"
    assert frame.schema["embedding"] == pl.List(pl.Float32)
    assert np.allclose(np.linalg.norm(np.array(frame["embedding"].to_list()), axis=1), 1, atol=1e-5)
    vectors = np.load(users)
    assert vectors.shape == (30, 16) and vectors.dtype == np.float32
    assert (tmp_path / "users.ids.txt").read_text(encoding="utf-8").split()[0] == "u0"
    assert main(["embed", "runs/tiny"]) == 2
    assert main(["embed", "runs/tiny", "--items", "items.csv"]) == 2


def test_embed_says_that_users_are_embedded_without_queries(searching, here, capsys, tmp_path):
    from karma_fast import KarmaModel
    from karma_fast.data import load_dataset

    users = tmp_path / "users.npy"
    assert main(["embed", "runs/searches", "--users", str(users)]) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: the data has queries") and error.count("\n") == 1
    assert "without any, from each user's last 6 events, held-out ones included" in error
    assert "`karma-fast recommend --query`, or encode_users(histories, queries) in Python" in error
    model = KarmaModel.from_pretrained("runs/searches/model")
    sequences = load_dataset(RunConfig.load("runs/searches/config.yaml").data).sequences
    last = [sequences.items[end - 6:end] for end in sequences.indptr[1:4]]
    assert np.allclose(np.load(users)[:3], model.encode_users(last).numpy(), atol=1e-5)
    assert main(["embed", "runs/tiny", "--users", str(users)]) == 0
    assert main(["embed", "runs/searches", "--items", str(tmp_path / "items.npy")]) == 0
    assert not capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["embed", "--help"])
    assert "their last model.max_history events, held-out ones included, and of no query" in capsys.readouterr().out


def test_embed_the_other_way_round(here, tmp_path):
    import polars as pl

    items, users = tmp_path / "items.npy", tmp_path / "users.parquet"
    assert main(["embed", "runs/tiny", "--items", str(items), "--users", str(users)]) == 0
    assert np.load(items).shape == (40, 16) and (tmp_path / "items.ids.txt").read_text().split()[3] == "i3"
    assert pl.read_parquet(users).height == 30


def test_an_index_by_name_and_evaluations_while_training(here, capsys, monkeypatch):
    words = ["--max_steps", "2", "--model.index", "hnsw", "--eval_strategy", "steps", "--eval_steps", "1"]
    monkeypatch.setattr("karma_fast.commands.common.MOST_REQUESTS", 12)
    assert main(["train", "shop.yaml", *words, "--output_dir", "runs/hnsw", "--disable_tqdm", "false"]) == 0
    out, err = capsys.readouterr()
    assert "12 of 30 requests are drawn" in out
    for bar, times in (("popularity: 100%", 1), ("item-kNN: 100%", 1), ("encoding users: 100%", 2),
                       ("ranking: 100%", 2)):  # before the training and after it
        assert err.count(bar) >= times, bar
    metrics = json.loads(Path("runs/hnsw/metrics.json").read_text(encoding="utf-8"))
    assert (metrics["requests"], metrics["drawn_from"]) == (12, 30) and "12 requests, drawn" in metrics["protocol"]
    capsys.readouterr()
    assert main(["evaluate", "runs/hnsw", "--json", "--baselines"]) == 0  # ranks the requests that the run ranked
    assert json.loads(capsys.readouterr().out)["rows"]["popularity"] == metrics["rows"]["popularity"]
    assert json.loads(Path("runs/hnsw/model/index.json").read_text(encoding="utf-8"))["kind"] == "hnsw"
    assert Path("runs/hnsw/report.md").read_text(encoding="utf-8").count("HR@10") > 2
    assert main(["recommend", "runs/hnsw", "--history", "i5,i6", "--k", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 3
    assert main(["train", "shop.yaml", "--model.index", "tree"]) == 2
    assert "model.index: got 'tree'; allowed: flat, hnsw, ivf" in capsys.readouterr().err


@pytest.mark.parametrize(("annotation", "value", "said"), [
    (int | Literal["auto"] | None, "x", "got 'x'; a number is needed, or auto"),
    (Literal[False] | str | None, 3.5j, "got 3.5j; text or false is needed")])
def test_a_setting_of_several_kinds_names_them_all(annotation, value, said):
    with pytest.raises(ConfigError, match=re.escape(said) + "$"):
        convert("training.chunk_size", value, annotation)


def test_a_folder_of_other_checkpoints_is_no_run(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(FileNotFoundError, match="no model there"):
        model_folder(str(tmp_path))
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(FileNotFoundError, match="its training did not end"):
        model_folder(str(tmp_path))


@pytest.mark.parametrize("process", [0, 1])
def test_the_first_process_of_the_demo_speaks_alone(process, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", str(process))
    monkeypatch.setattr("karma_fast.run.run", lambda *given, **options: {})
    assert main(["demo"]) == 0
    said = capsys.readouterr().out
    assert ("MovieLens" in said, "Try it" in said) == ((True, True) if process == 0 else (False, False))
