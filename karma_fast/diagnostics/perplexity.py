"""Does the tuned language model still read the items' texts as well as the untuned one?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.schema import Dataset
from ..losses import text_losses
from ..model.backbone import causal_lm
from ..model.reading import logits
from .entries import entry
from .states import Untuned, text_states

if TYPE_CHECKING:
    from ..model.karma import KarmaModel
    from .plain import PlainModel

MAX_TOKENS = 128  # of a text
MAX_TEXTS = 512
ENOUGH = 30  # texts of items outside the training part that stand for all


def text_nats(model: KarmaModel | PlainModel, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) summed token losses of texts in nats, and (n,) numbers of the tokens, by the model's language model.

    The first token of a text is predicted only if the tokenizer begins texts with a token of its own.
    """
    tokenizer, backbone = model.tokenizer, model.backbone
    rows = [ids[:MAX_TOKENS] for ids in tokenizer(list(texts))["input_ids"]] if len(texts) else []
    head = causal_lm(backbone).get_output_embeddings().weight
    sums = np.zeros(len(rows))
    for part, tokens, states in text_states(backbone, rows):
        last = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        last[tokens.offsets[1:].long() - 1] = True
        index = torch.nonzero(~last)[:, 0]
        owner = torch.bucketize(index, tokens.offsets[1:].long(), right=True)
        found = text_losses(lambda x: logits(backbone, x), states[index], tokens.token_ids[index + 1],
                            torch.ones(len(index), device=states.device), owner, len(part), len(head))
        sums[part] = found.double().cpu().numpy()
    return sums, np.array([max(0, len(row) - 1) for row in rows], dtype=np.int64)


def chosen_items(data: Dataset, seed: int) -> tuple[np.ndarray, str]:
    """Catalogue indices whose texts are read, and a sentence that says which they are."""
    with_text = np.flatnonzero([bool(text) for text in data.items.texts])
    unseen = np.setdiff1d(with_text, data.split.training_items(data.sequences))
    items, which = ((unseen, "items that no event of the training part has") if len(unseen) >= ENOUGH else
                    (with_text, f"all items, as only {len(unseen)} with a text are in no event of the training part"))
    if len(items) > MAX_TEXTS:
        items = np.sort(np.random.default_rng(seed).choice(items, MAX_TEXTS, replace=False))
        which += f"; {MAX_TEXTS} drawn by the seed"
    return items, which


def retained_perplexity(model: KarmaModel | PlainModel, untuned: Untuned | None, texts: Sequence[str], reason: str = ""
                        ) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Entries of the tuned and of the untuned language model; the ratio stands with the tuned one.

    Args:
        untuned: of the model; None where it cannot be had, for ``reason``.
    """
    sums, tokens = text_nats(model, texts)
    tuned = nats_entries(sums, tokens)
    if untuned is None:
        return tuned | {"perplexity_ratio": entry("perplexity_ratio", math.nan, len(texts), reason)}, {}
    with untuned.applied():
        before, _ = text_nats(model, texts)
    total, change = max(1, int(tokens.sum())), sums - before
    mean = change.sum() / total
    # of a ratio of sums over texts
    error = float(np.sqrt(np.square(change - mean * tokens).sum()) / total)
    ratio = entry("perplexity_ratio", math.exp(mean) if tokens.sum() else math.nan, len(texts),
                  "no text has two tokens", tokens=int(tokens.sum()), log_standard_error=error,
                  compared_with=untuned.how)
    return tuned | {"perplexity_ratio": ratio}, nats_entries(before, tokens)


def nats_entries(sums: np.ndarray, tokens: np.ndarray) -> dict[str, dict[str, Any]]:
    """
    >>> nats_entries(np.array([3.0, 1.0]), np.array([3, 1]))["text_nats"]["value"]
    1.0
    """
    nats = sums.sum() / tokens.sum() if tokens.sum() else math.nan
    more = {"reason": "no text has two tokens", "tokens": int(tokens.sum())}
    return {"text_nats": entry("text_nats", nats, len(sums), **more),
            "text_perplexity": entry("text_perplexity", float(np.exp(nats)), len(sums), **more)}
