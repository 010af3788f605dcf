"""Attention sinks and barcodes: statistics of every layer and head over several requests, one request at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation.attention import recorded
from ..model.backbone import causal_lm
from .columns import END, HISTORY, INJECTED, INSTRUCTION, QUERY, prompt_parts
from .entries import mean_entry

if TYPE_CHECKING:
    from ..model.karma import KarmaModel
    from .plain import PlainModel

EPSILON = 0.3  # Gu et al. 2025, arXiv 2410.10781
# Rows that must see a position before it counts as a sink: one that only looks at itself receives 1 / rows
MIN_ROWS = 4
LOOKED_AT = {"look_injected": INJECTED, "look_instruction": INSTRUCTION, "look_query": QUERY, "look_history": HISTORY,
             "look_self": END}
STATISTICS = ("sink_first", "sink_any", "sink_history", "first_received", "history_sink", "barcode",
              "stripe_concentration", "barcode_mass", "look_first", *LOOKED_AT)


def head_statistics(weights: Tensor, parts: np.ndarray) -> dict[str, Tensor]:
    """The statistics of one layer's heads for one prompt.

    Args:
        weights: (heads, T, T) causal attention, rows sum to 1.
        parts: (T,) from `prompt_parts`.

    Returns:
        name -> (heads,) float32; without those that this prompt is too short for. Formulas: docs/diagnostics.md.

    >>> uniform = uniform_attention(12)[None]
    >>> found = head_statistics(uniform, np.array([INSTRUCTION] * 3 + [HISTORY] * 8 + [END]))
    >>> round(found["barcode"].item(), 3), abs(round(found["stripe_concentration"].item(), 3))
    (1.0, 0.0)
    """
    weights, parts = weights.float(), torch.from_numpy(np.asarray(parts)).to(weights.device)
    seen_by = torch.arange(len(parts), 0, -1, device=weights.device)
    received = weights.sum(dim=-2) / seen_by  # alpha of the sink work
    history = parts == HISTORY
    history[:1] = False  # every language model has a sink there, whatever stands there
    last = weights[:, -1]
    out = {"sink_first": (received[:, 0] > EPSILON).float(), "first_received": received[:, 0],
           "look_first": last[:, 0]}
    after_first = torch.arange(len(parts), device=weights.device) > 0
    out |= {name: last[:, (parts == part) & after_first].sum(dim=-1) for name, part in LOOKED_AT.items()}
    enough = seen_by >= MIN_ROWS
    if enough.any():
        out["sink_any"] = (received[:, enough] > EPSILON).any(dim=-1).float()
    if (enough & history).any():
        out["history_sink"] = received[:, enough & history].amax(dim=-1)
        out["sink_history"] = (out["history_sink"] > EPSILON).float()
    return out | barcode(weights, torch.nonzero(history)[:, 0])


def barcode(weights: Tensor, places: Tensor) -> dict[str, Tensor]:
    """Do the later half of the history, and what follows it, all look at the same items of the earlier half?

    weights: (heads, T, T) float32. places: (m,) history positions; nothing is measured below 4.
    """
    if len(places) < 4:
        return {}
    half = len(places) // 2
    block = weights[:, int(places[half]):, places[:half]]  # every one of these rows sees all of these columns
    mass = block.sum(dim=-1)
    known = (mass > 0).float()  # in half precision a row may have nothing left there
    rows = block / mass.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    count = known.sum(dim=-1)
    mean = (rows * known[..., None]).sum(dim=-2) / count[:, None]
    divergence = entropy((rows + mean[:, None]) / 2) - (entropy(rows) + entropy(mean)[:, None]) / 2
    undefined = torch.where(count < 2, math.nan, 0.0)
    return {"barcode": 1 - (divergence * known).sum(dim=-1) / count / math.log(2) + undefined,
            "stripe_concentration": 1 - entropy(mean) / math.log(half) + undefined, "barcode_mass": mass.mean(dim=-1)}


def entropy(p: Tensor) -> Tensor:
    """(..., n) probabilities -> (...), nats."""
    return torch.special.entr(p).sum(dim=-1)


def uniform_attention(length: int) -> Tensor:
    """(T, T): every row looks evenly at all it sees."""
    return torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]


def attention_statistics(model: KarmaModel | PlainModel, requests: Sequence[tuple[np.ndarray, str]]
                         ) -> dict[str, dict[str, Any]]:
    """`head_statistics` of every layer, averaged over requests.

    Args:
        requests: (history, query) each; histories are (H,) catalogue indices, oldest first.

    Returns:
        name -> entry: value (mean over layers, heads and requests), standard_error (over requests), n (requests that
        are long enough), per_layer (L,), per_head (L, heads) and uniform, the value that attention spread evenly
        would have on the same prompts. The maps of one request are in memory at a time. A value is null, with its
        reason, where no request or no layer gives it.
    """
    requests_means: dict[str, list[float]] = {name: [] for name in STATISTICS}
    uniform: dict[str, list[float]] = {name: [] for name in STATISTICS}
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for history, query in requests:
        parts = prompt_parts(model, history, query)
        layers = [head_statistics(layer, parts) for layer in request_attention(model, history, query, len(parts))]
        level = head_statistics(uniform_attention(len(parts))[None], parts)
        for name in layers[0] if layers else ():
            found = np.stack([layer[name].cpu().double().numpy() for layer in layers])
            known = np.isfinite(found)
            sums[name] = sums.get(name, 0) + np.where(known, found, 0)
            counts[name] = counts.get(name, 0) + known
            requests_means[name].append(float(found[known].mean()) if known.any() else math.nan)
            uniform[name].append(float(level[name][0]))
    core = type(causal_lm(model.backbone)).__name__
    reason = ("no request has a history long enough" if sums else f"no layer of {core} reports attention weights")
    out = {}
    for name in STATISTICS:
        more: dict[str, Any] = {}
        if name in sums:
            with np.errstate(invalid="ignore"):
                per_head = sums[name] / counts[name]
            more = {"uniform": float(np.mean(uniform[name])), "per_head": per_head.round(5),
                    "per_layer": (sums[name].sum(axis=1) / np.maximum(counts[name].sum(axis=1), 1)).round(5)}
        out[name] = mean_entry(name, requests_means[name], reason, **more)
    return out


def request_attention(model: KarmaModel | PlainModel, history: np.ndarray, query: str, length: int) -> list[Tensor]:
    """The (heads, T, T) attention of every layer that has one, for one request, as serving reads it."""
    layers: list[Tensor] = []
    with recorded(causal_lm(model.backbone), layers.append):
        model.encode_users([history], [query])
    bad = [tuple(layer.shape) for layer in layers if layer.shape[-2:] != (length, length)]
    if bad:
        raise ValueError(f"attention of shape {bad[0]} was recorded for a prompt of {length} positions; prompt_parts "
                         "does not describe what this model reads")
    return layers


MAP_LENGTH = 64  # positions; longer prompts make maps that nobody can read


def layer_maps(model: KarmaModel | PlainModel, history: np.ndarray, query: str = "", layers: int = 3
               ) -> dict[str, list[list[float]]]:
    """Mean over the heads of the first, the last and evenly spaced further layers: "layer N" -> (T, T) weights.

    Empty for prompts of more than `MAP_LENGTH` positions.
    """
    parts = prompt_parts(model, history, query)
    if len(parts) > MAP_LENGTH:
        return {}
    found = request_attention(model, history, query, len(parts))
    chosen = np.unique(np.linspace(0, len(found) - 1, min(layers, len(found))).round().astype(int)) if found else []
    return {f"layer {n + 1}": found[n].float().mean(dim=0).cpu().double().numpy().round(4).tolist() for n in chosen}
