"""`karma-fast embed`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from ..config import ConfigError
from .common import fit_to, load_data, load_model


def main(args: argparse.Namespace) -> int:
    wanted = {name: Path(getattr(args, name)) for name in ("items", "users") if getattr(args, name)}
    if not wanted:
        raise ConfigError("embed: nothing to write; give --items FILE, --users FILE, or both")
    for name, path in wanted.items():
        if path.suffix not in (".parquet", ".npy"):
            raise ConfigError(f"--{name}: got {path}; a name that ends in .parquet or .npy is needed")
    model, folder = load_model(args.model)
    if "items" in wanted:
        write_vectors(wanted["items"], model.items.ids, model.encode_items().numpy())
    if "users" in wanted:
        data = fit_to(model, load_data(args.data, folder))
        sequences = data.sequences
        if sequences.queries is not None:
            print("warning: the data has queries, and these embeddings of users are made without any, from each "
                  f"user's last {model.config.max_history} events, held-out ones included; for a request with its "
                  "query take `karma-fast recommend --query`, or encode_users(histories, queries) in Python",
                  file=sys.stderr)
        histories = [sequences.items[start:end] for start, end in
                     zip(sequences.indptr[:-1], sequences.indptr[1:], strict=True)]
        vectors = model.encode_users(histories, progress=sys.stderr.isatty()).numpy()
        write_vectors(wanted["users"], sequences.user_ids, vectors)
    return 0


def write_vectors(path: Path, ids: np.ndarray, vectors: np.ndarray) -> None:
    """Writes (n,) ids and (n, d) float32 vectors as ``path`` (.parquet), or as ``path`` (.npy) and its .ids.txt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    if path.suffix == ".npy":
        np.save(part, vectors)
        names = path.with_suffix(".ids.txt")
        names.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
    else:
        import polars as pl

        column = pl.Series("embedding", vectors).cast(pl.List(pl.Float32))
        pl.DataFrame([pl.Series("id", list(map(str, ids)), pl.String), column]).write_parquet(part)
    part.replace(path)
    print(f"{path}: {len(vectors):,} embeddings of width {vectors.shape[1]}")
