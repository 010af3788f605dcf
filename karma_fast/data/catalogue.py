"""Reads the item table: ids, text, and vectors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from .readers import NAMES, as_text, check_kind, find_column, find_nested
from .schema import DataError, Items
from .tables import ROW, Table, collect, open_table, schema_of

if TYPE_CHECKING:
    from karma_fast.config import DataConfig


def read_items(config: DataConfig, problems: list[DataError]) -> tuple[Items, list[str]]:
    """Reads ``config.items``, with notes on what was left out; the catalogue has the order of the file.

    The text of an item is its text columns joined by `` | ``, blanks left out: ``config.text_columns`` in that
    order, by default all text columns with the title first. Those are the columns of text or categories with at
    least one value that is no number (RecBole: the token and token_seq columns), and what is named like a title,
    numbers too. The title is the one named like a title, else the first. Vectors are list columns of JSONL or
    Parquet, float_seq columns of RecBole files, or a ``.npy`` file with a row for each item.

    What makes the file unreadable is raised; bad rows are added to ``problems``.
    """
    table = open_table(config.items, "data.items")
    setting = config.item_id_column
    if setting is None and config.item_column in table.columns:
        setting = config.item_column
    id_column = find_column(table, "item_id", setting)
    schema = schema_of(table)
    check_kind(table, "item_id", id_column, schema[id_column])
    vectors = {"data.image_column": config.image_column, "data.id_vector_column": config.id_vector_column}
    for option, name in vectors.items():
        if name is not None and not name.endswith(".npy") and name not in table.columns:
            raise DataError(f"{table.path}: no column {name!r} (found: {', '.join(table.columns)}); set {option} to "
                            "one of them or to the path of a .npy file")
    frame = collect(table, table.frame.with_columns(as_text(id_column, schema[id_column])))
    if frame.is_empty():
        raise DataError(f"{table.path}: no rows below the header; give a file with items as data.items")
    schema = frame.schema

    ids = frame[id_column]
    if ids.null_count():
        row = frame[ROW].filter(ids.is_null())[0]
        problems.append(DataError(f"{table.place(row, id_column)}: blank, an id is needed; fill it in or remove the "
                                  f"row{table.rows_note(ids.null_count())}"))
    find_nested(table, "item_id", id_column, frame[ROW], ids, problems)
    twice = frame.filter(ids.is_not_null() & ~ids.is_first_distinct())
    if twice.height:
        name, row = twice[id_column][0], twice[ROW][0]
        first = frame.filter(ids == name)[ROW][0]
        problems.append(DataError(f"{table.place(row, id_column)}: item {name!r} is there already "
                                  f"({table.place(first).rpartition(', ')[2]}); keep one of them"
                                  f"{table.rows_note(twice.height)}"))
    columns = _text_columns(config, table, frame, id_column)
    left = [c for c in table.columns if c not in {id_column, *vectors.values(), *columns}]
    notes = []
    if left and config.text_columns is None:
        notes.append(f"{table.path}: not taken for text: {', '.join(left)}; data.text_columns chooses and orders the "
                     "columns with text")
    parts = [_clean(table, frame, name) for name in columns]
    title = columns.index(_title(columns) or columns[0]) if columns else None
    texts = [""] * frame.height
    if parts:
        texts = pl.select(pl.concat_str([p.replace("", None) for p in parts], separator=" | ",
                                        ignore_nulls=True)).to_series().fill_null("").to_list()
    images, id_vectors = (_vectors(table, frame, option, name, problems) for option, name in vectors.items())
    items = Items(ids=ids.fill_null("").to_numpy().astype(object), texts=texts,
                  titles=parts[title].to_list() if parts else [""] * frame.height,
                  image_vectors=images, id_vectors=id_vectors)
    if problems and (ids.null_count() or twice.height):  # so that `check` can go on
        keep = np.flatnonzero((ids.is_not_null() & ids.is_first_distinct()).to_numpy())
        items = Items(ids=items.ids[keep], texts=[items.texts[k] for k in keep],
                      titles=[items.titles[k] for k in keep],
                      image_vectors=None if images is None else images[keep],
                      id_vectors=None if id_vectors is None else id_vectors[keep])
    return items, notes


def _text_columns(config: DataConfig, table: Table, frame: pl.DataFrame, id_column: str) -> list[str]:
    if config.text_columns is not None:
        for name in config.text_columns:
            if name not in table.columns:
                raise DataError(f"{table.path}: no column {name!r} (found: {', '.join(table.columns)}); set "
                                "data.text_columns to some of them")
        return config.text_columns
    taken = {id_column, config.image_column, config.id_vector_column}
    found = [c for c in table.columns if c not in taken and (
        not frame.schema[c].is_nested() if _title([c]) else
        table.types[c].startswith("token") if table.types else _is_text(frame[c]))]
    title = _title(found)
    return [title] * (title is not None) + [c for c in found if c != title]


def _title(columns: list[str]) -> str | None:
    """The column that is named most like a title, None where none is."""
    titles = NAMES["title"].split()
    plain = {c: re.sub(r"[^a-z0-9]", "", c.lower()) for c in columns}
    return min((c for c in columns if plain[c] in titles), key=lambda c: titles.index(plain[c]), default=None)


def _is_text(column: pl.Series) -> bool:
    if column.dtype not in (pl.String, pl.Categorical, pl.Enum):
        return False
    numbers = column.cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False)
    return column.null_count() < numbers.null_count()


def _clean(table: Table, frame: pl.DataFrame, name: str) -> pl.Series:
    """A column as one-line text: lists joined by commas, white space runs made one blank, null made empty."""
    column = frame[name]
    try:
        if isinstance(column.dtype, pl.List):
            column = column.list.eval(pl.element().cast(pl.String)).list.join(", ", ignore_nulls=True)
        else:
            column = frame.select(as_text(name, column.dtype)).to_series()
    except pl.exceptions.PolarsError:
        raise DataError(f"{table.path}, column {name}: holds {column.dtype}, which cannot be read as text; convert "
                        "it, or name other columns in data.text_columns") from None
    return column.str.replace_all(r"\s+", " ").str.strip_chars().fill_null("")


def vector_file(name: str, items: Path) -> Path:
    """Where a ``.npy`` setting is looked up: as it stands, else beside the item table."""
    path = Path(name).expanduser()
    return path if path.exists() else items.parent / path


def _vectors(table: Table, frame: pl.DataFrame, option: str, name: str | None,
             problems: list[DataError]) -> np.ndarray | None:
    """(N, d) float32 with NaN rows where the item has no vector; None if ``name`` is None or the vectors are bad."""
    if name is None:
        return None
    known = len(problems)
    if name.endswith(".npy"):
        path = vector_file(name, table.path)
        vectors = _load_npy(path, option, frame.height, problems)

        def where(k: int) -> str:
            return f"{path}, row {k + 1}"
    else:
        vectors = _list_column(table, frame, option, name, problems)

        def where(k: int) -> str:
            return table.place(frame[ROW][k], name)
    if vectors is None or len(problems) > known:
        return None
    finite = np.isfinite(vectors)
    absent = np.isnan(vectors).all(axis=1)
    bad = np.flatnonzero(~finite.all(axis=1) & ~absent)
    if len(bad):
        problems.append(DataError(f"{where(int(bad[0]))}: the vector holds a value that is not finite; put it right, "
                                  f"or leave the whole vector out{table.rows_note(len(bad))}"))
        return None
    if absent.all():
        problems.append(DataError(f"{table.path}, column {name}: no item has a vector; unset {option}"))
        return None
    return vectors


def _load_npy(path: Path, option: str, rows: int, problems: list[DataError]) -> np.ndarray | None:
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        problems.append(DataError(f"{path}: cannot be read ({error}); set {option} to a file written by numpy.save"))
        return None
    if vectors.ndim != 2 or len(vectors) != rows or vectors.dtype.kind not in "fiu":
        problems.append(DataError(f"{path}: shape {vectors.shape} of {vectors.dtype}; numbers of shape ({rows}, "
                                  "width) are needed, a row for each item in the order of the item file"))
        return None
    return vectors.astype(np.float32)


def _list_column(table: Table, frame: pl.DataFrame, option: str, name: str,
                 problems: list[DataError]) -> np.ndarray | None:
    column = frame[name]
    if table.types.get(name) == "float_seq":
        column = column.str.strip_chars().str.split(" ")
    elif isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    inner = column.dtype.inner if isinstance(column.dtype, pl.List) else None
    if inner is None or not (inner.is_numeric() or inner in (pl.Null, pl.String)):
        problems.append(DataError(f"{table.path}, column {name}: holds {column.dtype}, not vectors; {option} needs a "
                                  "column with lists of numbers, or the path of a .npy file"))
        return None
    element = pl.element().cast(pl.Float64, strict=False)
    given = column.list.eval(pl.element().is_not_null() & element.is_not_nan().fill_null(True)).list.any()
    column = pl.select(pl.when(given).then(column)).to_series()  # all null or NaN is no vector, of whatever width
    sizes = column.list.len().fill_null(0).to_numpy()
    width = int(sizes[sizes > 0][0]) if (sizes > 0).any() else 1
    wrong = np.flatnonzero((sizes != width) & (sizes > 0))
    if len(wrong):
        row = int(wrong[0])
        problems.append(DataError(f"{table.place(frame[ROW][row], name)}: {sizes[row]} numbers, the vectors before "
                                  f"have {width}; all need the same width{table.rows_note(len(wrong))}"))
        return None
    vectors = np.full((frame.height, width), np.nan, dtype=np.float32)
    flat = column.filter(pl.Series(sizes > 0)).explode().cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy()
    # a null or a text inside a vector becomes an infinity, so that the check for finite values finds it
    with np.errstate(over="ignore"):
        vectors[sizes > 0] = np.where(np.isnan(flat), np.inf, flat).reshape(-1, width)
    return vectors
