"""The rows of the tables: what each trains, and in what it differs from the row it is derived from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from karma_fast.config import ConfigError

RECIPES = ("karma", "ra_rec")  # the kinds of row with a language model of ours
# all terms off but L_act; a row switches on what it names
ACT_ALONE = {"gen_weight": 0.0, "rec_weight": 0.0, "vis_weight": 0.0}
NO_SHORTCUT = {"history_shortcut": False, "query_shortcut": False}


@dataclass(frozen=True)
class Row:
    """differs: from ``parent``, for a reader. model: the settings that do it. control: a class of `controls`.

    queries: whether the row makes sense only where requests have queries.
    """

    name: str
    kind: Literal["baseline", "query", "ids", "sasrec", "karma", "ra_rec"]
    label: str
    differs: str = ""
    parent: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    control: Literal["", "StopGradient", "ShuffledTexts", "ImageTargets", "NoLanguageModel", "RandomWeights"] = ""
    queries: bool = False

    @property
    def recipe(self) -> str:
        """Whose settings the row has; "" for none."""
        return "ra_rec" if self.kind == "ids" else self.kind if self.kind in RECIPES else ""

    @property
    def seeded(self) -> bool:
        """Whether another seed gives another result."""
        return self.kind not in ("baseline", "query", "ids")


BASELINE_ROWS = [Row(name, "baseline", label) for name, label in (
    ("popularity", "popularity"), ("knn", "item-kNN"), ("tfidf", "title TF-IDF"), ("knn-decay", "kNN with decay"),
    ("text-decay", "text with decay"), ("transitions", "transitions"), ("mix", "tuned mix"))]
ROWS: dict[str, Row] = {row.name: row for row in [
    *BASELINE_ROWS,
    Row("query", "query", "query TF-IDF", "reads the query and no history", queries=True),
    Row("query-knn", "query", "query kNN", "what was chosen after such queries, and no history", queries=True),
    Row("query-mix", "query", "query TF-IDF + tuned mix", "weighs both; chosen on validation", queries=True),
    Row("query-knn-mix", "query", "query kNN + query TF-IDF + tuned mix", "weighs all three; chosen on validation",
        queries=True),
    Row("sasrec", "sasrec", "SASRec"),
    Row("A", "karma", "L_act", "retrieval alone", "", ACT_ALONE),
    Row("B", "karma", "L_act + L_gen", "adds L_gen", "A", ACT_ALONE | {"gen_weight": 1.0}),
    Row("C", "karma", "L_act + L_rec", "adds L_rec", "A", ACT_ALONE | {"rec_weight": 1.0}),
    Row("D", "karma", "L_act + L_gen + L_rec", "adds both", "A", ACT_ALONE | {"gen_weight": 1.0, "rec_weight": 1.0}),
    Row("E", "karma", "D + L_vis, synthetic vectors", "adds L_vis; its targets are synthetic, made from attributes",
        "D", {"gen_weight": 1.0, "rec_weight": 1.0, "vis_weight": 1.0}, "ImageTargets"),
    Row("G", "karma", "D, no gradient from L_rec at u", "control: L_rec trains its decoder alone", "D",
        ACT_ALONE | {"gen_weight": 1.0, "rec_weight": 1.0}, "StopGradient"),
    Row("H", "karma", "C, texts of L_rec shuffled", "control: L_rec decodes the text of another pair's target", "C",
        ACT_ALONE | {"rec_weight": 1.0}, "ShuffledTexts"),
    Row("A-plain", "karma", "L_act, no shortcut", "u from the language model's state alone; items not warmed up", "A",
        ACT_ALONE | NO_SHORTCUT),
    Row("D-plain", "karma", "D, no shortcut", "u from the language model's state alone; items not warmed up", "D",
        ACT_ALONE | {"gen_weight": 1.0, "rec_weight": 1.0} | NO_SHORTCUT),
    Row("no-llm", "karma", "L_act, no language model", "control: u from the shortcuts alone", "A",
        ACT_ALONE | {"tuning": "frozen"}, "NoLanguageModel"),
    Row("random", "karma", "L_act, LLM of random weights", "control: a language model that never read a text", "A",
        ACT_ALONE, "RandomWeights"),
    Row("frozen", "karma", "L_act, LLM frozen", "trains the projections alone", "A", ACT_ALONE | {"tuning": "frozen"}),
    Row("ra-rec-ids", "ids", "RA-Rec's ID vectors alone", "ranks by what RA-Rec injects, without a language model"),
    Row("ra-rec", "ra_rec", "RA-Rec", "reads titles and injected ID vectors, language model frozen; steps of its own",
        "ra-rec-ids"),
    Row("ra-rec-input", "ra_rec", "RA-Rec, vectors at the input alone", "no injection into the layers", "ra-rec",
        {"injection": "input"}),
    Row("ra-rec-no-align", "ra_rec", "RA-Rec, no alignment", "no alignment losses", "ra-rec", {"align_weight": 0.0}),
]}


def why_not(row: Row, with_queries: bool) -> str | None:
    """Why a row cannot be run here, or None."""
    if row.queries and not with_queries:
        return "the requests have no queries"
    if row.kind not in RECIPES:
        return None
    try:
        known = {f.name for f in dataclasses.fields(recipe_of(row).Config)}
    except (ImportError, AttributeError, ConfigError) as error:
        return f"this version has no recipe {row.kind} ({error})"
    unknown = sorted(set(row.model) - known)
    return f"the recipe {row.kind} has no setting {', '.join(unknown)}" if unknown else None


def recipe_of(row: Row) -> ModuleType:
    """The module with the configuration and the model of a row that trains a language model."""
    from karma_fast.recipes import recipe

    return recipe(row.kind)


def chosen(names: str, with_queries: bool) -> list[Row]:
    """The rows of a list with commas; "all": those that can be run. ValueError names an unknown one."""
    if names == "all":
        return [row for row in ROWS.values() if not why_not(row, with_queries)]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in ROWS]
    if unknown or not wanted:
        raise ValueError(f"no row {', '.join(unknown) or names!r}; there are {', '.join(ROWS)}, and all")
    return [ROWS[name] for name in dict.fromkeys(wanted)]
