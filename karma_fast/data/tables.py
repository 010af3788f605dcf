"""A data file as a lazy polars frame: RecBole ``.inter``, ``.item``, ``.csv``, ``.tsv``, ``.jsonl``, ``.parquet``.

``.csv`` has commas and quotes cells with ``"``; ``.tsv``, ``.inter`` and ``.item`` have tabs and no quoting. Text
files are UTF-8 with one header line; a ``.jsonl`` file has one JSON object a line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from .lines import Lines, read_keys, scan_delimited, scan_json
from .schema import DataError

ATOMIC_TYPES = ("token", "token_seq", "float", "float_seq")
JSON_SUFFIXES = (".jsonl", ".ndjson")
ROW = "__row"


@dataclass
class Table:
    """A file before its columns are chosen: a lazy frame with the row number under ``ROW``.

    columns: the names in the file. types: type of each column in a RecBole file, empty for others. lines: for
    line numbers, None for Parquet. Columns of text files are strings.
    """

    path: Path
    frame: pl.LazyFrame
    columns: list[str]
    types: dict[str, str] = field(default_factory=dict)
    lines: Lines | None = None

    def place(self, row: int, column: str | None = None) -> str:
        """``FILE, line N, column C`` for a row of the frame (``row N``, from 1, in Parquet)."""
        where = f"row {row + 1}" if self.lines is None else f"line {self.lines.line(row)}"
        return f"{self.path}, {where}" + (f", column {column}" if column else "")

    def cell(self, row: int, column: str):
        """The value as it stands in the file, read again; for messages."""
        found = self.frame.filter(pl.col(ROW) == row).select(column).collect()
        return found.item() if found.height else None

    def rows_note(self, count: int) -> str:
        return f" ({count} such rows)" if count > 1 else ""


def open_table(path: str | Path, setting: str) -> Table:
    """Path -> Table; ``setting`` names the setting that holds the path. DataError where the file cannot be used."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(f"{path}: a folder, not a file; give one file as {setting}, its parts written into one")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give an existing one as {setting}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; give one with a header line and rows as {setting}")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            frame = pl.scan_parquet(path, row_index_name=ROW)
            columns = frame.collect_schema().names()[1:]
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path}: not a Parquet file ({_first_line(error)}); write it again") from None
        return Table(path, frame, columns)
    if suffix in JSON_SUFFIXES:
        return _open_json(path)
    if suffix in (".csv", ".tsv", ".inter", ".item"):
        return _open_delimited(path, "," if suffix == ".csv" else "\t", typed=suffix in (".inter", ".item"))
    raise DataError(f"{path}: files ending in {suffix or 'no suffix'} are not read; allowed: .csv, .tsv, .jsonl, "
                    ".parquet, and RecBole's .inter and .item")


def _open_delimited(path: Path, separator: str, typed: bool) -> Table:
    quote = '"' if separator == "," else None
    with open(path, "rb") as file:
        head, _, rest = file.readline(1 << 20).partition(b"\r")
    if rest.strip() and not (quote and head.count(b'"') % 2):
        raise DataError(f"{path}, line 1: the lines end in CR alone; save the file with line ends LF or CRLF")
    try:
        frame = pl.scan_csv(path, separator=separator, quote_char=quote, infer_schema=False, row_index_name=ROW)
        heads = frame.collect_schema().names()[1:]
    except (pl.exceptions.PolarsError, OSError) as error:
        scan_delimited(path, separator, None, quote is not None)  # names the line if encoding or quotes are wrong
        raise DataError(f"{path}: cannot be read ({_first_line(error)}); the first line must name the "
                        "columns") from None
    doubled = [h.removesuffix("_duplicated_0") for h in heads if h.endswith("_duplicated_0")]
    if doubled:
        raise DataError(f"{path}, line 1, column {doubled[0]}: the header names it twice; rename one")
    others = (s for s in (";", "\t", "|", ",") if s in heads[0] and s != separator)
    if len(heads) == 1 and (other := next(others, None)):
        raise DataError(f"{path}, line 1: the columns seem to be separated by {other!r}, but {path.suffix} files are "
                        f"read with {separator!r}; save it with that separator, or as .tsv if it has tabs")
    lines = scan_delimited(path, separator, len(heads), quote is not None)
    if len(lines.blank):
        frame = frame.filter(~pl.col(ROW).is_in(pl.Series(lines.blank, dtype=pl.UInt32).implode()))
    types = {}
    if typed:
        for head in heads:
            name, _, kind = head.partition(":")
            if kind not in ATOMIC_TYPES:
                raise DataError(f"{path}, line 1, column {head}: needs a type, as in `user_id:token`; allowed types: "
                                f"{', '.join(ATOMIC_TYPES)}")
            types[name] = kind
        frame = frame.rename({head: head.partition(":")[0] for head in heads})
    return Table(path, frame, list(types) or heads, types, lines)


def _open_json(path: Path) -> Table:
    lines = scan_json(path)
    frame = pl.scan_ndjson(path, infer_schema_length=None, row_index_name=ROW)
    try:  # from all lines, as a key may come late
        schema = pl.scan_ndjson(path, infer_schema_length=None).collect_schema()
        columns, frame = schema.names(), pl.scan_ndjson(path, schema=schema, row_index_name=ROW)
    except (pl.exceptions.PolarsError, OSError):  # interactions are read all the same, as text
        columns = list(read_keys(path))
    if not columns:
        raise DataError(f"{path}: no JSON object in the file; each line must be one")
    return Table(path, frame, columns, {}, lines)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def schema_of(table: Table) -> pl.Schema:
    """The types of the table's columns; where the parser finds none, a DataError as `collect` raises it."""
    try:
        return table.frame.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _refused(table, error) from None


def collect(table: Table, frame: pl.LazyFrame) -> pl.DataFrame:
    """Runs a lazy frame with all rows of the table; parser errors become a DataError, with the line where it can be
    found, and so does a number of rows other than the file's."""
    try:
        found = frame.collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _refused(table, error) from None
    if table.lines is not None and found.height != table.lines.rows:
        raise DataError(f"{table.path}: {found.height} rows were read, but the file has {table.lines.rows}; write it "
                        "again, as Parquet for example")
    return found


def nested_cells(table: Table, rows: pl.Series, cells: pl.Series, column: str) -> pl.Series:
    """Which cells of a column read as text are lists or objects in JSONL: Boolean, one for each of ``rows``.

    The parser writes them as JSON text; only lines whose text begins like it are looked at again.
    """
    if table.path.suffix.lower() not in JSON_SUFFIXES:
        return pl.repeat(False, len(cells), dtype=pl.Boolean, eager=True)
    texts = cells.cast(pl.Categorical).cat
    like = (texts.starts_with("[") | texts.starts_with("{")).fill_null(False)
    if not like.any():
        return like
    lines = {table.lines.line(row): row for row in rows.filter(like)}
    with open(table.path, "rb") as file:
        nested = [lines[number] for number, line in enumerate(file, start=1)
                  if number in lines and isinstance(json.loads(line)[column], (list, dict))]
    return rows.is_in(pl.Series(nested, dtype=rows.dtype).implode())


def _refused(table: Table, error: Exception) -> DataError:
    if table.path.suffix.lower() in JSON_SUFFIXES:
        for column, kinds in read_keys(table.path).items():
            if kinds:
                return DataError(f"{table.path}, column {column}: {kinds}; make all values of one kind, or leave "
                                 "the column out")
    return DataError(f"{table.path}: cannot be read ({_first_line(error)}); write the file again")
