"""A trained model as a folder: config.json, model.safetensors, items.safetensors, items.jsonl, README.md."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config import ConfigError, KarmaConfig
from ..data.schema import Items

if TYPE_CHECKING:
    from .karma import KarmaModel

FORMAT = 1  # raised when a folder of an older version can no longer be read


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
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


def save_model(model: KarmaModel, folder: Path, facts: dict[str, Any] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_weights(folder)
    save_tensors(model.features.tensors(), folder / "items.safetensors")
    lines = [json.dumps({"id": str(i), "title": title, "text": text}, ensure_ascii=False)
             for i, title, text in zip(model.items.ids, model.items.titles, model.items.texts, strict=True)]
    write_atomically(folder / "items.jsonl", "\n".join(lines) + "\n")
    write_atomically(folder / "README.md", model_card(model, facts or {}))
    # last, as a folder without it is not a model
    values = {"format": FORMAT, "karma": model.config.to_dict(), "versions": versions(), "facts": facts or {}}
    write_atomically(folder / "config.json", json.dumps(values, indent=2) + "\n")


def load_parts(folder: str | Path) -> tuple[KarmaConfig, Items, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(config, items, feature tensors, weights) of a saved model; ConfigError if the folder does not hold one."""
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = values["karma"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        raise ConfigError(f"{folder}: holds no saved KarmaModel (config.json with a karma section is missing); give a "
                          "folder written by save_pretrained, such as runs/demo/model") from None
    if values.get("format") != FORMAT:
        raise ConfigError(f"{folder}: has format {values.get('format')}, this version reads {FORMAT}; save the model "
                          "again")
    rows = [json.loads(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    items = Items(ids=np.array([r["id"] for r in rows], dtype=object), texts=[r["text"] for r in rows],
                  titles=[r["title"] for r in rows])
    return (KarmaConfig.from_dict(config), items, load_file(folder / "items.safetensors"),
            load_file(folder / "model.safetensors"))


def model_card(model: KarmaModel, facts: dict[str, Any]) -> str:
    """Markdown: what it is, data, metrics with protocol, settings, versions."""
    config = model.config
    front = ["---", "library_name: karma_fast", f"base_model: {config.backbone}", "tags: [recommendation, retrieval]",
             "---"]
    lines = [*front, "", "# KARMA next-interest model", "",
             f"An embedding of {config.embedding_dim} numbers for what a user wants next, made by {config.backbone} "
             f"({config.quantization}, {config.tuning}) over {len(model.items):,} items, after the method of KARMA "
             "(arXiv 2603.22779). Trained with karma_fast.", "",
             "```python", "from karma_fast import KarmaModel", "",
             'model = KarmaModel.from_pretrained("path/to/this/folder")',
             "u = model.encode_users([[0, 1, 2]])  # catalogue indices, oldest first",
             "print(model.decode(u))", "```", ""]
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
    lines += ["## Settings", "", "```json", json.dumps(config.to_dict(), indent=2), "```", "", "## Versions", "",
              *(f"- {name} {value}" for name, value in versions().items()), ""]
    return "\n".join(lines)
