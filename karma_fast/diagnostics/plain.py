"""A plain causal language model of the Hugging Face form as a recommender: titles in, states out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import KarmaConfig
from ..data.batches import QUERY_TEMPLATE
from ..data.schema import Items
from ..model.backbone import causal_lm, load_backbone
from .columns import END, HISTORY, INSTRUCTION, QUERY
from .states import text_states

CLOSING = "\nNext:"  # what ends a prompt; u is the state of its last token


class PlainModel:
    """A language model tuned on text alone, with the interface that diagnostics need of a model.

    A prompt reads ``instruction query title; title; ...`` and `CLOSING`. u is the last state of its last token, e the
    mean of an item's text's last states, both of length 1. Made by `PlainModel.load`.
    """

    def __init__(self, backbone: nn.Module, tokenizer, items: Items, config: KarmaConfig, base: str | None = None
                 ) -> None:
        self.backbone, self.tokenizer, self.items, self.config, self.base = backbone, tokenizer, items, config, base
        self.instruction = self._ids(config.instruction, start=True)

    @classmethod
    def load(cls, folder: str | Path, items: Items, *, base: str | None = None, max_history: int = 20,
             device: torch.device | str | None = None) -> PlainModel:
        """A model from a folder that transformers or peft wrote.

        Args:
            folder: has config.json and weights, or adapter_config.json of a LoRA.
            items: the catalogue.
            base: hub id or folder of the language model before tuning, None if unknown; adapters name theirs.

        Raises:
            ConfigError: the language model cannot be loaded, with what to do.
        """
        folder = Path(folder)
        adapter = folder / "adapter_config.json"
        if adapter.is_file():
            base = base or json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        # weights as they are and no further adapters, read as serving would
        config = KarmaConfig(backbone=base if adapter.is_file() else str(folder), quantization="none", tuning="frozen",
                             max_history=max_history)
        backbone, tokenizer = load_backbone(config, device)
        if adapter.is_file():
            from peft import PeftModel

            backbone = PeftModel.from_pretrained(backbone, folder)
        tuning = "lora" if adapter.is_file() else "full"
        return cls(backbone.eval(), tokenizer, items, dataclasses.replace(config, tuning=tuning), base)

    def base_config(self) -> KarmaConfig:
        """What loads the language model before tuning."""
        return dataclasses.replace(self.config, backbone=self.base, tuning="frozen")

    @property
    def device(self) -> torch.device:
        return causal_lm(self.backbone).device

    def _ids(self, text: str, start: bool = False) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=start)["input_ids"]
        return ids[:-1] if start and ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def prompt(self, history: np.ndarray, query: str = "") -> tuple[list[int], np.ndarray]:
        """(T token ids, (T,) parts of the prompt as `karma_fast.diagnostics.columns` names them)."""
        titles = [self.items.titles[i] or str(self.items.ids[i])
                  for i in np.asarray(history, np.int64)[-self.config.max_history:]]
        asked = self._ids(QUERY_TEMPLATE.format(query))[:self.config.max_query_tokens] if query else []
        pieces = [(self.instruction, INSTRUCTION), (asked, QUERY),
                  *((self._ids(f" {title};"), HISTORY) for title in titles), (self._ids(CLOSING), END)]
        return ([i for ids, _ in pieces for i in ids],
                np.repeat([part for _, part in pieces], [len(ids) for ids, _ in pieces]))

    def encode_users(self, histories: Sequence[np.ndarray], queries: Sequence[str] | None = None, *,
                     progress: bool = False) -> Tensor:
        """(U, hidden) float32 on the CPU: u of each request; arguments as of `KarmaModel.encode_users`."""
        queries = [""] * len(histories) if queries is None else queries
        rows = [self.prompt(h, q)[0] for h, q in zip(histories, queries, strict=True)]
        return self._encode(rows, mean=False)

    def encode_items(self, items: np.ndarray | None = None) -> Tensor:
        """(n, hidden) float32 on the CPU: e of the given catalogue indices, or of all; 0 for an item without words."""
        items = np.arange(len(self.items)) if items is None else np.asarray(items, np.int64)
        limit = 128
        return self._encode([self._ids(self.items.texts[i] or self.items.titles[i])[:limit] for i in items], mean=True)

    def _encode(self, rows: list[list[int]], mean: bool) -> Tensor:
        width = causal_lm(self.backbone).config.get_text_config().hidden_size
        out = torch.zeros(len(rows), width)
        for part, tokens, states in text_states(self.backbone, rows):
            ends = tokens.offsets[1:].long()
            if mean:
                sums = F.pad(states.double().cumsum(dim=0), (0, 0, 1, 0))
                found = sums[ends] - sums[tokens.offsets[:-1].long()]
            else:
                found = states[ends - 1]
            out[torch.from_numpy(part)] = F.normalize(found.float(), dim=-1).cpu()
        return out
