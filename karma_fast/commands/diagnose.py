"""`karma-fast diagnose`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ConfigError
from .common import fit_to, load_data, load_model, set_up_process

if TYPE_CHECKING:
    from ..data import Dataset
    from ..diagnostics import PlainModel
    from ..model.karma import KarmaModel


def main(args: argparse.Namespace) -> int:
    if args.output and not Path(args.output).parent.is_dir():
        raise FileNotFoundError(f"--output: the folder of {args.output} does not exist; make it, or give another name")
    model, data, run = load(args)
    from ..diagnostics import diagnose
    from ..diagnostics.section import summary
    from ..evaluation.report import write_report
    from ..model.storage import write_atomically

    found = diagnose(model, data, requests=args.requests, decoder_steps=args.decoder_steps, split=args.split,
                     seed=args.seed, untuned=args.untuned, progress=sys.stderr.isatty(),
                     say=lambda text: print(text, file=sys.stderr))
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    written = []
    for path in [Path(args.output)] if args.output else [run / "diagnostics.json"] if run else []:
        write_atomically(path, text)
        written.append(path)
    if run and not args.output:
        written += write_report(run)
    print(text if args.json else summary(found), end="" if args.json else "\n")
    for path in written:
        print(f"written: {path}", file=sys.stderr)
    return 0


def load(args: argparse.Namespace) -> tuple[KarmaModel | PlainModel, Dataset, Path | None]:
    """The model, its data, and the run that it belongs to, if any."""
    folder = plain_folder(args.model)
    if folder is not None:
        if args.config is None:
            raise ConfigError(f"{folder}: a plain language model does not say what its data is; give CONFIG.yaml too")
        set_up_process()
        from ..diagnostics import PlainModel

        data = load_data(args.config, folder)
        return PlainModel.load(folder, data.items, base=args.base, max_history=args.max_history), data, None
    if args.base is not None:
        raise ConfigError("--base: a saved KarmaModel names its language model itself; leave the option out")
    model, folder = load_model(args.model)
    run = folder.parent if (folder.parent / "metrics.json").is_file() else None
    return model, fit_to(model, load_data(args.config, folder)), run


def plain_folder(path: str) -> Path | None:
    """The folder if it holds a model that transformers or peft wrote; None if a run, a saved KarmaModel or nothing."""
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file() or not (folder / "config.json").is_file():
        return None
    try:
        values: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return None
    return folder if isinstance(values, dict) and "model_type" in values else None
