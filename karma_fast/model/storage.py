"""A trained model as a folder: config.json, model.safetensors, items.safetensors, items.jsonl, README.md."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config import ConfigError, ModelConfig
from ..data.schema import Items
from ..recipes import RECIPES, recipe
from ..retrieval import remove_index

if TYPE_CHECKING:
    from .recommender import Recommender

FORMAT = 1  # raised when a folder of an older version can no longer be read
FILES = ("config.json", "model.safetensors", "items.safetensors", "items.jsonl", "README.md")
ID_FOLDER = "id_model"  # in it: the ID model of a recipe that reads vectors of one


def part_of(path: Path) -> Path:
    """Where a file is written before it takes its place; another process, which may write the same, has its own."""
    return path.with_name(f"{path.name}.part-{os.getpid()}")


def write_atomically(path: Path, text: str) -> None:
    part = part_of(path)
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    part = part_of(path)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata={"format": "pt"})
    part.replace(path)


def versions() -> dict[str, str]:
    """Of Python and the packages that results depend on; "none" for what is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("karma-fast", "torch", "transformers", "peft", "bitsandbytes", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def save_model(model: Recommender, folder: Path, facts: dict[str, Any] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_index(folder)  # of another model's embeddings
    model.save_weights(folder)
    save_tensors(model.item_tensors(), folder / "items.safetensors")
    lines = [json.dumps({"id": str(i), "title": title, "text": text}, ensure_ascii=False)
             for i, title, text in zip(model.items.ids, model.items.titles, model.items.texts, strict=True)]
    write_atomically(folder / "items.jsonl", "\n".join(lines) + "\n")
    write_atomically(folder / "README.md", model_card(model, facts or {}))
    # last, as a folder without it is not a model
    values = {"format": FORMAT, model.config.recipe: model.config.to_dict(), "versions": versions(),
              "facts": facts or {}}
    write_atomically(folder / "config.json", json.dumps(values, indent=2) + "\n")


def remove_model(folder: Path) -> None:
    """Removes what ``save_pretrained`` and `ItemIndex.save` wrote, if ``folder`` holds a saved model; nothing else."""
    try:
        read_config(folder)
    except ConfigError:
        return
    for name in FILES:  # first the one without which the rest is no model
        for path in (folder / name, *folder.glob(f"{name}.part-*")):
            path.unlink(missing_ok=True)
    remove_index(folder)
    shutil.rmtree(folder / ID_FOLDER, ignore_errors=True)
    remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def read_config(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """(recipe, config.json) of a saved model; ConfigError if the folder does not hold one."""
    try:
        values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return next(name for name in RECIPES if name in values), values
    except (OSError, json.JSONDecodeError, StopIteration, TypeError):
        raise ConfigError(f"{folder}: holds no saved model (config.json with a section {' or '.join(RECIPES)} is "
                          "missing); give a folder written by save_pretrained, such as runs/demo/model") from None


def recipe_of(folder: str | Path) -> str:
    """The recipe of a saved model; ConfigError if the folder does not hold one."""
    return read_config(folder)[0]


def load_parts(folder: str | Path, name: str) -> tuple[ModelConfig, Items, dict[str, torch.Tensor],
                                                       dict[str, torch.Tensor]]:
    """(config, items, item tensors, weights) of a saved model of the recipe ``name``; else ConfigError."""
    from safetensors.torch import load_file

    folder = Path(folder)
    found, values = read_config(folder)
    if found != name:
        raise ConfigError(f"{folder}: holds a model of the recipe {found}, not {name}; "
                          "karma_fast.recipes.load_model reads any")
    if values.get("format") != FORMAT:
        raise ConfigError(f"{folder}: has format {values.get('format')}, this version reads {FORMAT}; save the model "
                          "again")
    with open(folder / "items.jsonl", encoding="utf-8") as file:  # str.splitlines also cuts at U+2028 and others
        rows = [json.loads(line) for line in file]
    items = Items(ids=np.array([r["id"] for r in rows], dtype=object), texts=[r["text"] for r in rows],
                  titles=[r["title"] for r in rows])
    return (recipe(name).Config.from_dict(values[name]), items, load_file(folder / "items.safetensors"),
            load_file(folder / "model.safetensors"))


def model_card(model: Recommender, facts: dict[str, Any]) -> str:
    """Markdown: what it is, data, metrics with protocol, settings, versions."""
    config, of = model.config, recipe(model.config.recipe)
    backbone = Path(config.backbone).name if Path(config.backbone).is_dir() else config.backbone  # no one's folders
    front = ["---", "library_name: karma_fast", f"base_model: {backbone}", "tags: [recommendation, retrieval]",
             "---"]
    lines = [*front, "", f"# {of.NAME} next-interest model", "",
             f"An embedding of {model.width} numbers for what a user wants next, made by {backbone} "
             f"({config.quantization}, {config.tuning}) over {len(model.items):,} items, after the method of "
             f"{of.NAME} ({of.PAPER}). Trained with karma_fast.", "",
             "```python", "from karma_fast.recipes import load_model", "",
             'model = load_model("path/to/this/folder")',
             "u = model.encode_users([[0, 1, 2]])  # catalogue indices, oldest first",
             "best = (u @ model.encode_items().T)[0].topk(5).indices",
             *(["print(model.decode(u))"] if model.decode_projection is not None else []), "```", ""]
    if "rows" in facts:
        lines += ["## Measured", "", facts.get("protocol", ""), ""]
        names = list(next(iter(facts["rows"].values())))
        lines += ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        lines += [f"| {row} | " + " | ".join(f"{values[n]:.4f}" for n in names) + " |"
                  for row, values in facts["rows"].items()]
        lines.append("")
    rest = {k: v for k, v in facts.items() if k not in ("rows", "protocol")}
    if rest:
        lines += ["## Facts", "", *(f"- {name}: {value}" for name, value in rest.items()), ""]
    lines += ["## Settings", "", "```json", json.dumps(config.to_dict() | {"backbone": backbone}, indent=2), "```", "",
              "## Versions", "",
              *(f"- {name} {value}" for name, value in versions().items()), ""]
    return "\n".join(lines)
