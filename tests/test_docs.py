"""The pages: settings exist and have these defaults, configs can be read, links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from karma_fast.config import DataConfig, KarmaConfig, RunConfig
from karma_fast.recipes.ra_rec import Config as RaRecConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
NO_DEFAULT = ("none", "found by name", "all of text", "input width")  # the page's words for None and ""


def settings_of_the_page() -> dict[str, dict[str, str]]:
    """section -> setting -> its default as the page has it."""
    found: dict[str, dict[str, str]] = {}
    section = ""
    for line in (ROOT / "docs" / "settings.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| `"):
            names, default = (cell.strip() for cell in line.strip("|").split(" | ")[:2])
            names = re.findall(r"`(\w+)`", names)
            values = default.split(", ") if len(names) > 1 and default.count(", ") == len(names) - 1 else (
                [default] * len(names))
            found.setdefault(section, {}).update(zip(names, values, strict=True))
    return found


@pytest.mark.parametrize("section, classes", [("data", [DataConfig]), ("model", [KarmaConfig, RaRecConfig])])
def test_the_page_has_every_setting_with_its_default(section, classes):
    page = settings_of_the_page()[section]
    fields = {f.name: [] for kind in classes for f in dataclasses.fields(kind)}
    for kind in classes:
        for f in dataclasses.fields(kind):
            fields[f.name].append(f.default)
    assert set(page) == set(fields)
    for name, defaults in fields.items():
        for default in defaults:
            if default in (None, ""):
                assert page[name].startswith(NO_DEFAULT), name
            elif default == 1 / 0.07:
                assert page[name].startswith("1/0.07"), name
            else:
                shown = str(default).lower() if isinstance(default, bool) else (
                    f"{default:g}" if isinstance(default, float) else str(default))
                assert re.search(rf"(^|[ (]){re.escape(shown)}($|[ )])", page[name]), (name, shown, page[name])


def test_the_page_has_the_training_settings_that_differ_from_transformers():
    from transformers import TrainingArguments

    from karma_fast import KarmaTrainingArguments

    theirs = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    own = {f.name: f.default for f in dataclasses.fields(KarmaTrainingArguments)}
    page = settings_of_the_page()["training"]
    assert set(page) <= set(own)
    inner = {"save_strategy", "remove_unused_columns", "ddp_find_unused_parameters", "logging_nan_inf_filter",
             "report_to", "metric_for_best_model", "greater_is_better"}
    assert {name for name in own if own[name] != theirs.get(name, object())} - inner <= set(page)
    for name in ("learning_rate", "projection_learning_rate", "warmup_steps", "weight_decay", "eval_users",
                 "save_steps", "save_total_limit", "logging_steps", "share_steps", "max_grad_norm",
                 "per_device_train_batch_size"):
        assert float(page[name]) == own[name], name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configs_of_a_page_can_be_read(page):
    from karma_fast import KarmaTrainingArguments

    known = {f.name for f in dataclasses.fields(KarmaTrainingArguments)}
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        config = RunConfig.from_dict(yaml.safe_load(block))
        assert set(config.training) <= known, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    """Files by name, headings by GitHub's rule for their anchors."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in anchors, target
