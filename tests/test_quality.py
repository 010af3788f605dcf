"""The quality experiment: rows and controls do what they say, runs stop and go on, the test is read once."""

import csv
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.quality import __main__ as main
from benchmarks.quality import controls, settings
from benchmarks.quality import train as training
from benchmarks.quality.protocol import HISTORY_ONLY, gains, make_requests
from benchmarks.quality.results import COMPARED, compare, merge, usable_ranks
from benchmarks.quality.rivals import make_id_row, train_sasrec_row
from benchmarks.quality.rows import ROWS, chosen, why_not
from benchmarks.quality.settings import DATA, DataSet, base_config
from benchmarks.quality.train import Deadline, build, config_of
from karma_fast import KarmaTrainer, KarmaTrainingArguments
from karma_fast.baselines import SASRecConfig
from karma_fast.config import ConfigError, DataConfig, RunConfig
from karma_fast.data import training_windows
from karma_fast.data.batches import log_sampling_probability
from karma_fast.evaluation import Ranks
from karma_fast.evaluation.evaluate import evaluate_model
from karma_fast.step import backward

KARMA = [row for row in ROWS.values() if row.kind == "karma"]


@pytest.fixture
def tiny(tiny_config, tiny_dataset, tmp_path, monkeypatch):
    """The tiny data and model as a data set of the experiment; its RunConfig."""
    class Tiny(DataSet):
        def config(self, source=None):
            return tiny_dataset

    spec = Tiny("tiny", 7, "all", 12, 2)
    model = {"backbone": tiny_config.model.backbone, "quantization": "none", "lora_rank": 4, "embedding_dim": 16,
             "max_history": 6, "max_text_tokens": 12, "id_dim": 8, "num_soft_tokens": 2, "decode_weight": 0.5,
             "decoder_warmup_steps": 2, "id_folds": 2}
    values = {"learning_rate": 1e-3, "warmup_steps": 1, "logging_steps": 1, "save_steps": 50, "save_total_limit": 1,
              "report_to": "none", "use_cpu": True}
    monkeypatch.setitem(DATA, "tiny", spec)
    monkeypatch.setattr(settings, "REDUCED", {"model": model, "training": values})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return base_config(spec, "reduced", tiny_dataset)


@pytest.fixture
def command(tmp_path):
    """Runs the program on the tiny data; results and runs lie in ``tmp_path``."""
    def run(*words: str, out: str = "found.json", runs: str = "runs") -> tuple[int, dict]:
        code = main.main(["--data", "tiny", "--out", str(tmp_path / out), "--runs", str(tmp_path / runs), *words])
        return code, json.loads((tmp_path / out).read_text()) if (tmp_path / out).exists() else {}
    return run


def made(name: str, base: RunConfig, data, tmp_path, **changes):
    config = config_of(ROWS[name], base, 0, tmp_path)
    config.model = dataclasses.replace(config.model, **changes)
    return build(ROWS[name], config, data, 0, torch.device("cpu"), tmp_path)


def batch_of(model, data, count: int = 8, chunk_size: int | None = None):
    starts, ends = training_windows(data.sequences, data.split, model.config.max_history, model.config.positions)
    log_q = log_sampling_probability(data.sequences, data.split, len(data.items))
    collate = model.collator(data.sequences, log_q, seed=0, chunk_size=chunk_size)
    return collate(list(zip(starts.tolist(), ends.tolist(), strict=True))[:count])


# ---- rows ----------------------------------------------------------------------------------------------------------

def test_rows_differ_from_their_parent_in_what_they_say(tiny, tmp_path):
    configs = {row.name: config_of(row, tiny, 3, tmp_path).model.to_dict() for row in KARMA}
    differ = {row.name: {key: value for key, value in configs[row.name].items()
                         if value != configs[row.parent][key]} for row in KARMA if row.parent}
    no_shortcut = {"history_shortcut": False, "query_shortcut": False}
    assert differ == {"B": {"gen_weight": 1.0}, "C": {"rec_weight": 1.0}, "D": {"gen_weight": 1.0, "rec_weight": 1.0},
                      "E": {"vis_weight": 1.0}, "G": {}, "H": {},
                      "frozen": {"tuning": "frozen"}, "no-llm": {"tuning": "frozen"}, "random": {},
                      "A-plain": no_shortcut, "D-plain": no_shortcut}
    assert configs["A"] | {"gen_weight": 1.0, "rec_weight": 1.0, "vis_weight": 1.0} == tiny.model.to_dict()
    assert {row.name: row.control for row in KARMA if row.control} == {
        "E": "ImageTargets", "G": "StopGradient", "H": "ShuffledTexts", "no-llm": "NoLanguageModel",
        "random": "RandomWeights"}
    assert len({json.dumps(config_of(row, tiny, 3, tmp_path).training) for row in KARMA}) == 1
    assert "synthetic" in ROWS["E"].label and "synthetic" in ROWS["E"].differs


@pytest.mark.parametrize("name", ["B", "C", "D", "E", "G", "H", "frozen", "no-llm"])
def test_all_rows_start_from_the_same_weights_and_take_the_same_pairs(name, tiny, tiny_data, tmp_path):
    first, other = made("A", tiny, tiny_data, tmp_path), made(name, tiny, tiny_data, tmp_path)
    ours, theirs = ({key: value for key, value in model.state_dict().items() if not key.startswith("backbone")}
                    for model in (first, other))
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    lora = [{key: value for key, value in model.backbone.state_dict().items() if "lora" in key}
            for model in (first, other)]
    assert all(torch.equal(value, lora[1][key]) for key, value in lora[0].items() if lora[1]) and lora[0]
    assert bool(lora[1]) == (name not in ("frozen", "no-llm"))
    extra = {key.partition(".")[0] for key in set(theirs) - set(ours)}
    assert extra == ({"decode_projection"} if name in "CDEGH" else set()) | ({"image_head"} if name == "E" else set())
    orders = []
    for model in (first, other):
        args = KarmaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, batch_size=12, seed=5, disable_tqdm=True)
        loader = KarmaTrainer(model, args, tiny_data).get_train_dataloader()
        orders.append([batch.keys.tolist() for batch, _ in zip(loader, range(4), strict=False)])
    assert orders[0] == orders[1] and len(set(map(str, orders[0]))) == 4


def test_random_weights_change_the_language_model_and_nothing_else(tiny, tiny_data, tmp_path):
    # as in the tables; vectors from the language model's own reading of the texts would be random too
    first, other, third = (made(name, tiny, tiny_data, tmp_path, text_vectors="words")
                           for name in ("A", "random", "random"))
    ours, theirs, again = (model.state_dict() for model in (first, other, third))
    assert set(ours) == set(theirs) and all(torch.equal(value, again[key]) for key, value in theirs.items())
    # what follows the size of the language model's word vectors is scaled and not drawn anew
    assert torch.nn.functional.cosine_similarity(first.emb_token, other.emb_token, dim=0) > 1 - 1e-6
    same = {key for key, value in ours.items() if torch.equal(value, theirs[key])}
    assert {key for key in ours if "lora" in key or key.startswith(("item_proj", "shortcut", "interest"))} <= same
    drawn = {key for key, value in ours.items() if key.startswith("backbone") and "lora" not in key and value.ndim > 1}
    assert drawn and not drawn & same
    assert first.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert len(list((tmp_path / "quality").iterdir())) == 1


def test_names_of_rows(tiny):
    assert [row.name for row in chosen("C, A", False)] == ["C", "A"]
    assert {"A", "sasrec", "mix"} <= {row.name for row in chosen("all", False)}
    assert "query" not in {row.name for row in chosen("all", False)}
    assert "query" in {row.name for row in chosen("all", True)}
    for names in ("A,Z", ""):
        with pytest.raises(ValueError, match="no row"):
            chosen(names, False)
    assert all(why_not(row, False) is None for row in ROWS.values() if row.kind == "ra_rec")
    unknown = dataclasses.replace(ROWS["ra-rec"], model={"no_such_setting": 1})
    assert why_not(unknown, False) and why_not(ROWS["query"], False) == "the requests have no queries"


def test_base_settings_take_changes_and_refuse_unknown_ones(tiny, tiny_dataset):
    spec = DATA["tiny"]
    changed = base_config(spec, "reduced", tiny_dataset, {"model.decode_weight": "0.03", "training.max_steps": "7"})
    assert changed.model.decode_weight == 0.03 and changed.training["max_steps"] == 7
    assert (tiny.training["max_steps"], tiny.training["batch_size"], tiny.model.positions) == (2, 12, "all")
    for bad in ("model.nothing", "training.nothing", "decode_weight", "data.seed"):
        with pytest.raises(ValueError):
            base_config(spec, "reduced", tiny_dataset, {bad: "1"})


def test_rows_of_the_other_recipe_share_language_model_and_training(tiny, tiny_dataset, tmp_path):
    changes = {"model.decode_weight": "0.03", "model.id_dim": "4", "training.max_steps": "7"}
    base = base_config(DATA["tiny"], "reduced", tiny_dataset, changes, "ra_rec")
    assert (base.model.backbone, base.model.quantization) == (tiny.model.backbone, "none")
    assert (base.model.id_dim, base.training["max_steps"], base.training["learning_rate"]) == (4, 7, 1e-3)
    configs = {name: config_of(ROWS[name], base, 0, tmp_path).model.to_dict() for name in ROWS if "ra-rec" in name}
    assert configs["ra-rec-input"] == configs["ra-rec"] | {"injection": "input"} != configs["ra-rec"]
    assert configs["ra-rec-no-align"] == configs["ra-rec"] | {"align_weight": 0.0} != configs["ra-rec"]


def test_a_setting_of_one_recipe_is_none_of_the_other(tiny, tiny_dataset, command, capsys):
    changes = {"model.num_negatives": "5"}
    assert base_config(DATA["tiny"], "reduced", tiny_dataset, changes, "ra_rec").model.num_negatives == 5
    assert base_config(DATA["tiny"], "reduced", tiny_dataset, changes).model == tiny.model
    with pytest.raises(SystemExit):
        command("--rows", "A,knn", "--set", "model.num_negatives=5", "--on", "valid")
    assert "--set model.num_negatives: none of the rows A, knn has this setting" in capsys.readouterr().err


def test_queries_of_beauty_take_the_last_position(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("beauty", "beauty-queries"):
        with pytest.raises(ValueError, match="--source FOLDER"):
            DATA[name].config()
        config = base_config(DATA[name], "full", DataConfig(name="ml-100k"))
        assert config.model.positions == ("last" if DATA[name].queries else "all")
        assert config.training["batch_size"] == 4096
        # settings of the data set's own, which --set still changes
        assert (config.model.id_window, config.model.text_vectors, config.model.embedding_dim) == (3, "words", 768)
        changed = base_config(DATA[name], "reduced", DataConfig(name="ml-100k"), {"model.id_window": "5"})
        assert (changed.model.id_window, changed.model.text_vectors) == (5, "words")
        other = base_config(DATA["ml-100k"], "full", DataConfig(name="ml-100k"))
        assert (other.model.id_window, other.model.text_vectors) == (20, "words")


# ---- controls ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk_size", [None, 3])
def test_stop_gradient_trains_the_decoder_alone(chunk_size, tiny, tiny_data, tmp_path):
    stopped, usual, alone = (made(name, tiny, tiny_data, tmp_path) for name in ("G", "D", "B"))
    batch = batch_of(stopped, tiny_data, chunk_size=chunk_size)
    found, expected = backward(stopped, batch), backward(usual, batch_of(usual, tiny_data, chunk_size=chunk_size))
    backward(alone, batch_of(alone, tiny_data, chunk_size=chunk_size))
    assert float(found.norms_u["rec"]) == 0 < float(expected.norms_u["rec"])
    torch.testing.assert_close(found.parts.rec, expected.parts.rec)
    theirs, without = dict(usual.named_parameters()), dict(alone.named_parameters())
    reached = 0
    for name, p in stopped.named_parameters():
        if name.startswith("decode_projection"):  # learns as in D
            torch.testing.assert_close(p.grad, theirs[name].grad)
            assert float(p.grad.abs().sum()) > 0
        elif p.requires_grad and p.grad is not None:  # all else as without L_rec
            torch.testing.assert_close(p.grad, without[name].grad)
            reached += not torch.allclose(p.grad, theirs[name].grad)
    assert reached > 0


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_no_language_model_reads_no_state(chunk_size, tiny, tiny_data, tmp_path, monkeypatch):
    model, usual = made("no-llm", tiny, tiny_data, tmp_path), made("frozen", tiny, tiny_data, tmp_path)
    theirs = usual.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    batch = batch_of(model, tiny_data, chunk_size=chunk_size)
    expected = torch.cat([F.normalize(usual.shortcut(usual.features(chunk.history_items), chunk.latest), dim=-1)
                          for chunk in batch.prompts])
    monkeypatch.setattr(model, "_prompt_states", None)  # the language model is not even called
    torch.testing.assert_close(model(batch).u, expected)
    backward(model, batch)
    learning = {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0}
    # an item that only one group of users knows lacks an ID vector for that group
    assert {name.partition(".")[0] for name in learning} == {"item_projection", "shortcut", "loss", "features"}


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_shuffled_texts_change_what_is_decoded_and_nothing_else(chunk_size, tiny, tiny_data, tmp_path):
    usual, shuffled = made("C", tiny, tiny_data, tmp_path), made("H", tiny, tiny_data, tmp_path)
    plain, other = (batch_of(model, tiny_data, 12, chunk_size) for model in (usual, shuffled))

    def texts(batch) -> list[tuple[int, ...]]:
        out = []
        for chunk in batch.decode:
            rows = chunk.texts.rows.tolist()
            out += [tuple(t for t, r in zip(chunk.texts.labels.tolist(), rows, strict=True) if r == row)
                    for row in range(len(chunk.pairs))]
        return out

    before, after = texts(plain), texts(other)
    assert sorted(before) == sorted(after) and len(before) == 12
    assert all(a != b for a, b in zip(before, after, strict=True))
    for name in ("key_items", "key_index", "keys", "log_q", "decode_pairs"):
        assert torch.equal(getattr(plain, name), getattr(other, name)), name
    assert [c.pairs.tolist() for c in plain.decode] == [c.pairs.tolist() for c in other.decode]
    assert plain.num_texts == other.num_texts and plain.num_tokens == other.num_tokens
    assert texts(batch_of(shuffled, tiny_data, 12, chunk_size)) == after  # the same windows, the same swap
    found, expected = shuffled(other).parts, usual(plain).parts
    assert torch.equal(found.act, expected.act) and not torch.equal(found.rec, expected.rec)


def test_swapped_leaves_no_equal_value_where_it_can_be_helped():
    random = np.random.default_rng(0)
    for _ in range(300):
        values = random.integers(0, 5, random.integers(2, 12)).tolist()
        places = controls.swapped(values, random)
        assert sorted(places.tolist()) == list(range(len(values)))
        kept = sum(values[p] == v for p, v in zip(places, values, strict=True))
        assert kept == max(0, 2 * max(map(values.count, values)) - len(values))


def test_synthetic_vectors_are_targets_and_no_feature(tiny, tiny_data, tmp_path):
    plain, model = made("D", tiny, tiny_data, tmp_path), made("E", tiny, tiny_data, tmp_path)
    assert model.features.width == plain.features.width and "image" not in model.features.kinds
    assert torch.equal(model.encode_items(), plain.encode_items())
    parts, usual = model(batch_of(model, tiny_data)).parts, plain(batch_of(plain, tiny_data)).parts
    assert torch.isfinite(parts.vis) and float(parts.vis.detach()) > 0 and usual.vis is None
    for name in ("act", "gen", "rec"):
        assert torch.equal(getattr(parts, name), getattr(usual, name)), name
    found = backward(model, batch_of(model, tiny_data))
    assert float(found.norms_u["vis"]) > 0
    assert not any("features.image" in name for name in model.trained_names())


# ---- runs ----------------------------------------------------------------------------------------------------------

def test_a_run_that_is_stopped_goes_on_to_the_same_result(tiny, command, monkeypatch, capsys):
    words = ("--rows", "popularity,A,D", "--seeds", "0,1", "--set", "training.max_steps=4")
    assert command(*words, out="whole.json", runs="whole")[0] == 0
    usual, steps = Deadline.on_step_end, []

    def stop_at_two(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        self.end = 0.0 if state.global_step == 2 else float("inf")
        return usual(self, args, state, control, **kwargs)

    monkeypatch.setattr(Deadline, "on_step_end", stop_at_two)
    code, found = command(*words)
    assert code == 3 and [r["row"] for r in found["records"]] == ["popularity"]
    assert "stopped at step 2 of 4" in capsys.readouterr().out
    for sitting in range(3):
        assert command(*words, "--resume")[0] == 3, sitting
    code, found = command(*words, "--resume")
    assert code == 0 and steps == [1, 2] + 3 * [3, 4, 1, 2] + [3, 4]
    whole = command(*words, "--resume", out="whole.json", runs="whole")[1]
    assert len(whole["records"]) == 5
    for a, b in zip(found["records"], whole["records"], strict=True):
        assert (a["row"], a["seed"], a["metrics"]) == (b["row"], b["seed"], b["metrics"])
        assert a["kind"] == "baseline" or (a["sittings"], b["sittings"], a["steps"]) == (2, 1, 4)
        assert a["kind"] == "baseline" or a["train_seconds"] > 0 and a["peak_bytes"] > 0
    assert found["comparisons"] == whole["comparisons"]
    by_seed = {r["seed"]: r["metrics"] for r in found["records"] if r["row"] == "A"}
    assert by_seed[0] != by_seed[1]


def test_a_killed_sitting_counts_up_to_its_last_checkpoint(tiny, command, monkeypatch, tmp_path):
    words = ("--rows", "A", "--set", "training.max_steps=4", "--set", "training.save_steps=2")
    usual = Deadline.on_step_end

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise SystemExit(137)
        return usual(self, args, state, control, **kwargs)

    monkeypatch.setattr(Deadline, "on_step_end", killed)
    with pytest.raises(SystemExit):
        command(*words)
    path = next((tmp_path / "runs").rglob("cost.json"))
    before = json.loads(path.read_text())
    assert before["steps"] == 2 and before["sittings"] == 1 and before["start_seconds"] > 0
    monkeypatch.setattr(Deadline, "on_step_end", usual)
    record = command(*words, "--resume")[1]["records"][0]
    assert (record["sittings"], record["steps"]) == (2, 4) and record["start_seconds"] == before["start_seconds"]
    assert record["train_seconds"] > before["train_seconds"]


def test_what_makes_a_row_is_not_changed(tiny, command, capsys):
    for row, change in (("D", "model.gen_weight=0.3"), ("frozen", "model.tuning=lora"), ("A", "training.seed=4")):
        with pytest.raises(SystemExit):
            command("--rows", row, "--on", "valid", "--set", change)
        assert f"--set {change.partition('=')[0]}: row {row} has its own" in " ".join(capsys.readouterr().err.split())


def test_the_row_of_injected_vectors_ranks_by_their_cosine(tiny_data):
    from karma_fast.model.id_vectors import id_vectors
    from karma_fast.recipes.ra_rec import Config

    requests = make_requests(tiny_data, DataSet("tiny", 7, "last", 12, 1), "test")
    ready = make_id_row(Config(id_dim=8, max_history=2), tiny_data)
    found = ready.score(requests, False, False)
    e = np.nan_to_num(id_vectors(tiny_data.sequences, tiny_data.split, 40, 8))
    events = tiny_data.sequences.items
    for row, position in enumerate(requests.positions):
        u = 0.7 * e[events[position - 2]] + e[events[position - 1]]
        scores = e @ (u / np.linalg.norm(u))
        above = (scores > scores[events[position]] + 1e-5).sum()
        assert above <= found.expected[row] <= above + (np.abs(scores - scores[events[position]]) < 1e-5).sum() - 1
    assert not ROWS["ra-rec-ids"].seeded and ROWS["ra-rec"].parent == "ra-rec-ids" and ready.model is None


def test_time_that_is_over_ends_sasrec_after_an_epoch(tiny_data, monkeypatch, tmp_path):
    from karma_fast.baselines import SASRecConfig

    asked = []

    def train(data, config, *, seed, folder, go_on):
        asked.append((folder, config.dim, go_on(1)))
        return SimpleNamespace(facts={"done": False})

    monkeypatch.setattr("benchmarks.quality.rivals.train_sasrec", train)
    # None is what the program calls to be gone on with
    assert train_sasrec_row(tiny_data, SASRecConfig(dim=8), 0, tmp_path, end=0.0) is None
    assert train_sasrec_row(tiny_data, SASRecConfig(), 0, tmp_path, end=float("inf")) is None
    assert asked == [(tmp_path, 8, False), (tmp_path, SASRecConfig().dim, True)]


def test_requests_of_the_test_are_read_once(tiny, command, capsys, tmp_path):
    code, found = command("--rows", "A", "--set", "training.max_steps=1")
    assert code == 0 and found["records"][0]["readings"] == 1 and found["on"] == "test"
    with pytest.raises(SystemExit):
        command("--rows", "A", "--set", "training.max_steps=1")
    said = " ".join(capsys.readouterr().err.split())
    assert "are read once" in said and "--out FILE --runs FOLDER" in said
    again = command("--rows", "A", "--set", "training.max_steps=1", "--resume")[1]
    assert again["records"] == found["records"]
    read = command("--rows", "A", "--set", "training.max_steps=1", "--again")[1]["records"][0]
    assert read["readings"] == 2 and read["metrics"] == found["records"][0]["metrics"]
    with pytest.raises(SystemExit):  # a table has one setting
        command("--rows", "B", "--set", "training.max_steps=2")
    assert "give --out" in capsys.readouterr().err
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found | {"machine": found["machine"] | {"torch": "1.0"}}))
    with pytest.raises(SystemExit):  # and one machine with its versions
        command("--rows", "B", "--set", "training.max_steps=1")
    assert "its machine is" in capsys.readouterr().err


def test_another_reading_leaves_no_comparison_with_the_one_before(tiny, command, tmp_path):
    found = command("--rows", "popularity,A,C", "--set", "training.max_steps=1")[1]["comparisons"]
    assert {"A, masked"} < set(found["popularity"]) and {"A, masked"} < set(found["C"])
    # where the ranks of the other rows do not lie
    found = command("--rows", "A", "--set", "training.max_steps=1", "--again", "--runs", str(tmp_path / "other"))[1]
    assert set(found["comparisons"]) == {"popularity", "C"}
    assert not any(name.startswith("A, ") for entries in found["comparisons"].values() for name in entries)


def test_settings_are_tried_on_validation_and_kept_apart(tiny, tiny_data, command, tmp_path):
    for weight in ("0.1", "0.9"):
        changes = ("--set", f"model.decode_weight={weight}", "--set", "training.max_steps=1")
        code, found = command("--rows", "C", "--on", "valid", *changes, out="valid.json")
        assert code == 0
    assert [r["changes"]["model.decode_weight"] for r in found["records"]] == ["0.1", "0.9"]
    assert found["on"] == "valid" and not found["comparisons"]
    no_ids = ("--set", "model.id_dim=0", "--set", "training.max_steps=1", "--on", "valid")
    assert command("--rows", "no-llm", *no_ids, out="valid.json")[0] == 0  # RA-Rec could not do without
    with pytest.raises(SystemExit):
        command("--rows", "no-llm,ra-rec", *no_ids, out="other.json")
    # what was trained to be tried is not trained again for the test
    before = sorted((tmp_path / "runs").rglob("log.jsonl"))
    times = [path.stat().st_mtime_ns for path in before]
    code, tested = command("--rows", "C", *changes, "--resume")
    assert code == 0 and tested["settings"]["model"]["decode_weight"] == 0.9
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("log.jsonl"))] == times
    assert tested["records"][0]["changes"] == {} and tested["records"][0]["readings"] == 1


def test_metrics_are_those_of_the_product(tiny, tiny_data, command, tmp_path):
    found = command("--rows", "A", "--set", "training.max_steps=1")[1]["records"][0]
    model = made("A", tiny, tiny_data, tmp_path)
    from safetensors.torch import load_file

    weights = next((tmp_path / "runs").rglob("trained/model.safetensors"))
    model.load_state_dict(load_file(weights), strict=False)
    for variant, masked in (("masked", True), ("unmasked", False)):
        expected = evaluate_model(model.eval(), tiny_data, tiny_data.split.test, (10, 50, 200), mask_seen=masked)
        for name, value in found["metrics"][variant]["all"].items():
            assert value == pytest.approx(expected[name], abs=1e-6), name


def test_every_kind_of_row_runs_and_is_compared(tiny, command, monkeypatch):
    from karma_fast.baselines import SASRecConfig

    monkeypatch.setattr(SASRecConfig, "epochs", 1)
    monkeypatch.setattr(SASRecConfig.__init__, "__defaults__", tuple(
        1 if f.name == "epochs" else f.default for f in dataclasses.fields(SASRecConfig)))
    names = [row.name for row in ROWS.values() if not row.queries]
    code, found = command("--rows", ",".join(names), "--set", "training.max_steps=1")
    assert code == 0 and [r["row"] for r in found["records"]] == names
    for record in found["records"]:
        assert {"masked", "unmasked"} == set(record["metrics"])
        assert record["metrics"]["masked"]["all"]["HR@200"] == 1  # 40 items
    assert set(found["comparisons"]) == set(names) and "mix, masked" in found["comparisons"]["A"]
    assert "D, masked" in found["comparisons"]["G"] and "A, masked" in found["comparisons"]["G"]
    assert set(next(r for r in found["records"] if r["row"] == "mix")) >= {"weights, masked", "weights, unmasked"}
    sizes = found["requests"]
    assert sizes["all"] == 30 and "history of at most 7" in sizes


def test_queries_are_read_and_left_out_by_the_same_model(tiny, tiny_dataset, command, tmp_path, monkeypatch):
    with open(tiny_dataset.items, newline="") as titles, open(tiny_dataset.interactions, newline="") as clicks:
        items = {row["item_id"]: row for row in csv.DictReader(titles)}
        rows = list(csv.DictReader(clicks))
    with open(tmp_path / "asked.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "simulated_query"])
        writer.writeheader()
        writer.writerows(row | {"simulated_query": items[row["item_id"]]["title"].lower()} for row in rows)
    asked = dataclasses.replace(tiny_dataset, interactions=str(tmp_path / "asked.csv"), query_column="simulated_query")

    class Asked(DataSet):
        def config(self, source=None):
            return asked

    monkeypatch.setitem(DATA, "tiny", Asked("tiny", 7, "last", 12, 1, queries=True))
    code, found = command("--rows", "popularity,query,query-mix,A")
    assert code == 0
    by_row = {r["row"]: {v: m["all"]["HR@10"] for v, m in r["metrics"].items()} for r in found["records"]}
    alone = "masked" + HISTORY_ONLY
    assert set(by_row["A"]) == {"masked", "unmasked", alone, "unmasked" + HISTORY_ONLY}
    assert by_row["popularity"]["masked"] == by_row["popularity"][alone]
    assert by_row["query"]["unmasked"] == 1 == by_row["query-mix"]["unmasked"]  # the query is the title
    assert by_row["query-mix"][alone] < 1 and by_row["query"][alone] < 0.5
    metrics = found["records"][3]["metrics"]
    assert metrics["masked"]["all"]["MRR"] != metrics[alone]["all"]["MRR"]
    assert found["records"][2]["weight of the query, masked"] > 0


def test_time_that_is_over_leaves_the_rest_to_the_next_sitting(tiny, command, capsys):
    code, found = command("--rows", "popularity,A", "--minutes", "0")
    assert code == 3 and not found
    assert "2 of 2 left" in capsys.readouterr().out
    code, found = command("--rows", "popularity,A", "--resume")
    assert code == 0 and len(found["records"]) == 2
    commands = found["commands"]
    assert commands == ["python -m benchmarks.quality --data tiny --rows popularity,A --seeds 0 --size reduced"]


def test_diagnostics_join_a_record_without_another_reading(tiny, command, monkeypatch):
    import karma_fast.diagnostics as diagnostics

    asked = []

    def diagnose(model, data, **options):
        asked.append((model.training, options["split"], options["untuned"]))
        return {"states": {"trained": {"u_effective_rank": {"value": 3.0}}}, "requests": 30, "attention_requests": 1,
                "split": "test", "seed": 0, "compared": "", "decoder": "", "texts": "", "seconds": 0.0,
                "maps": {"labels": ["a"], "trained": {"layer 1": [[0.12345]]}}}

    monkeypatch.setattr(diagnostics, "diagnose", diagnose)
    before = command("--rows", "popularity,A")[1]["records"]
    code, found = command("--rows", "popularity,A", "--diagnose")
    assert code == 0 and asked == [(False, "test", True)]
    after = found["records"][1]
    assert after.pop("diagnostics")["states"]["trained"]["u_effective_rank"]["value"] == 3.0
    assert after.pop("attention") == {"labels": ["a"], "trained": {"layer 1": [[0.123]]}}
    assert [found["records"][0], after] == before
    assert [command.endswith(" --diagnose") for command in found["commands"]] == [False, True]
    command("--rows", "popularity,A", "--diagnose")
    assert len(asked) == 1


def test_a_run_is_not_gone_on_with_under_other_settings(tiny, tmp_path):
    config = config_of(ROWS["A"], tiny, 0, tmp_path)
    training.keep_settings(config, tmp_path / "run")
    training.keep_settings(config, tmp_path / "run")
    other = config_of(ROWS["A"], tiny, 1, tmp_path)
    with pytest.raises(ConfigError, match="training.seed: .* started with 0 and cannot go on with 1"):
        training.keep_settings(other, tmp_path / "run")


# ---- protocol ------------------------------------------------------------------------------------------------------

def test_parts_of_the_requests(tiny_data):
    spec = DataSet("tiny", 7, "all", 12, 2)
    requests = make_requests(tiny_data, spec, "test")
    assert np.array_equal(requests.positions, np.sort(tiny_data.split.test))
    sequences = tiny_data.sequences
    sizes = np.diff(sequences.indptr)
    assert requests.sizes()["history of at most 7"] == int((sizes - 1 <= 7).sum())
    train = np.concatenate([sequences.items[a:b] for a, b in
                            zip(sequences.indptr[:-1], tiny_data.split.train_end, strict=True)])
    counts = np.bincount(train, minlength=40)[requests.targets]
    assert requests.sizes()["target without a training event"] == int((counts == 0).sum())
    assert requests.sizes()["target with at most 5 training events"] == int((counts <= 5).sum())
    ranks = Ranks(np.arange(30), np.zeros(30, np.int64), np.full(30, 40))
    found = requests.metrics(ranks)
    assert found["all"]["HR@10"] == pytest.approx(gains(ranks.expected, "HR@10").mean())
    keep = requests.parts["history of at most 7"]
    assert found["history of at most 7"]["NDCG@10"] == pytest.approx(gains(ranks.expected[keep], "NDCG@10").mean())


def test_comparison_pairs_requests_and_seeds(tmp_path):
    random, files, records = np.random.default_rng(0), {}, []
    ranks = {("A", 0): random.integers(0, 40, 50), ("A", 1): random.integers(0, 40, 50),
             ("C", 0): random.integers(0, 40, 50), ("C", 1): random.integers(0, 40, 50),
             ("C", 2): random.integers(0, 40, 50), ("popularity", 0): random.integers(0, 40, 50),
             ("mix", 0): random.integers(0, 40, 50)}
    for (row, seed), expected in ranks.items():
        files[row, seed] = tmp_path / f"{row}-{seed}.npz"
        np.savez(files[row, seed], positions=np.arange(50), masked=expected.astype(float))
        records.append({"row": row, "seed": seed})
    some = np.arange(50) < 20
    parts = {"all": np.ones(50, dtype=bool), "some": some, "none": np.zeros(50, dtype=bool)}
    found = compare(records, files, ["masked"], parts)
    hits = {key: (value < 10).astype(float) for key, value in ranks.items()}
    difference = (hits["C", 0] - hits["A", 0] + hits["C", 1] - hits["A", 1]) / 2
    own = found["C"]["A, masked"]
    assert own["seeds"] == 2 and own["HR@10"]["difference"] == pytest.approx(difference.mean())
    assert own["HR@10"]["standard_error"] == pytest.approx(difference.std(ddof=1) / 50**0.5)
    assert own["HR@10"]["by_seed"][1] == pytest.approx((hits["C", 1] - hits["A", 1]).mean())
    seeds = [hits["C", seed] - hits["mix", 0] for seed in range(3)]
    assert found["C"]["mix, masked"]["HR@10"]["difference"] == pytest.approx(np.mean(seeds))
    assert found["C"]["mix, masked"]["HR@10"]["by_seed"] == pytest.approx([x.mean() for x in seeds])
    ours = found["C"]["A, masked, some"]["HR@10"]
    assert ours["difference"] == pytest.approx(difference[some].mean()) and ours["by_seed"][0] == pytest.approx(
        (hits["C", 0] - hits["A", 0])[some].mean())
    assert ours["standard_error"] == pytest.approx(difference[some].std(ddof=1) / 20**0.5)
    assert set(found["C"]) == {"mix, masked", "mix, masked, some", "A, masked", "A, masked, some"}
    plain = hits["popularity", 0] - (hits["A", 0] + hits["A", 1]) / 2
    assert found["popularity"]["A, masked"]["HR@10"]["difference"] == pytest.approx(plain.mean())
    np.savez(files["C", 0], positions=np.arange(1, 51), masked=np.zeros(50))
    with pytest.raises(ConfigError, match="different requests"):
        compare(records, files, ["masked"], parts)


def test_ranks_count_only_where_they_give_what_the_record_says(tmp_path):
    ranks = np.arange(50.0)
    metrics = {"masked": {"all": {metric: float(gains(ranks, metric).mean()) for metric in COMPARED}}}
    records = [{"row": row, "seed": 0, "metrics": metrics} for row in "ABC"]
    for row, found in {"A": ranks, "B": np.where(ranks == 49, 45, ranks)}.items():
        np.savez(tmp_path / f"{row}-0.npz", positions=np.arange(50), masked=found)
    assert usable_ranks(records, lambda row, seed: tmp_path / f"{row}-{seed}.npz") == {("A", 0): tmp_path / "A-0.npz"}


def test_a_comparison_over_more_seeds_stays():
    known = {"C": {"A, masked": {"seeds": 3, "HR@10": 1}, "mix, masked": {"seeds": 1, "HR@10": 1}}}
    merge(known, {"C": {"A, masked": {"seeds": 1, "HR@10": 2}, "mix, masked": {"seeds": 1, "HR@10": 2}},
                  "B": {"A, masked": {"seeds": 1, "HR@10": 2}}})
    assert known == {"C": {"A, masked": {"seeds": 3, "HR@10": 1}, "mix, masked": {"seeds": 1, "HR@10": 2}},
                     "B": {"A, masked": {"seeds": 1, "HR@10": 2}}}


def test_a_retrained_row_is_compared_only_if_it_came_out_the_same(tiny, command, tmp_path):
    settings = ("--set", "training.max_steps=1")
    command("--rows", "A", *settings)
    command("--rows", "A", *settings, out="scratch.json", runs="other")  # as on a machine without the ranks
    assert "A, masked" in command("--rows", "C", *settings, runs="other")[1]["comparisons"]["C"]
    path = next((tmp_path / "other").rglob("A-0*/ranks-test.npz"))
    with np.load(path) as found:
        changed = dict(found)
    changed["masked"][0] += 1
    np.savez(path, **changed)
    assert "A, masked" not in command("--rows", "B", *settings, runs="other")[1]["comparisons"].get("B", {})


def test_settings_of_sasrec_are_tried_on_validation_alone(tiny, command, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(main, "train_sasrec_row", lambda data, config, *rest: seen.append(config))
    tried = ("--set", "sasrec.dim=32", "--set", "sasrec.dropout=0.2")
    assert command("--rows", "sasrec", "--on", "valid", *tried)[0] == 3  # nothing came of it
    assert seen == [SASRecConfig(dim=32, dropout=0.2)]
    for words, said in ((("--rows", "sasrec", *tried), "--on valid"), (("--rows", "A", *tried), "row sasrec is not"),
                        (("--rows", "sasrec", "--on", "valid", "--set", "sasrec.width=3"), "sasrec.width")):
        with pytest.raises(SystemExit):
            command(*words, out="other.json")
        assert said in capsys.readouterr().err
    assert len(seen) == 1


def test_lists_of_numbers_take_one_line_of_a_results_file():
    from benchmarks.quality.results import to_json

    values = {"map": [[0.5, 1], [-1e-7, 2e20]], "labels": ["1", "2, 3"], "none": []}
    text = to_json(values)
    assert json.loads(text) == values
    assert "\n  [0.5, 1],\n" in text and "\n  [-1e-07, 2e+20]\n" in text and '  "1",\n' in text


def test_the_state_before_tuning_is_measured_where_it_can_be_had():
    from benchmarks.quality.__main__ import has_untuned

    adapted = SimpleNamespace(backbone=SimpleNamespace(disable_adapter=None))
    assert has_untuned(adapted)
    assert not has_untuned(SimpleNamespace(backbone=object(), config=SimpleNamespace(tuning="full", backbone=None)))
