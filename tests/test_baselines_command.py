"""`karma-fast baselines`: its table, its file, its settings."""

import json
import sys

import pytest
import yaml

from karma_fast.cli import main

ROWS = ["popularity", "item-kNN", "title TF-IDF", "transitions", "tuned mix", "SASRec"]
QUICK = ("--sasrec.dim", "8", "--sasrec.epochs", "2", "--sasrec.max_history=6")


@pytest.fixture
def shop(tmp_path, monkeypatch, tiny_dataset):
    """A folder with shop.yaml, whose model and training sections are nothing to the command."""
    monkeypatch.chdir(tmp_path)
    data = {name: getattr(tiny_dataset, name) for name in ("interactions", "items", "name")}
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump({"data": data, "training": {"max_steps": 3}}), encoding="utf-8")
    return tmp_path


def test_table_and_file(shop, capsys):
    assert main(["baselines", "shop.yaml", *QUICK, "--seeds", "0,1", "--output", "out/b.json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads((shop / "out" / "b.json").read_text(encoding="utf-8"))
    assert list(found["rows"]) == ROWS and not err
    lines = out.splitlines()
    assert [line[:16].strip() for line in lines[1:7]] == ROWS
    for line, row in zip(lines[1:7], found["rows"].values(), strict=True):
        assert line[16:].split()[2] == f"{row['HR@10']:.4f}"
    assert found["protocol"] in out and "30 requests ranked against all 40 items, seen items left out" in out
    assert "training part alone" in found["protocol"] and "leave one out" in found["protocol"]

    mix = found["mix"]
    assert mix["tuned"] and set(mix["weights"]) == {"text", "next", "pop", "knn_decay", "text_decay"}
    assert mix["validation_requests"] == 30 and f"knn_decay {mix['weights']['knn_decay']:g}" in out
    one, two = found["sasrec"]["runs"]
    assert (one["seed"], two["seed"], one["epochs"]) == (0, 1, 2) and found["sasrec"]["config"]["dim"] == 8
    mean = (one["row"]["MRR"] + two["row"]["MRR"]) / 2
    assert found["rows"]["SASRec"]["MRR"] == pytest.approx(mean) and one["row"]["MRR"] != two["row"]["MRR"]
    spread = abs(one["row"]["MRR"] - two["row"]["MRR"]) / 2 ** 0.5
    assert found["sasrec"]["standard_deviation"]["MRR"] == pytest.approx(spread)
    assert found["requests"] == 30 and found["masked"] and found["versions"]["torch"] and found["device"]


def test_rows_are_those_of_the_other_commands(shop, tiny_data):
    from karma_fast.baselines import baseline_rows

    assert main(["baselines", "shop.yaml", "--no-sasrec", "--output", "b.json"]) == 0
    found = json.loads((shop / "b.json").read_text(encoding="utf-8"))
    assert list(found["rows"]) == ROWS[:-1] and "sasrec" not in found
    for name, row in baseline_rows(tiny_data, tiny_data.split.test).items():
        assert found["rows"][name] == pytest.approx(row)


def test_unmasked_and_fewer_requests(shop, capsys):
    assert main(["baselines", "shop.yaml", "--unmasked", "--no-sasrec", "--test-users", "7", "--seed", "3",
                 "--output", "b.json"]) == 0
    found = json.loads((shop / "b.json").read_text(encoding="utf-8"))
    assert "7 requests, drawn by seed from 30, ranked" in found["protocol"] and found["drawn_from"] == 30
    assert "seen items kept" in capsys.readouterr().out
    assert not found["masked"] and found["seed"] == 3 and found["requests"] == 7


def test_at_most_so_many_requests_are_ranked_unless_all_are_asked_for(shop, capsys, monkeypatch):
    monkeypatch.setattr("karma_fast.commands.common.MOST_REQUESTS", 12)
    for words, ranked in (((), "12 requests, drawn by seed from 30,"), (["--test-users", "0"], "30 requests ranked")):
        assert main(["baselines", "shop.yaml", "--no-sasrec", *words]) == 0
        out, err = capsys.readouterr()
        assert ranked in out and ("12 of 30 requests are drawn" in err) == (not words)


def test_the_same_requests_are_drawn_whatever_the_seed(shop, capsys):
    rows = []
    for seed in ("0", "5"):
        assert main(["baselines", "shop.yaml", "--no-sasrec", "--test-users", "9", "--seed", seed, "--output",
                     "s.json"]) == 0
        rows.append(json.loads((shop / "s.json").read_text(encoding="utf-8"))["rows"]["popularity"])
    assert rows[0] == rows[1]


def test_bars_for_each_row_on_a_terminal(shop, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["baselines", "shop.yaml", *QUICK]) == 0
    err = capsys.readouterr().err
    assert all(f"{name}: 100%" in err for name in (*ROWS[:-1], "SASRec, seed 0", "ranking"))


def test_folder_keeps_what_was_trained(shop, capsys):
    runs = []
    for _ in range(2):
        assert main(["baselines", "shop.yaml", *QUICK, "--folder", "runs/sasrec", "--output", "b.json"]) == 0
        runs.append(json.loads((shop / "b.json").read_text(encoding="utf-8"))["sasrec"]["runs"])
    assert runs[0] == runs[1]  # the seconds too: nothing was trained again
    assert main(["baselines", "shop.yaml", "--sasrec.dim", "16", "--folder", "runs/sasrec"]) == 2
    assert "dim" in capsys.readouterr().err


def test_without_validation_targets_the_mix_is_not_tuned(shop, capsys):
    times = ["--split", "by_time", "--valid_time", "29000", "--test_time", "29001"]
    assert main(["baselines", "shop.yaml", "--no-sasrec", *times, "--output", "b.json"]) == 0
    found = json.loads((shop / "b.json").read_text(encoding="utf-8"))
    assert "mix, untuned" in found["rows"] and not found["mix"]["tuned"] and "not tuned" in capsys.readouterr().out


QUERY_ROWS = ["query TF-IDF", "query kNN", "query TF-IDF + tuned mix", "query kNN + query TF-IDF + tuned mix"]


def test_rows_that_read_queries(shop, tiny_searches, capsys, monkeypatch):
    from karma_fast.baselines import mix, tune_mix

    calls = []
    monkeypatch.setattr("karma_fast.baselines.tune_mix", lambda *args, **options: calls.append(1) or
                        tune_mix(*args, **options))
    fits, fit = [], mix.MixParts.fit
    monkeypatch.setattr(mix.MixParts, "fit", staticmethod(lambda data: fits.append(1) or fit(data)))
    words = ["baselines", "shop.yaml", "--interactions", tiny_searches.interactions, "--unmasked", "--no-sasrec"]
    assert main([*words, "--output", "b.json"]) == 0
    out = capsys.readouterr().out
    found = json.loads((shop / "b.json").read_text(encoding="utf-8"))
    assert list(found["rows"]) == ROWS[:-1] + QUERY_ROWS
    assert len(calls) == 1 and len(fits) == 2  # to tune, and to score
    for name in QUERY_ROWS:  # the query is the title
        assert found["rows"][name]["HR@1"] == (1 if name != "query kNN" else pytest.approx(29 / 30))
    query = found["query"]["query TF-IDF"]
    assert query["weight"] > 0 and query["tried"] == 6 and query["validation_requests"] == 30
    assert found["query"]["query kNN"]["weight"] == 0  # adds nothing to a NDCG@10 of 1
    assert f"query TF-IDF beside the tuned mix: {query['weight']:g} (NDCG@10 1.0000 on 30 validation" in out
    assert "query kNN beside the tuned mix and query TF-IDF: 0 (NDCG@10 1.0000 on 30 validation" in out
    assert "queries are read by the rows of query TF-IDF and query kNN alone; leave one out" in found["protocol"]
    assert main([*words[:-2], "--no-sasrec", "--query_column", "false", "--output", "b.json"]) == 0
    without = json.loads((shop / "b.json").read_text(encoding="utf-8"))
    assert list(without["rows"]) == ROWS[:-1] and "query" not in without and "quer" not in without["protocol"]
    assert "query" not in capsys.readouterr().out


def test_without_validation_targets_the_query_is_not_added_to_the_mix(shop, tiny_searches, capsys):
    assert main(["baselines", "shop.yaml", "--interactions", tiny_searches.interactions, "--no-sasrec", "--split",
                 "by_time", "--valid_time", "29000", "--test_time", "29001", "--output", "b.json"]) == 0
    found = json.loads((shop / "b.json").read_text(encoding="utf-8"))
    assert list(found["rows"]) == [*ROWS[:4], "mix, untuned", *QUERY_ROWS[:2]] and found["query"] == {}
    assert "queries are not added to the mix: no validation request has a query" in capsys.readouterr().out


def test_validation_requests_without_queries_choose_no_weight(shop, tiny_searches, capsys, monkeypatch):
    from karma_fast.data import Sequences

    # of the test requests drawn one has a query, of the 30 validation requests none
    monkeypatch.setattr(Sequences, "has_queries", lambda self, positions: len(positions) == 7)
    assert main(["baselines", "shop.yaml", "--interactions", tiny_searches.interactions, "--no-sasrec", "--test-users",
                 "7", "--output", "b.json"]) == 0
    assert json.loads((shop / "b.json").read_text(encoding="utf-8"))["query"] == {}
    assert "no validation request has a query" in capsys.readouterr().out


def test_wrong_settings(shop, capsys):
    for words, said in (("--sasrec.dims=8", "did you mean dim"), ("--intreactions=x", "mean interactions"),
                        ("--seeds=0,0", "different whole numbers"), ("--learning_rate=1", "no such setting")):
        assert main(["baselines", "shop.yaml", words]) == 2
        assert said in capsys.readouterr().err
    assert main(["baselines"]) == 2
    assert "--name ml-100k" in capsys.readouterr().err
