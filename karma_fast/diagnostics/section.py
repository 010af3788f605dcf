"""What was measured, for a reader: the section of a run's report, and the same table for a terminal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..evaluation.charts import sparkline
from ..evaluation.page import Block, Code, HeatMaps, Table, Text
from ..evaluation.verdict import number

# name of an entry -> its row
ROWS = {
    "sink_first": "sink at the first token, share of heads", "sink_history": "sink at an item, share of heads",
    "history_sink": "strongest item's mean attention", "barcode": "barcode index",
    "stripe_concentration": "concentration of the stripes", "look_first": "last row looks at the first token",
    "look_injected": "… injected vectors",
    "look_instruction": "… the instruction", "look_query": "… the query", "look_history": "… the history",
    "look_self": "… itself",
    "u_effective_rank": "effective rank of u", "u_mean_cosine": "mean cosine of two u",
    "u_first_component": "variance of u in one direction", "e_effective_rank": "effective rank of e",
    "e_mean_cosine": "mean cosine of two e",
    "text_nats": "items' texts, nats per token", "perplexity_ratio": "perplexity, tuned / untuned",
    "u_attributes_probe_map": "attributes read off u, MAP",
    "u_shuffled_attributes_probe_map": "… off shuffled u (control)",
    "u_title_probe_map": "title words read off u, MAP",
    "e_attributes_probe_map": "attributes read off e, MAP", "e_title_probe_map": "title words read off e, MAP",
    "decoder_matched": "fresh decoder, own u, nats", "decoder_shuffled": "fresh decoder, another's u, nats",
    "decoder_mean": "fresh decoder, the mean u, nats", "decoder_own_better": "own u is the better one",
    "attributes_js@50": "JS@50 by attributes (ours)", "title_js@50": "JS@50 by title words (ours)"}
REFERENCES = {"uniform": "even attention", "baseline": "word frequency", "popular": "popular items"}
LAYERS = ("sink_first", "history_sink", "barcode", "stripe_concentration")


def collapse_blocks(found: Any) -> list[Block]:
    """The blocks of what ``diagnostics.json`` holds; [] for anything else.

    >>> collapse_blocks({"states": []})
    []
    """
    rows = table_rows(found)
    if not rows:
        return []
    compared = found.get("compared")
    blocks: list[Block] = [Table(["", "untuned", "trained", "± standard error", "reference", "n"], rows)]
    lines = layer_lines(found)
    blocks += [Code(lines)] * bool(lines)
    blocks += heat_maps(found.get("maps"))
    notes = [f"{number(found.get('requests')):,.0f} held-out requests" if found.get("requests") else "",
             str(compared) if compared else "", f"texts of {found['texts']}" if found.get("texts") else "",
             f"decoder: {found['decoder']}" if found.get("decoder") else "",
             "reference: attention spread evenly over the same prompts, the words' frequency alone, or the most "
             "popular items", f"seed {found['seed']}" if found.get("seed") is not None else "",
             "docs/diagnostics.md defines every row"]
    return [*blocks, Text("; ".join(note for note in notes if note) + ".", "note")]


def table_rows(found: Any) -> list[list[str]]:
    """[what, untuned, trained, standard error, reference, n] for every row that has a value."""
    trained, untuned = (state(found, name) for name in ("trained", "untuned"))
    rows = []
    for name, label in ROWS.items():
        now, before = (entries.get(name) if isinstance(entries.get(name), dict) else {}
                       for entries in (trained, untuned))
        if not math.isfinite(number(now.get("value"))):
            continue
        reference = next((f"{show(now[key])} ({text})" for key, text in REFERENCES.items()
                          if math.isfinite(number(now.get(key)))), "–")
        count = number(now.get("n"))
        rows.append([label, show(before.get("value")), show(now["value"]), show(now.get("standard_error")), reference,
                     f"{count:,.0f}" if math.isfinite(count) else "–"])
    return rows


def state(found: Any, name: str) -> dict[str, Any]:
    states = found.get("states") if isinstance(found, dict) else None
    values = states.get(name) if isinstance(states, dict) else None
    return values if isinstance(values, dict) else {}


def show(value: Any) -> str:
    """
    >>> show(0.12345), show(31.4159), show(None)
    ('0.123', '31.4', '–')
    """
    value = number(value)
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}" if math.isfinite(value) else "–"


def layer_lines(found: Any) -> str:
    """A curve over the layers for each statistic, untuned above trained."""
    lines = []
    for name in LAYERS:
        for which in ("untuned", "trained"):
            entry = state(found, which).get(name)
            values = entry.get("per_layer") if isinstance(entry, dict) else None
            known = [number(v) for v in values] if isinstance(values, list) else []
            if any(map(math.isfinite, known)):
                lines.append(f"{name:<21} {which:<8} {sparkline(known)}  {np.nanmin(known):.3f} to "
                             f"{np.nanmax(known):.3f}")
    return "\n".join(["over the layers, first to last; each curve on its own scale", *lines]) if lines else ""


def heat_maps(found: Any) -> list[Block]:
    if not isinstance(found, dict) or not isinstance(found.get("labels"), list):
        return []
    labels, maps = [str(label) for label in found["labels"]], {}
    trained, untuned = (part if isinstance(part := found.get(which), dict) else {} for which in ("trained", "untuned"))
    for layer in trained:
        for which, part in (("untuned", untuned), ("trained", trained)):
            try:
                matrix = np.asarray(part.get(layer), dtype=np.float64)
            except (TypeError, ValueError):
                continue
            if matrix.shape == (len(labels), len(labels)):
                maps[f"{layer}, mean over heads, {which}"] = matrix
    return [HeatMaps(labels, maps)] if maps else []


def summary(found: dict[str, Any]) -> str:
    """The table of a result as aligned text."""
    rows = [["", "untuned", "trained", "±", "reference", "n"], *table_rows(found)]
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = [f"{row[0]:<{widths[0]}}  "
             + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True)) for row in rows]
    missing = {entry["reason"] for entry in state(found, "trained").values() if entry["value"] is None}
    return "\n".join([*lines, "", found["compared"], *(f"not measured: {reason}" for reason in sorted(missing))])
