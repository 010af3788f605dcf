"""Looks at the data before hours of training do: counts, what is odd, and what makes it unusable."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .assets import AssetError
from .schema import DataError, Dataset
from .windows import ONE_USER

if TYPE_CHECKING:
    from karma_fast.config import DataConfig

    from .loading import Loaded

ABSENT = ("nan", "none", "null", "<na>")  # what a missing id becomes as text


@dataclass
class Report:
    """What `check` found.

    counts: name -> number or text, in the order of printing. problems: what must be put right before training.
    warnings: what may be meant but is worth a look. notes: what was dropped or assumed.
    """

    name: str = ""
    counts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the data can be trained on."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def to_text(self) -> str:
        """Plain text for a terminal."""
        width = max(map(len, self.counts), default=0)
        lines = [f"Data: {self.name}"] if self.name else []
        lines += [f"  {name:<{width}}  {_shown(value)}" for name, value in self.counts.items()]
        for head, texts in (("Problems", self.problems), ("Warnings", self.warnings), ("Notes", self.notes)):
            if texts:
                lines += ["", f"{head} ({len(texts)})", *(f"  - {text}" for text in texts)]
        return "\n".join([*lines, "", "This data can be trained on." if self.ok else
                          "This data cannot be trained on until the problems are solved."])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def check(config: DataConfig) -> Report:
    """Reads the data that ``config`` describes and reports on it; bad data ends up in the report, not in an error.

    As many problems as can be found in one go are listed, each with file, line, column and what to do.

    >>> from karma_fast.config import DataConfig
    >>> report = check(DataConfig(interactions="clicks.csv"))
    >>> report.ok, report.problems
    (False, ['clicks.csv: no such file; give an existing one as data.interactions'])
    """
    return checked(config)[0]


def checked(config: DataConfig) -> tuple[Report, Dataset | None]:
    """What `check` reports, and what `load_dataset` gives, of one reading; None for data with problems."""
    from .loading import load, with_files

    report, found = Report(name=config.name), []
    try:
        config = with_files(config)
        report.name = config.name or config.interactions
        loaded = load(config, found)
    except (DataError, AssetError) as error:
        found.append(error)
        loaded = None
    if loaded is not None:
        report.notes = loaded.notes
        _count(loaded, report)
        _judge(loaded, config, report, found)
    report.problems = list(dict.fromkeys(str(error) for error in found))
    if not report.ok:
        return report, None
    return report, Dataset(loaded.items, loaded.sequences, loaded.split, config.name, loaded.notes)


def _count(loaded: Loaded, report: Report) -> None:
    sequences, items, split, totals = loaded.sequences, loaded.items, loaded.split, loaded.totals
    report.counts = {
        "users": totals["users"], "items": len(items), "rows": totals["rows"], "clicks": totals["clicks"],
        "exposures without click": totals["rows"] - totals["clicks"],
        "users kept": len(sequences), "clicks kept": len(sequences.items),
        "duplicate rows": loaded.counts.duplicates, "rows with unknown items": totals["rows with unknown items"],
        "equal-time neighbours": f"{loaded.counts.tied_neighbours:.1%}",
        "longest text (characters)": max(map(len, items.texts), default=0),
        "items without text": items.texts.count(""),
    }
    if "time span" in totals:
        report.counts["time span"] = totals["time span"]
    if sequences.queries is not None:
        report.counts["clicks with a query"] = int((sequences.queries >= 0).sum())
        report.counts["distinct queries"] = len(sequences.query_texts)
    for name, vectors in (("image", items.image_vectors), ("id", items.id_vectors)):
        if vectors is not None:
            report.counts[f"items with {name} vector"] = int((~np.isnan(vectors[:, 0])).sum())
            report.counts[f"width of {name} vectors"] = vectors.shape[1]
    if len(sequences):
        lengths = np.quantile(np.diff(sequences.indptr), [0, 0.25, 0.5, 0.75, 0.95, 1], method="nearest")
        report.counts["clicks per user"] = (
            "min {}, 25% {}, median {}, 75% {}, 95% {}, max {}".format(*map(int, lengths)))
    if split is not None:
        first = sequences.indptr[:-1]
        report.counts |= {"training events": int((split.train_end - first).sum()),
                          "validation targets": len(split.valid), "test targets": len(split.test),
                          "split": split.description}


def _judge(loaded: Loaded, config: DataConfig, report: Report, problems: list[DataError]) -> None:
    """Adds what is odd to the report's warnings, and what training would refuse to ``problems``."""
    items, sequences, split = loaded.items, loaded.sequences, loaded.split
    for role, ids in (("user", sequences.user_ids), ("item", items.ids)):
        blanks = [repr(name) for name in ids if name.lower() in ABSENT]
        if blanks:
            report.warnings.append(f"{role} {', '.join(blanks)}: reads like a missing id turned into text, as pandas' "
                                   "astype(str) does; if so, fill the ids in or remove the rows")
    without = items.texts.count("")
    if loaded.with_table and without == len(items):
        report.warnings.append(f"{config.items}: no item has a text, so the text losses cannot be trained; name the "
                               "columns with text in data.text_columns")
    elif loaded.with_table and without:
        report.warnings.append(f"{without} items have no text, {items.ids[items.texts.index('')]!r} first; fill in "
                               "the item table, or expect weak results for them")
    if max(map(len, items.texts), default=0) > 2000:
        place = int(np.argmax([len(text) for text in items.texts]))
        report.warnings.append(f"the text of item {items.ids[place]!r} has {len(items.texts[place])} characters; only "
                               "its beginning is used, so put what matters first in data.text_columns")
    if loaded.counts.tied_neighbours > 0.2:
        report.warnings.append(f"{loaded.counts.tied_neighbours:.0%} of a user's neighbouring events have equal "
                               "times; their true order is not known and a seeded shuffle stands in (data.seed)")
    if split is None:
        return
    by_time = config.split == "by_time"
    advice = ("move data.valid_time and data.test_time into the time span" if by_time else
              "leave_one_out needs users with 3 or more clicks")
    if not len(split.valid):
        report.warnings.append(f"no validation target; {advice}")
    if not len(split.test):
        problems.append(DataError(f"no test target, so nothing could be measured; {advice}"))
    trained_users = int((split.train_end - sequences.indptr[:-1] >= 2).sum())
    if not trained_users:
        problems.append(DataError("no user has two events in the training part, so there is nothing to train on; " + (
            "choose a later data.valid_time" if by_time else "leave_one_out needs users with 4 or more clicks")))
    elif trained_users == 1 and sequences.negatives is None:
        report.warnings.append(f"recipe karma will not train on this: {ONE_USER}")
    events = len(sequences.items)
    # +1 where a training part begins, -1 where it ends
    starts = np.bincount(sequences.indptr[:-1], minlength=events + 1)
    trained = np.cumsum(starts - np.bincount(split.train_end, minlength=events + 1))[:-1] > 0
    seen = np.zeros(len(items), dtype=bool)
    seen[sequences.items[trained]] = True
    report.counts["items never in training"] = int((~seen).sum())
    cold = int((~seen[sequences.items[split.test]]).sum())
    report.counts["test targets never in training"] = cold
    repeated = int(sequences.chosen_before(split.test).sum())
    if repeated:
        report.counts["test targets chosen before"] = repeated
    if repeated > 0.05 * len(split.test):
        report.warnings.append(f"{repeated} of {len(split.test)} test targets are items that their users chose "
                               "before; they count as missed where seen items are left out, as is the default, so "
                               "look at `karma-fast evaluate --unmasked` and `karma-fast baselines --unmasked` too")
    if cold > 0.1 * len(split.test):
        report.warnings.append(f"{cold} of {len(split.test)} test targets are items that no training event has; only "
                               "their text and vectors speak for them")
