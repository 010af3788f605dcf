"""What all KARMA rows of a table share: data, model and training, by data set and size."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from karma_fast.baselines import SASRecConfig
from karma_fast.config import DataConfig, RunConfig
from karma_fast.data import DataError
from karma_fast.recipes import recipe
from karma_fast.run_setup import training_settings

from .beauty import ORIGINALS, QUERY_COLUMN, convert, default_folder
from .rows import RECIPES

Size = Literal["reduced", "full"]


@dataclass(frozen=True)
class DataSet:
    """short_history: events before a request up to which its user counts as cold.

    pairs, steps: of the reduced size. model: settings that this data set has for itself, whatever the size; chosen on
    validation requests. sasrec: the same of SASRec.
    """

    name: str
    short_history: int
    positions: Literal["last", "all"]
    pairs: int
    steps: int
    queries: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    sasrec: dict[str, Any] = field(default_factory=dict)

    def config(self, source: Path | None = None) -> DataConfig:
        """Where the data is; Beauty is converted from ``source`` if it has not been. DataError says what to do."""
        if self.name == "ml-100k":
            return DataConfig(name=self.name)
        folder = default_folder(self.queries)
        if not (folder / "about.json").exists():
            if source is None:
                raise DataError(f"{folder}: Amazon Beauty has not been converted; give --source FOLDER with "
                                f"{', '.join(ORIGINALS)}; `python -m benchmarks.quality.beauty FOLDER --download` "
                                "gets and converts them")
            convert(source, folder, queries=self.queries)
        return DataConfig(name=self.name, interactions=str(folder / "interactions.csv"),
                          items=str(folder / "items.csv"), time_column="order",
                          query_column=QUERY_COLUMN if self.queries else None,
                          text_columns=["title", "brand", "categories"])


# few events an item: words tell more than counts, near neighbours more than far ones, and a pair is much of the
# counts that it is among
BEAUTY = {"text_vectors": "words", "word_dim": 384, "id_window": 3, "id_dim": 384, "id_folds": 4, "embedding_dim": 768}
DATA: dict[str, DataSet] = {data.name: data for data in (
    DataSet("beauty", 4, "all", 1024, 128, model=BEAUTY),
    # ranked without their queries too, so training leaves some out; HR@10 of both ways together was best so
    DataSet("beauty-queries", 4, "last", 96, 60, queries=True, model=BEAUTY | {"query_dropout": 0.1}),
    # words, so that row no-llm owes a language model nothing; with its states of the texts all was the same
    DataSet("ml-100k", 30, "all", 640, 100, model={"text_vectors": "words"}, sasrec={"dim": 128, "dropout": 0.3}),
)}

# two CPU cores, minutes a row: the demo's model and weights
REDUCED = {
    "model": {"backbone": "smollm2-135m-instruct", "quantization": "4bit", "lora_rank": 8, "lora_alpha": 16.0,
              "lora_targets": "q_proj,v_proj", "max_history": 20, "id_dim": 256, "decode_weight": 0.02,
              "decode_share": 0.25, "decoder_warmup_steps": 20},
    "training": {"learning_rate": 3e-4, "projection_learning_rate": 2e-4, "warmup_steps": 5, "logging_steps": 10,
                 "save_steps": 20, "save_total_limit": 1, "report_to": "none"},
}
# one GPU
FULL = {
    "model": {"backbone": "Qwen/Qwen2.5-0.5B", "quantization": "none", "max_history": 50, "id_dim": 256,
              "decode_weight": 0.1, "decoder_warmup_steps": 200},
    "training": {"num_train_epochs": 10, "batch_size": 4096, "learning_rate": 1e-4, "projection_learning_rate": 2e-4,
                 "warmup_steps": 20, "logging_steps": 10, "save_steps": 50, "save_total_limit": 1, "report_to": "none",
                 "eval_strategy": "steps", "eval_steps": 50, "eval_users": 2000},
}
# a request reads titles word by word, and items are read by the language model too
RA_REC = {"reduced": {"batch_size": 16, "max_steps": 120, "projection_learning_rate": 2e-3},
          "full": {"batch_size": 1024, "num_train_epochs": 1, "projection_learning_rate": 2e-3}}


def base_config(data: DataSet, size: Size, data_config: DataConfig, changes: dict[str, str] | None = None,
                kind: str = "karma") -> RunConfig:
    """Model and training that every row of a recipe starts from.

    changes: settings such as {"model.decode_weight": "0.03", "training.max_steps": "20"}; ConfigError for one that
    no recipe has. A model setting that this recipe lacks is left out, and so are those of SASRec.
    """
    values = copy.deepcopy(REDUCED if size == "reduced" else FULL)
    if size == "reduced":
        values["training"] |= {"max_steps": data.steps, "batch_size": data.pairs}
    if kind == "karma":
        values["model"] |= {"positions": data.positions} | data.model
    else:
        values["model"] = {name: values["model"][name] for name in ("backbone", "quantization")}
        values["training"] |= RA_REC[size]
    known = {name: {f.name for f in dataclasses.fields(recipe(name).Config)} for name in RECIPES}
    for name, value in (changes or {}).items():
        section, _, key = name.partition(".")
        if section not in (*values, "sasrec") or not key:
            raise ValueError(f"--set {name}: model.NAME=VALUE, training.NAME=VALUE or sasrec.NAME=VALUE is needed")
        if section == "sasrec":
            continue  # `sasrec_config` takes it
        if section == "training" or key in known[kind] or not any(key in names for names in known.values()):
            values[section][key] = value
    model = recipe(kind).Config.from_dict(values["model"])
    return RunConfig(data_config, model, training_settings(values["training"]))


def sasrec_config(data: DataSet, changes: dict[str, str] | None = None) -> SASRecConfig:
    """SASRec's settings on a data set, with those of ``changes`` that are its own, such as {"sasrec.dim": "128"}."""
    own = {name.partition(".")[2]: value for name, value in (changes or {}).items() if name.startswith("sasrec.")}
    return SASRecConfig.from_dict(data.sasrec | own)


def facts_of(config: RunConfig) -> dict[str, Any]:
    """The settings for a results file, without paths."""
    model = config.model.to_dict()
    if Path(model["backbone"]).exists():
        model["backbone"] = Path(model["backbone"]).name
    return {"model": model, "training": dict(config.training)}
