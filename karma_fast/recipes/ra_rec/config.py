"""Settings of the RA-Rec recipe."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from ...config import ModelConfig, require


@dataclass
class RaRecConfig(ModelConfig):
    """RA-Rec: loss = ``act_weight * L_p + align_weight * (L_ua + L_ia)``, see `karma_fast.recipes.ra_rec.loss`."""

    recipe = "ra_rec"
    tuning = "frozen"  # the language model; trained are the injected vectors' projections and contexts
    positions = "last"

    id_model: str = "co_occurrence"  # or sasrec, als, items (the item table's ID vectors), a folder of a saved SASRec
    max_history: int = 10  # titles in the prompt; ID models read the same
    max_title_tokens: int = 12
    max_text_tokens: int = 24  # of an item's own text
    instruction: str = "The user chose, oldest first:"
    item_instruction: str = "Item:"
    injection: Literal["layers", "input"] = "layers"  # into every layer's input, or the first one's alone
    num_context_tokens: int = 8  # learned tokens before an injected vector; 0: none
    init_scale: float = 5.0  # of the inner products in BPR, whose sigmoid wants smaller scores than a softmax
    num_negatives: int = 64  # drawn evenly from the catalogue for each batch of a process, beside its targets
    act_weight: float = 1.0
    align_weight: float = 0.1  # lambda
    align_scale: float = 1 / 0.07  # 1 / tau
    select_share: float = 1.0  # of the training requests, drawn evenly from buckets of history length and popularity
    select_overlap: bool = False  # keep only requests whose target's title shares a word with the history's titles

    def __post_init__(self) -> None:
        super().__post_init__()
        self.id_model = os.path.expanduser(self.id_model)
        self.at_least(1, "max_title_tokens", "max_text_tokens")
        self.at_least(0, "num_context_tokens", "num_negatives", "act_weight", "align_weight")
        require(self.act_weight > 0 or self.align_weight > 0,
                "model: every loss weight is 0; set at least one above 0")
        require(self.align_scale > 0, f"model.align_scale: got {self.align_scale}; a number above 0 is needed")
        require(0 < self.select_share <= 1,
                f"model.select_share: got {self.select_share}; above 0 and at most 1 is needed")
        require(bool(self.instruction) and bool(self.item_instruction),
                "model.instruction and model.item_instruction: an empty prompt has no state to read; give a few words")
        require(self.id_model != "co_occurrence" or self.id_dim > 0,
                "model.id_dim: got 0; vectors of a width above 0 are needed, as nothing else is injected")
