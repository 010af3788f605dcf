"""One typed configuration for YAML files, command-line flags and Python.

>>> config = KarmaConfig(embedding_dim=128, positions="last")
>>> config.decode_weight
0.1
>>> KarmaConfig.from_dict({"embeding_dim": 128})
Traceback (most recent call last):
    ...
karma_fast.config.ConfigError: model.embeding_dim: no such setting; did you mean embedding_dim?
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

DATA_FILES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".inter", ".item")  # that `karma_fast.data` reads
MOST_REQUESTS = 50_000  # held-out requests that are ranked if no number is given; a share of them is sure to 0.0023


class ConfigError(ValueError):
    """A setting that does not exist, has the wrong type, or contradicts another one."""


def unknown_key(section: str, key: str, known: Iterable[str]) -> ConfigError:
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known settings: {', '.join(known)}"
    return ConfigError(f"{section}.{key}: no such setting; {hint}")


def convert(name: str, value: Any, annotation: Any) -> Any:
    """Checks ``value`` against a type annotation; text is parsed, so flags and YAML behave alike."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        absent = value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))
        if absent and type(None) in args:
            return None
        problems = []
        for candidate in (a for a in args if a is not type(None)):
            try:
                return convert(name, value, candidate)
            except ConfigError as error:
                problems.append(error)
        words = [str(word) for part in args if typing.get_origin(part) is Literal
                 for word in typing.get_args(part) if word is not False]
        raise ConfigError(", or ".join([str(problems[0]), *words]))
    if args == (False,):  # beside a column's name
        if str(value).lower() == "false":
            return False
        raise ConfigError(f"{name}: got {value!r}; text or false is needed")
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{name}: got {value!r}; allowed: {', '.join(map(str, args))}")
    if origin is list:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name}: got {value!r}; a list is needed")
        return [convert(name, part, args[0]) for part in value]
    if annotation is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return value.lower() in ("true", "yes", "on", "1")
        raise ConfigError(f"{name}: got {value!r}; true or false is needed")
    if annotation in (int, float):
        if isinstance(value, bool):
            raise ConfigError(f"{name}: got {value!r}; a number is needed")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isnan(number):
            shown = str(value) if isinstance(value, datetime.date) else repr(value)
            raise ConfigError(f"{name}: got {shown}; a number is needed{_as_seconds(value)}")
        if annotation is int and not number.is_integer():  # nor is an infinity
            raise ConfigError(f"{name}: got {value!r}; a whole number is needed")
        # int(str) keeps large whole numbers exact, which a detour over float would not
        exact = annotation is int and isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit()
        return int(value) if exact else annotation(number)
    if annotation is str:
        if isinstance(value, (str, int, float, Path)) and not isinstance(value, bool):
            return str(value)
        raise ConfigError(f"{name}: got {value!r}; text is needed")
    return value


def _as_seconds(value: Any) -> str:
    """A hint for a date, as YAML makes of 2024-09-01, or the text of one: its seconds since 1970."""
    try:
        time = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        return ""
    if time.tzinfo is None:
        time = time.replace(tzinfo=datetime.timezone.utc)
    return f" (in seconds since 1970 {value} is {time.timestamp():.15g}, in UTC)"


class Section:
    """Mixed into the dataclasses below: building from a dictionary with checked names and types."""

    section = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        hints = typing.get_type_hints(cls)
        names = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in names:
                raise unknown_key(cls.section, key, names)
        return cls(**{k: convert(f"{cls.section}.{k}", v, hints[k]) for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass
class ModelConfig(Section):
    """What every recipe's model is told: its language model, and how it reads a request. Saved with the model."""

    section = "model"
    recipe = ""

    backbone: str = "smollm2-135m-instruct"  # a hub id, a local folder, or the model of the demo
    quantization: Literal["4bit", "8bit", "none"] = "4bit"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool = False
    max_history: int = 20
    max_query_tokens: int = 32
    query_dropout: float = 0.0  # of the queries, those that training leaves out; drawn once by seed
    instruction: str = "The user chose, oldest first:"
    id_dim: int = 128  # width of the ID vectors made from the training part; 0: none
    id_window: int = 20  # events of a user that are at most so far apart count as neighbours in the ID vectors
    init_scale: float = 1 / 0.07  # of the inner products in the loss
    learnable_scale: bool = True
    max_scale: float = 100.0
    index: Literal["flat", "hnsw", "ivf"] = "flat"  # over e, saved with the model; flat is exact

    def __post_init__(self) -> None:
        self.backbone = os.path.expanduser(self.backbone)
        if os.path.isdir(self.backbone):  # so that a saved model, or a run, finds it from any folder
            self.backbone = str(Path(self.backbone).resolve())
        self.at_least(1, "max_history", "id_window")
        self.at_least(0, "id_dim", "max_query_tokens")
        require(0 <= self.query_dropout < 1,
                f"model.query_dropout: got {self.query_dropout}; at least 0 and below 1 is needed")
        require(0 < self.init_scale <= self.max_scale,
                f"model.init_scale: got {self.init_scale}; between 0 and max_scale ({self.max_scale}) is needed")

    def at_least(self, least: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value >= least, f"model.{name}: got {value}; at least {least} is needed" if least else
                    f"model.{name}: got {value}; 0 or more is needed")

    def to_json_string(self) -> str:
        """JSON; transformers' TensorBoard callback asks a model's config for it."""
        return json.dumps(self.to_dict(), indent=2)


@dataclass
class KarmaConfig(ModelConfig):
    """The KARMA model and its losses.

    Loss: ``act_weight * L_act + decode_weight * (gen_weight * L_gen + rec_weight * L_rec + vis_weight * L_vis)``.
    A weight of 0 switches a term off, and its cost with it.
    """

    recipe = "karma"

    tuning: Literal["lora", "full", "frozen"] = "lora"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: str = "all-linear"

    id_folds: int = 0  # user groups; in training a user meets ID vectors made without the group. 0: one set for all
    embedding_dim: int = 256  # width of u and e, the vectors that are indexed and served
    mid_features: int | None = None  # middle width of the soft-prompt projections; None: their input's width
    num_soft_tokens: int = 4  # K, soft tokens through which L_rec decodes an interest embedding
    positions: Literal["last", "all"] = "all"
    history_shortcut: bool = True  # u also gets a learned mean of the latest items, past the LLM
    query_shortcut: bool = True  # u also gets the query's words, where items have word vectors (text_vectors)
    shortcut_warmup_epochs: float = 2.0  # passes before training in which items and shortcuts learn without the LLM
    max_text_tokens: int = 24  # of the target's text in L_gen and L_rec
    text_vectors: Literal["states", "words", "both"] = "states"  # of items' texts: the LLM's states, TF-IDF, or both
    word_dim: int = 256  # width of the TF-IDF vectors
    item_instruction: str = ""  # put before an item's text when the language model makes its vector

    act_weight: float = 1.0
    decode_weight: float = 0.1  # lambda
    gen_weight: float = 1.0
    rec_weight: float = 1.0  # alpha
    vis_weight: float = 1.0  # beta
    decoder_warmup_steps: int = 0  # of 64 items each before training: P_rec alone learns item embedding -> item text
    decode_positions: int = 1  # pairs per window that L_rec and L_vis look at with positions="all"
    decode_share: float = 1.0  # of the windows, those that L_gen, L_rec and L_vis look at; drawn once by seed
    log_q: bool = True
    symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "embedding_dim", "max_text_tokens", "num_soft_tokens", "lora_rank", "decode_positions",
                      "word_dim")
        self.at_least(0, "act_weight", "decode_weight", "gen_weight", "rec_weight", "vis_weight",
                      "decoder_warmup_steps", "id_folds", "shortcut_warmup_epochs")
        require(self.id_folds != 1, "model.id_folds: got 1; 0 for none, or at least 2 groups are needed")
        require(self.act_weight > 0 or (self.decode_weight > 0 and max(self.gen_weight, self.rec_weight,
                self.vis_weight) > 0), "model: every loss weight is 0; set at least one above 0")
        require(0 < self.decode_share <= 1,
                f"model.decode_share: got {self.decode_share}; above 0 and at most 1 is needed")
        require(not (self.tuning == "full" and self.quantization != "none"),
                "model.tuning: full tuning needs model.quantization none; 4-bit and 8-bit weights take lora or frozen")

    @property
    def text_kinds(self) -> tuple[str, ...]:
        """The kinds of vectors that are made of items' texts; see `karma_fast.model.features`."""
        return {"states": ("text",), "words": ("words",), "both": ("text", "words")}[self.text_vectors]

    def weight(self, term: Literal["act", "gen", "rec", "vis"]) -> float:
        """The factor of a term in the total loss."""
        own = getattr(self, f"{term}_weight")
        return own if term == "act" else self.decode_weight * own


@dataclass
class DataConfig(Section):
    """Where the data lies, what its columns are called, how it is split. None: the column is found by its name."""

    section = "data"

    interactions: str = ""
    items: str = ""
    name: str = ""
    user_column: str | None = None
    item_column: str | None = None
    time_column: Literal[False] | str | None = None  # False: none, though a column has such a name
    query_column: Literal[False] | str | None = None
    clicked_column: Literal[False] | str | None = None
    item_id_column: str | None = None
    text_columns: list[str] | None = None
    image_column: str | None = None
    id_vector_column: str | None = None
    split: Literal["leave_one_out", "by_time"] = "leave_one_out"
    valid_time: float | None = None
    test_time: float | None = None
    min_user_events: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.min_user_events >= 1, f"data.min_user_events: got {self.min_user_events}; at least 1 is needed")
        if self.split == "by_time":
            require(self.valid_time is not None and self.test_time is not None and self.valid_time < self.test_time,
                    "data.split: by_time needs data.valid_time and data.test_time, the first below the second")


@dataclass
class RunConfig:
    """Everything `karma-fast train` needs; ``training`` holds fields of `KarmaTrainingArguments`.

    The class of ``model`` is that of the recipe (`karma_fast.recipes`).
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=KarmaConfig)
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        from .recipes import recipe

        for key in values:
            if key not in ("recipe", "data", "model", "training"):
                raise unknown_key("config", key, ("recipe", "data", "model", "training"))
        # a section may hold nothing but comments
        values = {key: {} if part is None and key != "recipe" else part for key, part in values.items()}
        for key, part in values.items():
            if key != "recipe" and not isinstance(part, dict):
                raise ConfigError(f"config.{key}: got {part!r}; a section with settings is needed")
        model = recipe(values.get("recipe", KarmaConfig.recipe)).Config
        return cls(data=DataConfig.from_dict(values.get("data", {})), model=model.from_dict(values.get("model", {})),
                   training=dict(values.get("training", {})))

    @classmethod
    def load(cls, path: str | Path | None, overrides: dict[str, str] | None = None) -> RunConfig:
        """Reads YAML; ``overrides`` are flags such as ``{"learning_rate": "1e-4", "model.positions": "last"}``.

        A flag without a section goes to the one that knows it (data, model, else training).
        """
        from .recipes import recipe

        values: dict[str, Any] = {}
        if path is not None:
            import yaml

            advice = ("data files are named as data.interactions and data.items of a YAML file or, for check-data, "
                      "baselines, plan and select, with --interactions FILE --items FILE in its place")
            if Path(path).suffix.lower() in DATA_FILES:
                raise ConfigError(f"{path}: a data file, but CONFIG.yaml is needed there; {advice}")
            try:
                text = Path(path).read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
            except UnicodeDecodeError:
                raise ConfigError(f"{path}: not a text in UTF-8, but CONFIG.yaml is needed there; {advice}") from None
            try:
                values = yaml.safe_load(text) or {}
            except yaml.YAMLError as error:
                raise ConfigError(f"{path}: not valid YAML: {error}") from None
            if not isinstance(values, dict):
                raise ConfigError(f"{path}: needs sections data:, model: and training:, got {type(values).__name__}; "
                                  f"{advice}")
        values = {key: dict(part) if isinstance(part, dict) else part for key, part in values.items()}
        overrides = dict(overrides or {})
        if "recipe" in overrides:
            values["recipe"] = overrides.pop("recipe")
        model = recipe(values.get("recipe", KarmaConfig.recipe)).Config
        for flag, value in overrides.items():
            section, _, name = flag.rpartition(".")
            if not section:
                section = next((s.section for s in (DataConfig, model)
                                if name in {f.name for f in dataclasses.fields(s)}), "training")
            if values.get(section) is None:
                values[section] = {}
            if isinstance(values[section], dict):
                values[section][name] = value
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.model.recipe, "data": self.data.to_dict(), "model": self.model.to_dict(),
                "training": dict(self.training)}
