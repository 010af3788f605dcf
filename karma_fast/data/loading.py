"""From a `DataConfig` to a `Dataset`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from .assets import fetch
from .catalogue import read_items
from .readers import Interactions, codes, read_interactions
from .schema import DataError, Dataset, Items, Sequences, Split, raise_first
from .sequences import Counts, build_sequences, split_by_time, split_leave_one_out
from .tables import ROW

if TYPE_CHECKING:
    from karma_fast.config import DataConfig


@dataclass
class Loaded:
    """A dataset with what `check` reports about it; split is None where it cannot be made.

    totals: users, rows, clicks, rows with unknown items, and time span of the file, before anything is dropped.
    with_table: whether the items are those of the item table.
    """

    items: Items
    sequences: Sequences
    split: Split | None
    counts: Counts
    totals: dict[str, Any]
    notes: list[str]
    with_table: bool


def load_dataset(config: DataConfig) -> Dataset:
    """Reads, checks, sorts and splits the data that ``config`` describes; DataError for the first thing wrong.

    With no ``config.interactions`` and the name ``ml-100k``, MovieLens-100K is fetched on the first call.

    >>> import pathlib, tempfile
    >>> from karma_fast.config import DataConfig
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "clicks.csv"
    >>> _ = path.write_text("user,item,timestamp\\nu,a,3\\nu,b,1\\nu,c,2\\n")
    >>> data = load_dataset(DataConfig(interactions=str(path)))
    >>> data.items.ids[data.sequences.items], data.split.test
    (array(['b', 'c', 'a'], dtype=object), array([2]))
    """
    problems: list[DataError] = []
    loaded = load(config, problems)
    raise_first(problems)
    return Dataset(loaded.items, loaded.sequences, loaded.split, config.name, loaded.notes)


def with_files(config: DataConfig) -> DataConfig:
    """Fills in the files of a known data set named by ``config.name``; DataError if there is no file to read."""
    if config.interactions:
        return config
    if config.name != "ml-100k":
        raise DataError(f"data.interactions: no file given and no known data set is called {config.name!r}; set it to "
                        "the path of a file with interactions, or set data.name to ml-100k")
    folder = fetch("ml-100k")
    return replace(config, interactions=str(folder / "ml-100k.inter"), items=str(folder / "ml-100k.item"))


def load(config: DataConfig, problems: list[DataError]) -> Loaded:
    """As `load_dataset`, but adds to ``problems`` and goes on without the bad rows as far as it can."""
    config = with_files(config)
    items, item_notes = None, []
    if config.items:
        try:
            items, item_notes = read_items(config, problems)
        except DataError as error:
            problems.append(error)
    data = read_interactions(config, problems)
    names, places = codes(data.frame["item"])
    unknown, with_table = 0, items is not None
    if items is None:
        items = Items(ids=names.to_numpy().astype(object), texts=[""] * len(names), titles=[""] * len(names))
        if not config.items:
            data.notes.append("no item table (data.items): items have no text, so the text losses cannot be trained")
    else:
        known = pl.DataFrame({"id": pl.Series(items.ids.tolist(), dtype=pl.String),
                              "place": np.arange(len(items), dtype=np.int32)})
        joined = pl.DataFrame({"id": names}).join(known, on="id", how="left", maintain_order="left")
        places = joined["place"].fill_null(-1).to_numpy()[places]
        outside = np.flatnonzero(places < 0)
        unknown = len(outside)
        if unknown:
            problems.append(_unknown_items(config, data, outside, items))
            keep = places >= 0
            data.frame, places = data.frame.filter(pl.Series(keep)), places[keep]
    totals = _totals(data.frame) | {"rows with unknown items": unknown}
    sequences, counts = _sequences(config, data, places)
    notes = item_notes + data.notes + counts.notes
    split = None
    try:
        if not len(sequences.items):
            raise DataError(f"{data.table.path}: no user has {config.min_user_events} clicks or more; lower "
                            "data.min_user_events or give more interactions")
        if config.split == "by_time":
            split = split_by_time(sequences, config.valid_time, config.test_time, config.min_user_events)
            first = sequences.indptr[:-1]
            short = int(((split.train_end == first) & (sequences.times[first] < config.valid_time)).sum())
            if short:
                notes.append(f"{short} users with fewer than {config.min_user_events} clicks before data.valid_time "
                             "do not train; their later clicks are requests (data.min_user_events)")
        else:
            split = split_leave_one_out(sequences, config.seed)
    except DataError as error:
        problems.append(error)
    return Loaded(items, sequences, split, counts, totals, notes, with_table)


def _totals(frame: pl.DataFrame) -> dict[str, Any]:
    clicks = int(frame["clicked"].sum()) if "clicked" in frame.columns else frame.height
    totals = {"users": frame["user"].n_unique(), "rows": frame.height, "clicks": clicks}
    if "time" in frame.columns and frame.height:
        totals["time span"] = f"{frame['time'].min()} to {frame['time'].max()}"
    return totals


def _sequences(config: DataConfig, data: Interactions, places: np.ndarray) -> tuple[Sequences, Counts]:
    """Hands the columns over to `build_sequences`, and empties ``data.frame`` so that its memory can go."""
    frame, data.frame = data.frame.drop(ROW, "item"), data.frame.clear()
    users, user_places = codes(frame["user"])
    frame = frame.drop("user")
    queries, query_texts = None, []
    if "query" in frame.columns:
        texts, queries = codes(frame["query"])
        query_texts = texts.to_list()
        if "" in query_texts:  # the first one, as they are sorted
            query_texts, queries = query_texts[1:], np.maximum(queries - 1, -1)
    return build_sequences(users.to_numpy().astype(object), user_places, places,
                           frame["time"].to_numpy() if "time" in frame.columns else None,
                           frame["clicked"].to_numpy() if "clicked" in frame.columns else None,
                           queries, query_texts, min_user_events=config.min_user_events, seed=config.seed)


def _unknown_items(config: DataConfig, data: Interactions, outside: np.ndarray, items: Items) -> DataError:
    lines = data.frame[ROW].gather(outside)
    ids = data.frame["item"].gather(outside).cast(pl.String)
    first = ids.is_first_distinct().arg_true()[:3]
    others = ", ".join(f"{ids[k]!r} ({data.table.place(lines[k]).rpartition(', ')[2]})" for k in first[1:])
    same = {re.sub(r"\.0+$", "", ids[0]), ids[0] + ".0"}.intersection(items.ids)
    advice = f"write it as there, {same.pop()!r}" if same else "add it there, or remove its rows"
    return DataError(f"{data.table.place(lines[0], data.columns['item'])}: item {ids[0]!r} is not in {config.items}; "
                     f"{advice} ({len(outside)} rows name {ids.n_unique()} items that are not there"
                     + (f", also {others})" if others else ")"))
