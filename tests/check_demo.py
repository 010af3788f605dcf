"""What `make demo` must have reached; run after it: `.venv/bin/python -m pytest tests/check_demo.py`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUN = ROOT / "runs" / "demo"


@pytest.fixture(scope="module")
def metrics():
    return json.loads((RUN / "metrics.json").read_text())


def test_training_pays(metrics):
    rows = {name: row["HR@10"] for name, row in metrics["rows"].items()}
    assert set(rows) == {"popularity", "item_knn", "title_tfidf", "karma_start", "karma"}
    assert rows["karma"] > 1.5 * rows["popularity"]
    # the start has learned from all pairs already: 60 steps with the language model must cost nothing
    error = 0.013  # standard error of 943 requests
    assert rows["karma"] > rows["item_knn"] + 2 * error and rows["karma"] > rows["karma_start"] - error
    assert metrics["rows"]["karma"]["HR@200"] > metrics["rows"]["item_knn"]["HR@200"] + 2 * error
    assert metrics["rows"]["karma"]["MRR"] > metrics["rows"]["item_knn"]["MRR"]
    assert 0.06 < rows["popularity"] < 0.1 and 0.14 < rows["item_knn"] < 0.2  # what this split is known to give


def test_embeddings_say_what_comes_next(metrics):
    found = metrics["decoding"]
    chance_error = (0.25 / found["users"]) ** 0.5
    assert found["share_better"] > 0.5 + 2 * chance_error
    assert found["matched_loss"] < found["shuffled_loss"]


def test_it_is_small(metrics):
    assert metrics["peak_rss_bytes"] < 6e9
    assert metrics["seconds"] < 900  # ten minutes on two quiet cores, with room for a busy machine


def test_files_are_there(metrics):
    for name in ("report.html", "report.md", "model/config.json", "model/model.safetensors", "model/README.md",
                 "log.jsonl", "examples.json", "config.yaml"):
        assert (RUN / name).stat().st_size > 0, name
    assert len(json.loads((RUN / "examples.json").read_text())) >= 3
    report = (RUN / "report.html").read_text()
    assert "http" not in re.sub(r"https?://(www\.w3\.org|doi\.org|arxiv\.org)\S*", "", report)


def test_readme_examples_run():
    """Every Python block of the README, as it stands, in one fresh interpreter each."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        assert done.stdout.strip(), block


def test_recommend_from_the_command_line():
    done = subprocess.run([sys.executable, "-m", "karma_fast", "recommend", str(RUN), "--history",
                           "Toy Story, Aladdin", "--explain", "--json", "--k", "5"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["items"]) == 5 and found["interest"]
    assert not {"Toy Story", "Aladdin"} & {row["title"] for row in found["items"]}
