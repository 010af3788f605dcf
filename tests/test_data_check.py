"""The report on the data: right counts, and all problems at once."""

import json

import numpy as np
import pytest

from karma_fast.config import DataConfig, RunConfig
from karma_fast.data import DataError, check, load_dataset, loading
from karma_fast.run import checked_data


def files(tmp_path, clicks, items=None, **settings):
    (tmp_path / "clicks.csv").write_text(clicks)
    if items is not None:
        (tmp_path / "items.csv").write_text(items)
        settings["items"] = str(tmp_path / "items.csv")
    return DataConfig(interactions=str(tmp_path / "clicks.csv"), **settings)


CLICKS = ("user,item,ts,clicked\n" "u,a,1,1\nu,a,1,1\nu,b,2,0\nu,c,2,1\nu,d,3,1\nu,b,3,1\n" "v,a,5,1\nw,b,1,0\n")
ITEMS = "id,title\na,Alpha\nb,Beta\nc,\nd,Delta\ne,Epsilon\n"


def test_counts(tmp_path):
    report = check(files(tmp_path, CLICKS, ITEMS, name="mine"))
    assert report.ok and report.problems == []
    expected = {"users": 3, "items": 5, "rows": 8, "clicks": 6, "exposures without click": 2, "users kept": 1,
                "clicks kept": 4, "duplicate rows": 1, "rows with unknown items": 0, "equal-time neighbours": "33.3%",
                "longest text (characters)": 7, "items without text": 1, "time span": "1 to 5",
                "clicks per user": "min 4, 25% 4, median 4, 75% 4, 95% 4, max 4", "training events": 2,
                "validation targets": 1, "test targets": 1, "items never in training": 3,
                "test targets never in training": 1}
    assert {name: report.counts[name] for name in expected} == expected
    warnings = "\n".join(report.warnings)
    assert "1 items have no text, 'c' first" in warnings and "seeded shuffle" in warnings and "1 of 1 test" in warnings
    text = report.to_text()
    assert text.startswith("Data: mine\n") and text.endswith("This data can be trained on.") and text.isascii()
    assert json.loads(json.dumps(report.to_dict()))["counts"]["clicks"] == 6


def test_targets_that_were_chosen_before_are_counted_and_named(tmp_path):
    clicks = "user,item,ts\nu,a,1\nu,b,2\nu,c,3\nu,a,4\nv,a,1\nv,b,2\nv,c,3\n"
    report = check(files(tmp_path, clicks, ITEMS))
    assert report.ok and report.counts["test targets chosen before"] == 1
    assert "1 of 2 test targets" in "\n".join(report.warnings) and "--unmasked" in "\n".join(report.warnings)


def test_all_problems_at_once(tmp_path):
    clicks = "user,item,ts\nu,a,1\n,a,2\nu,b,x\nu,q,3\nu,z,4\nu,q,5\nu,a,9\nu,a,10\nu,a,11\n"
    report = check(files(tmp_path, clicks, "id,title\na,\na,B\nb,\n"))
    assert not report.ok and len(report.problems) == 4
    text = report.to_text()
    assert "items.csv, line 3, column id: item 'a' is there already (line 2)" in text
    assert "clicks.csv, line 3, column user: blank" in text
    assert "clicks.csv, line 4, column ts: got 'x'" in text
    assert "clicks.csv, line 5, column item: item 'q' is not in" in text
    assert "(3 rows name 2 items that are not there, also 'z' (line 6))" in text
    assert "no item has a text" in text
    assert text.endswith("cannot be trained on until the problems are solved.")
    assert report.counts["rows"] == 4 and report.counts["rows with unknown items"] == 3


def test_unreadable_item_table_does_not_hide_the_rest(tmp_path):
    report = check(files(tmp_path, "user,item,ts\nu,a,soon\n", "key,title\na,A\n"))
    assert ["no item id column" in report.problems[0], "got 'soon'" in report.problems[1]] == [True, True]
    assert not any("no item table" in note for note in report.notes)
    assert not any("has a text" in warning for warning in report.warnings)


@pytest.mark.parametrize(("settings", "problem", "warning"), [
    ({"min_user_events": 9}, "no user has 9 clicks or more; lower data.min_user_events", ""),
    ({"split": "by_time", "valid_time": 0, "test_time": 3}, "no event lies before 0, .*they span 1 to 3", ""),
    ({"split": "by_time", "valid_time": 2, "test_time": 3}, "no user has 3 events before 2, .*lower data.min_", ""),
    ({"split": "by_time", "valid_time": 8, "test_time": 9},
     "no test target, so .*; move data.valid_time and data.test_time", "no validation target; move data.valid_time"),
    ({"split": "by_time", "valid_time": 2, "test_time": 3, "min_user_events": 1},
     "no user has two events in the training part, .*; choose a later data.valid_time", ""),
    ({"min_user_events": 1}, "", ""),
])
def test_splits_that_do_not_fit(tmp_path, settings, problem, warning):
    import re

    report = check(files(tmp_path, CLICKS, ITEMS, **settings))
    assert report.ok == (not problem) and re.search(problem, "\n".join(report.problems))
    assert warning in "\n".join(report.warnings)


def test_a_user_who_is_too_short_before_the_split_asks_but_does_not_train(tmp_path):
    clicks = "user,item,ts\nu,a,1\nu,b,2\nu,c,3\nu,a,9\nv,d,1\nv,b,8\n"
    config = files(tmp_path, clicks, split="by_time", valid_time=5, test_time=7)
    before = check(config)
    (tmp_path / "clicks.csv").write_text(clicks + "v,a,9\n")  # now v has 3 clicks
    after = check(config)
    assert before.counts["training events"] == after.counts["training events"] == 3
    assert (before.counts["test targets"], after.counts["test targets"]) == (1, 3)
    assert any("1 users with fewer than 3 clicks before data.valid_time do not train" in n for n in after.notes)


def test_what_training_refuses_is_said(tmp_path):
    clicks = "user,item,ts\n" + "".join(f"u,{item},{ts}\n" for ts, item in enumerate("abc"))
    report = check(files(tmp_path, clicks))
    assert report.problems == ["no user has two events in the training part, so there is nothing to train on; "
                               "leave_one_out needs users with 4 or more clicks"]
    report = check(files(tmp_path, clicks + "u,d,8\nv,a,1\nv,b,2\nv,c,3\n"))  # v has no window
    assert report.ok and any("recipe karma will not train on this: all training windows are of one user" in warning
                             and "set model.act_weight 0" in warning for warning in report.warnings)
    report = check(files(tmp_path, clicks + "u,d,8\nv,a,1\nv,b,2\nv,c,3\nv,d,4\n"))
    assert report.ok and not any("of one user" in warning for warning in report.warnings)


def test_ids_that_read_like_missing_ones(tmp_path):
    clicks = "user,item,ts\n" + "".join(f"{user},{item},{ts}\n" for user in ("u", "NaN", "nana")
                                        for ts, item in enumerate(("a", "None", "b", "c")))
    report = check(files(tmp_path, clicks))
    named = [warning.partition(":")[0] for warning in report.warnings[:2]]
    assert report.ok and named == ["user 'NaN'", "item 'None'"]
    assert "astype(str) does; if so, fill the ids in or remove the rows" in report.warnings[0]


def test_without_item_table_the_report_says_what_is_lost(tmp_path):
    report = check(files(tmp_path, CLICKS))
    assert report.ok and any("text losses cannot be trained" in note for note in report.notes)


def test_no_file_at_all():
    report = check(DataConfig(name="movies"))
    assert not report.ok and "no known data set is called 'movies'" in report.problems[0]


def test_a_run_checks_and_loads_its_data_in_one_reading(tmp_path, monkeypatch):
    config = RunConfig(data=files(tmp_path, CLICKS, ITEMS, name="mine"))
    expected, read, load = load_dataset(config.data), [], loading.load
    monkeypatch.setattr(loading, "load", lambda *args: read.append(args) or load(*args))
    data = checked_data(config, lambda text: None)
    assert len(read) == 1
    assert (data.name, data.notes, data.items.texts) == (expected.name, expected.notes, expected.items.texts)
    for name in ("items", "times", "indptr"):
        np.testing.assert_array_equal(getattr(data.sequences, name), getattr(expected.sequences, name))
    for name in ("train_end", "valid", "test"):
        np.testing.assert_array_equal(getattr(data.split, name), getattr(expected.split, name))
    said = []
    with pytest.raises(DataError, match="2 cells"):
        checked_data(RunConfig(data=files(tmp_path, CLICKS[:40])), said.append)
    assert "cannot be trained on" in said[0]
