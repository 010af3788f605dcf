"""Which positions of a request's prompt are instruction, query, history, and what follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..data.packing import EMB, TEXT

if TYPE_CHECKING:
    from ..model.karma import KarmaModel
    from .plain import PlainModel

INSTRUCTION, QUERY, HISTORY, END, INJECTED = range(5)


def prompt_parts(model: KarmaModel | PlainModel, history: np.ndarray, query: str = "") -> np.ndarray:
    """(T,) int64: INSTRUCTION, QUERY, HISTORY, END ([EMB], or the words that close a prompt of text), or INJECTED,
    what a recipe puts before the instruction.

    >>> from types import SimpleNamespace as Fake
    >>> import torch
    >>> chunk = Fake(tokens=Fake(slots=torch.tensor([TEXT, TEXT, 0, 1, EMB])))
    >>> model = Fake(config=Fake(max_history=5), prompts=Fake(
    ...     instruction=[7, 8], build=lambda *_: chunk, query_ids=lambda query: []))
    >>> (prompt_parts(model, [4, 9]) == HISTORY).tolist()
    [False, False, True, True, False]
    """
    if hasattr(model, "prompt"):  # a prompt of text alone
        return model.prompt(history, query)[1]
    history = np.asarray(history, np.int64)[-model.config.max_history:]
    slots = model.prompts.build([history], [query]).tokens.slots.numpy()
    parts = np.where(slots >= 0, HISTORY, END)
    first_text = int(np.argmax(slots != EMB))  # 0 also for a lone [EMB]
    head = first_text + len(model.prompts.instruction)
    parts[:first_text], parts[first_text:head] = INJECTED, INSTRUCTION
    words = head + np.flatnonzero(slots[head:] == TEXT)
    parts[words[:len(model.prompts.query_ids(query))]] = QUERY
    return parts
