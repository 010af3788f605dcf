"""What a measurement looks like in JSON: a value or the reason why there is none, its sample size, its definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# every value names one of these; docs/diagnostics.md has the formulas and sources
DEFINITIONS = {
    "sink_first": "share of (layer, head) pairs whose first position receives a mean attention above 0.3 from all "
                  "rows that see it; mean over requests",
    "sink_any": "share of (layer, head) pairs with a mean received attention above 0.3 at some position that at "
                "least four rows see; mean over requests",
    "sink_history": "the same at some history position other than the first position of the prompt",
    "first_received": "mean attention that the first position receives from all rows; mean over layers, heads, "
                      "requests",
    "history_sink": "largest mean attention that a history position receives, of those that at least four rows see "
                    "and without the prompt's first; mean over layers, heads, requests",
    "barcode": "1 - mean Jensen-Shannon divergence, in bits, of rows from their mean row; rows: the later half of the "
               "history and what follows; columns: the earlier half, rescaled to sum 1; mean over layers, heads, "
               "requests; 1: all rows look at the same columns",
    "stripe_concentration": "1 - entropy of that mean row / log of its width; 0: spread evenly, 1: a single column",
    "barcode_mass": "attention that those rows spend on those columns before rescaling",
    "look_first": "attention of the last row on the first position; mean over layers, heads, requests",
    "look_injected": "attention of the last row on vectors put before the instruction, without the first position",
    "look_instruction": "attention of the last row on the instruction without the first position",
    "look_query": "attention of the last row on the query",
    "look_history": "attention of the last row on the history",
    "look_self": "attention of the last row on the prompt's closing, itself included",
    "effective_rank": "exp of the entropy of the singular values divided by their sum; rows are not centred",
    "effective_rank_centred": "the same after the mean row is subtracted",
    "mean_cosine": "mean cosine of all pairs of different rows",
    "first_component": "share of the variance around the mean that lies along the first principal component",
    "text_nats": "language-model loss of item texts, nats per token",
    "text_perplexity": "exp of text_nats",
    "perplexity_ratio": "perplexity of the tuned language model on item texts / that of the untuned one",
    "probe_recall@10": "share of the targets' words that are among the ten which a ridge probe scores highest, micro "
                       "average; baseline: the words' frequency in the probe's training half",
    "probe_map": "mean over rows of the average precision of the probe's order of the words; same baseline",
    "decoder_matched": "loss of held-out targets' texts, nats per token averaged per text, by the untuned language "
                       "model behind soft tokens that a freshly trained projection makes from the embedding",
    "decoder_shuffled": "the same given another request's embedding",
    "decoder_mean": "the same given the mean of the decoder's training embeddings, which says nothing of a request",
    "decoder_own_better": "share of requests whose own embedding gives the lower loss; 0.5 is chance",
    "js@50": "mean over requests and over the 50 best unseen items of the Jaccard similarity of an item's words with "
             "the target's",
}


def entry(definition: str, value: float, n: int, reason: str = "", **more: Any) -> dict[str, Any]:
    """One measurement; a value that is not finite becomes null and needs a reason.

    >>> entry("mean_cosine", float("nan"), 1, "needs two rows")
    {'value': None, 'n': 1, 'definition': 'mean_cosine', 'reason': 'needs two rows'}
    """
    if definition not in DEFINITIONS:
        raise KeyError(f"no definition is called {definition!r}; known: {', '.join(DEFINITIONS)}")
    value = float(value)
    out = {"value": value if math.isfinite(value) else None, "n": int(n), "definition": definition}
    if out["value"] is None:
        out["reason"] = reason or "not a finite number"
    return out | {key: finite(part) for key, part in more.items()}


def mean_entry(definition: str, values: Sequence[float] | np.ndarray, reason: str = "", **more: Any
               ) -> dict[str, Any]:
    """The mean of what is finite among the values, with its standard error where there are two or more.

    >>> mean_entry("mean_cosine", [1.0, float("nan"), 2.0])["value"]
    1.5
    """
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    error = float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None
    mean = float(known.mean()) if len(known) else math.nan
    return entry(definition, mean, len(known), reason or "no request has it", standard_error=error, **more)


def finite(value: Any) -> Any:
    """Arrays as lists and numbers that JSON knows: None for what is not finite.

    >>> finite(np.array([1.0, np.nan]))
    [1.0, None]
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
