"""Reads the interactions: finds the columns by their names, unless `DataConfig` names them, and checks the cells."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl

from .schema import DataError
from .tables import JSON_SUFFIXES, ROW, Table, collect, nested_cells, open_table

if TYPE_CHECKING:
    from karma_fast.config import DataConfig

# Names are compared without case and punctuation. The first one of a role wins over the others.
NAMES = {
    "user": "userid user uid useridx reviewerid customerid visitorid sessionid",
    "item": "itemid item iid itemidx parentasin asin movieid productid articleid bookid trackid newsid",
    "time": "timestamp time ts unixtimestamp unixreviewtime eventtime datetime date order",
    "query": "query searchquery querytext searchterm keyword keywords",
    "clicked": "clicked click isclick isclicked label",
    "item_id": "itemid item iid id itemidx parentasin asin movieid productid articleid bookid trackid newsid",
    "title": "title itemtitle movietitle producttitle booktitle name itemname productname",
}
OPTIONAL = ("time", "query", "clicked")  # what a file may lack, and false switches off
SETTINGS = {"user": "user_column", "item": "item_column", "time": "time_column", "query": "query_column",
            "clicked": "clicked_column", "item_id": "item_id_column"}


def other_column(role: str) -> str:
    """What to do about a column that does not suit its role."""
    return f"set data.{SETTINGS[role]} to another one" + (" or to false" if role in OPTIONAL else "")


def find_column(table: Table, role: str, setting: str | Literal[False] | None) -> str | None:
    """The column of a role: the one that ``setting`` names, else the one whose name is known for the role; None if
    there is none or ``setting`` is False. DataError where a column that is needed is not found."""
    if setting is False:
        return None
    option = f"data.{SETTINGS[role]}"
    found = f"found: {', '.join(table.columns)}"
    if setting is not None:
        name = setting if setting in table.columns else setting.partition(":")[0]
        if name in table.columns:
            return name
        raise DataError(f"{table.path}: no column {setting!r} ({found}); set {option} to one of them")
    known = NAMES[role].split()
    plain = {column: re.sub(r"[^a-z0-9]", "", column.lower()) for column in table.columns}
    matches = [c for c in table.columns if plain[c] == known[0]] or [c for c in table.columns if plain[c] in known]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise DataError(f"{table.path}: columns {' and '.join(matches)} could both be the {role} column; set {option} "
                        "to the right one" + (" or to false" if role in OPTIONAL else ""))
    if role not in OPTIONAL:
        raise DataError(f"{table.path}: no {role.replace('_', ' ')} column ({found}); set {option} to one of them")
    return None


def as_text(column: str, kind: pl.DataType | None) -> pl.Expr:
    """Cells as text without blanks around them; whole numbers stored as floats lose ``.0``, decimals the zeros that
    their scale adds; blank and NaN are null."""
    value = pl.col(column)
    if kind is not None and kind.is_float():
        value = value.fill_nan(None)
        whole = value.cast(pl.Int64, strict=False)
        value = pl.when(whole == value).then(whole.cast(pl.String)).otherwise(value.cast(pl.String))
    text = value.cast(pl.String).str.strip_chars()
    if kind is not None and kind.is_decimal() and kind.scale:
        text = text.str.replace(r"\.?0+$", "")
    return pl.when(text != "").then(text).alias(column)


@dataclass
class Interactions:
    """frame: columns user, item, query (categorical), time (Int64 or Float64), clicked (Boolean), ROW (UInt32).

    time, query and clicked are there only if the file has them. columns: role -> name in the file.
    """

    table: Table
    frame: pl.DataFrame
    columns: dict[str, str]
    notes: list[str] = field(default_factory=list)


def read_interactions(config: DataConfig, problems: list[DataError]) -> Interactions:
    """Reads ``config.interactions``. What makes the file unreadable is raised; bad cells are added to ``problems``
    (one for each column and kind, with the first line) and their rows left out.

    Only the needed columns are read, and ids as categories: about 20 bytes a row.
    """
    table = open_table(config.interactions, "data.interactions")
    columns: dict[str, str] = {}
    missing = []
    for role in ("user", "item", "time", "query", "clicked"):
        try:
            name = find_column(table, role, getattr(config, SETTINGS[role]))
            columns.update({role: name} if name else {})
        except DataError as error:
            missing.append(error)
    if missing:
        problems += missing[1:]
        raise missing[0]
    if table.path.suffix.lower() in JSON_SUFFIXES:  # as text, so that one odd value does not stop the parser
        table.frame = pl.scan_ndjson(table.path, schema=dict.fromkeys(columns.values(), pl.String), row_index_name=ROW)
    kinds = table.frame.collect_schema()
    time = kinds.get(columns.get("time"), pl.Null)
    if not (time.is_numeric() or time in (pl.String, pl.Null, pl.Date, pl.Datetime)):
        raise DataError(f"{table.path}, column {columns['time']}: holds {time}, not times; numbers, dates and "
                        f"datetimes are allowed; convert the column, or {other_column('time')}")
    for role, name in columns.items():
        check_kind(table, role, name, kinds[name])
    casts = [_cast(role, name, kinds[name]).alias(role) for role, name in columns.items()]
    frame = collect(table, table.frame.select(ROW, *casts))
    if frame.is_empty():
        raise DataError(f"{table.path}: no rows below the header; give a file with interactions as data.interactions")
    if "time" in columns and kinds[columns["time"]] == pl.String and frame["time"].null_count():
        text = pl.col(columns["time"]).str.strip_chars().cast(pl.Float64, strict=False)  # not all are whole numbers
        frame = frame.with_columns(collect(table, table.frame.select(text.alias("time"))))
    result = Interactions(table, frame, columns)
    _check_cells(result, config, problems)
    return result


def check_kind(table: Table, role: str, name: str, kind: pl.DataType) -> None:
    """DataError where a column holds lists or objects, which its role cannot use."""
    if kind.is_nested():
        raise DataError(f"{table.path}, column {name}: holds {kind}; text and numbers are allowed for the "
                        f"{role.replace('_', ' ')} column; convert it, or {other_column(role)}")


def find_nested(table: Table, role: str, name: str, rows: pl.Series, cells: pl.Series,
                problems: list[DataError]) -> pl.Series:
    """Which cells are lists or objects, as `nested_cells` tells; adds the first one to ``problems``."""
    nested = nested_cells(table, rows, cells, name)
    if nested.any():
        first = nested.arg_true()[0]
        problems.append(DataError(f"{table.place(rows[first], name)}: got {cells[first]}, a list or an object; text "
                                  f"or a number is needed; convert the column, or {other_column(role)}"
                                  f"{table.rows_note(int(nested.sum()))}"))
    return nested


def _cast(role: str, name: str, kind: pl.DataType) -> pl.Expr:
    """The expression that turns a column into what its role needs; null where a value does not fit."""
    column = pl.col(name)
    if role in ("user", "item"):
        return as_text(name, kind).cast(pl.Categorical)
    if role == "query":
        return column.cast(pl.String).str.replace_all(r"\s+", " ").str.strip_chars().cast(pl.Categorical)
    if role == "time":
        if kind.is_temporal():
            return column.cast(pl.Datetime("us"), strict=False).dt.epoch("us") / 1e6
        return (column.str.strip_chars() if kind == pl.String else column).cast(
            pl.Int64 if kind == pl.String or kind.is_integer() else pl.Float64, strict=False)
    if kind == pl.Boolean:
        return column
    text = column.cast(pl.String).str.strip_chars().str.to_lowercase()
    return pl.when(text.is_in(["1", "true", "1.0"])).then(True).when(text.is_in(["0", "false", "0.0"])).then(False)


def _check_cells(data: Interactions, config: DataConfig, problems: list[DataError]) -> None:
    """Adds a problem for each column with bad cells, and leaves the rows with such cells out of ``data.frame``."""
    frame, table = data.frame, data.table
    advice = {"user": "an id is needed; fill it in or remove the row",
              "item": "an id is needed; fill it in or remove the row",
              "time": f"a finite number is needed (seconds, say); convert the column, or {other_column('time')}",
              "clicked": f"0, 1, true or false is needed; convert the column, or {other_column('clicked')}"}
    good = pl.repeat(True, frame.height, dtype=pl.Boolean, eager=True)
    for role in [role for role in data.columns if role in advice]:
        name = data.columns[role]
        fits = frame[role].is_not_null()
        if frame[role].dtype == pl.Float64:
            fits &= frame[role].is_finite().fill_null(False)
        if fits.all():
            continue
        if role == "clicked" and config.clicked_column is None and name.lower() == "label":
            data.notes.append(f"column {name} holds other values than 0 and 1 and is not taken for clicks")
            data.frame = frame = frame.drop("clicked")
            del data.columns["clicked"]
            continue
        bad = frame[ROW].filter(~fits)
        value = table.cell(bad[0], name)
        shown = "blank" if value is None or str(value).strip() == "" else f"got {value!r}"
        problems.append(DataError(f"{table.place(bad[0], name)}: {shown}, {advice[role]}{table.rows_note(len(bad))}"))
        good &= fits
    for role in [role for role in ("user", "item", "query") if role in data.columns]:
        good &= ~find_nested(table, role, data.columns[role], frame[ROW], frame[role], problems)
    data.frame = frame.filter(good)


def codes(column: pl.Series) -> tuple[pl.Series, np.ndarray]:
    """A categorical column -> its distinct texts, sorted, and an (R,) int32 array of places in them, -1 for null."""
    distinct = column.drop_nulls().unique()
    texts = distinct.cast(pl.String)
    order = texts.arg_sort().to_numpy()
    physical = distinct.to_physical().to_numpy()
    table = np.full(int(physical.max(initial=0)) + 2, -1, dtype=np.int32)  # the last entry is for null
    table[physical[order]] = np.arange(len(order), dtype=np.int32)
    return texts[order], table[column.to_physical().fill_null(len(table) - 1).to_numpy()]
