"""`karma-fast check-data`."""

from __future__ import annotations

import argparse
import dataclasses
import json

from ..config import ConfigError, DataConfig, unknown_key
from .common import load_config


def main(args: argparse.Namespace) -> int:
    names = {field.name for field in dataclasses.fields(DataConfig)}
    for key in args.overrides:  # here no other section could know a name
        if key.removeprefix("data.") not in names:
            raise unknown_key("data", key.removeprefix("data."), names)
    overrides = {f"data.{key.removeprefix('data.')}": value for key, value in args.overrides.items()}
    run = load_config(args.config, overrides)
    config = run.data
    if not (config.interactions or config.name):
        raise ConfigError("check-data: no data named; give CONFIG.yaml or --interactions FILE --items FILE")
    from ..data import check

    report = check(config)
    if run.model.positions == "all" and "clicks with a query" in report.counts:
        report.warnings.append("recipe karma will not train on queries with model.positions all, its default; set "
                               "model.positions: last in CONFIG.yaml, or data.query_column: false to leave them out")
    print(json.dumps(report.to_dict(), indent=1, ensure_ascii=False) if args.json else report.to_text())
    return 0 if report.ok else 1
