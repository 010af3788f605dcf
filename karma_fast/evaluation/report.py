"""A run's report: one self-contained HTML page and the same content as Markdown.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> rows = {"popularity": {"HR@10": 0.08}, "karma": {"HR@10": 0.16}}
>>> _ = (folder / "metrics.json").write_text(json.dumps({"rows": rows}))
>>> html, markdown = write_report(folder)
>>> markdown.read_text().splitlines()[2]
'**KARMA beats the best baseline, popularity: HR@10 0.1600 against 0.0800 (2.00×).**'
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from .page import Block, Chart, Charts, Code, Example, HeatMaps, Section, Table, Text, to_html, to_markdown
from .verdict import METRIC, key_of, name_of, number, requests_of, verdict

FILES = ("metrics.json", "log.jsonl", "examples.json", "attention.json", "config.yaml")
TERMS = {"act": "the next item", "gen": "its text, given the history", "rec": "its text, given the embedding",
         "vis": "its image, given the embedding", "user": "injected vectors of requests and their prompts' states",
         "item": "the same of items"}
SHOWN_HISTORY = 8  # latest items of an example's history that are listed
COLUMNS = ("HR@1", "HR@5", "HR@10", "HR@50", "HR@200", "NDCG@10", "recall@10", "MRR", "AUC")


def write_report(run_folder: str | Path) -> tuple[Path, Path]:
    """Writes ``report.html`` and ``report.md`` into a run's folder and returns their paths.

    Reads what is there of metrics.json, log.jsonl, examples.json, attention.json, diagnostics.json and config.yaml; a
    section without data is left out, and a file that cannot be read is named in the report.

    Raises:
        FileNotFoundError: the folder holds none of these files.
    """
    from ..model.storage import write_atomically

    folder = Path(run_folder)
    title, sections = build_report(folder)
    html, markdown = folder / "report.html", folder / "report.md"
    write_atomically(html, to_html(title, sections))
    write_atomically(markdown, to_markdown(sections))
    return html, markdown


def build_report(folder: Path) -> tuple[str, list[Section]]:
    """(page title, sections) of a run; see `write_report`."""
    if not any((folder / name).exists() for name in FILES):
        raise FileNotFoundError(f"{folder}: holds no run to report on ({', '.join(FILES)} are all missing); give the "
                                "folder that training wrote, for example runs/demo")
    problems: list[str] = []
    metrics = _json(folder / "metrics.json", dict, problems)
    log = read_log(folder / "log.jsonl", problems)
    examples = _json(folder / "examples.json", list, problems)
    attention = _json(folder / "attention.json", dict, problems)
    measured = _json(folder / "diagnostics.json", dict, problems)
    config = folder / "config.yaml"
    settings = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    title = f"{name_of(own_row(metrics))} run {folder.resolve().name}"
    sections = [Section(title, verdict_blocks(metrics, log, problems)), Section("Metrics", metric_blocks(metrics)),
                Section("Validation during training", evaluation_blocks(log)), Section("Loss parts", loss_blocks(log)),
                Section("Scale, speed and memory", speed_blocks(log)), Section("Gradient shares", share_blocks(log)),
                Section("Decoded examples", example_blocks(examples)),
                Section("Does the embedding know its own item?", decoding_blocks(metrics.get("decoding"))),
                Section("Attention", attention_blocks(attention)),
                Section("Collapse, measured", measured_blocks(measured)),
                Section("Where the time went", time_blocks(metrics)),
                Section("Settings and versions", setting_blocks(metrics, settings))]
    return title, [section for section in sections if section.blocks]


# ---- reading -----------------------------------------------------------------------------------------------------


def _json(path: Path, kind: type, problems: list[str]) -> Any:
    """The file's value, or an empty one."""
    if not path.exists():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8
        problems.append(f"{path.name} cannot be read ({error})")
        return kind()
    if not isinstance(value, kind):
        problems.append(f"{path.name} holds a {type(value).__name__} instead of a {kind.__name__}")
        return kind()
    return value


def read_log(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The lines of a JSONL log in the order of their steps; lines that are no JSON object are counted as a problem."""
    if not path.exists():
        return []
    rows, bad = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += bool(text.strip())
    if bad:
        problems.append(f"{path.name} has {bad} {'line' if bad == 1 else 'lines'} that cannot be read")
    return sorted(rows, key=step_of)


def listed(values: dict[str, Any], key: str) -> list[Any]:
    return values[key] if isinstance(values.get(key), list) else []


def step_of(row: dict[str, Any]) -> float:
    step = number(row.get("step"))
    return step if math.isfinite(step) else 0.0


def curve(log: list[dict[str, Any]], key: str, factor: float = 1.0) -> tuple[list[float], list[float]]:
    """(steps, values) of the lines that have ``key``."""
    rows = [row for row in log if math.isfinite(number(row.get(key))) or isinstance(row.get(key), float)]
    return [step_of(row) for row in rows], [number(row[key]) * factor for row in rows]


def _charts(log: list[dict[str, Any]], titles: dict[str, str], notes: dict[str, str] | None = None) -> list[Block]:
    """A chart for each key of the log; those without a finite value are left out."""
    charts = []
    for key, title in titles.items():
        steps, values = curve(log, key, 1e-9 if key.endswith("_bytes") else 1.0)
        if any(map(math.isfinite, values)):
            charts.append(Chart(title, {key: (steps, values)}, (notes or {}).get(key, "")))
    return _with_gaps(charts, log)


def _with_gaps(charts: list[Chart], log: list[dict[str, Any]]) -> list[Block]:
    if not charts:
        return []
    blocks: list[Block] = [Charts(charts, max(map(step_of, log)))]
    gaps = [f"{sum(bad)} of {chart.title if len(chart.series) == 1 else name}" for chart in charts
            for name, (_, values) in chart.series.items() if any(bad := [not math.isfinite(v) for v in values])]
    if gaps:
        blocks.append(Text(f"Values that are not finite (NaN or infinite) leave gaps: {', '.join(gaps)}.", "warning"))
    return blocks


# ---- sections ----------------------------------------------------------------------------------------------------


def metric_rows(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = metrics.get("rows")
    return {str(k): v for k, v in rows.items() if isinstance(v, dict)} if isinstance(rows, dict) else {}


def own_row(metrics: dict[str, Any]) -> str:
    """Name of the trained model's row, which is its recipe's."""
    return str(metrics.get("recipe") or "karma")


def verdict_blocks(metrics: dict[str, Any], log: list[dict[str, Any]], problems: list[str]) -> list[Block]:
    rows = metric_rows(metrics)
    if rows:
        lead, *rest = verdict(rows, requests_of(metrics), own_row(metrics))
    else:
        lead, rest = "No final metrics: this run has not been compared with any baseline.", _progress(log)
    blocks: list[Block] = [Text(lead, "lead"), *([Text(" ".join(rest))] if rest else [])]
    return blocks + [Text(f"Incomplete: {'; '.join(problems)}.", "warning")] * bool(problems)


def _progress(log: list[dict[str, Any]]) -> list[str]:
    out = []
    steps, losses = curve(log, "loss")
    if losses:
        out.append(f"Its log ends at step {max(map(step_of, log)):,.0f} with a training loss of {losses[-1]:.4g}.")
    found = [(value, step) for step, value in zip(*curve(log, f"eval_{METRIC}"), strict=True) if math.isfinite(value)]
    if found:
        value, step = max(found)
        out.append(f"Its best validation {METRIC} is {value:.4f}, at step {step:,.0f}.")
    return out


def metric_blocks(metrics: dict[str, Any]) -> list[Block]:
    rows = metric_rows(metrics)
    columns = [c for c in COLUMNS if any(math.isfinite(number(row.get(c))) for row in rows.values())]
    if not columns:
        return []
    values = np.array([[number(row.get(c)) for c in columns] for row in rows.values()])
    best = {(r, c + 1) for c in range(len(columns)) for r in range(len(rows))
            if len(rows) > 1 and values[r, c] == np.nanmax(values[:, c])}
    cells = [[name_of(name), *(f"{v:.4f}" if math.isfinite(v) else "–" for v in line)]
             for name, line in zip(rows, values, strict=True)]
    strong = next((n for n, name in enumerate(rows) if key_of(name) == key_of(own_row(metrics))), None)
    blocks: list[Block] = [Table(["", *columns], cells, best, strong)]
    protocol = str(metrics.get("protocol") or "not recorded")
    note = "Best of each column marked. " if best else ""
    seed = f"; seed {metrics['seed']}" if metrics.get("seed") is not None else ""
    return [*blocks, Text(f"Protocol: {protocol.rstrip('. ')}{seed}. {note}", "note")]


def evaluation_blocks(log: list[dict[str, Any]]) -> list[Block]:
    blocks = _charts(log, {f"eval_{name}": name for name in ("HR@10", "HR@50", "NDCG@10", "MRR")})
    if blocks:
        blocks.append(Text("On validation requests, ranked against the whole catalogue; not to be compared with the "
                           "table above, which is of test requests.", "note"))
    return blocks


def loss_blocks(log: list[dict[str, Any]]) -> list[Block]:
    blocks = _charts(log, {term: f"L_{term}" for term in TERMS}, TERMS) or _charts(log, {"loss": "total loss"})
    if any(isinstance(block, Charts) for block in blocks):
        blocks.append(Text("Unweighted terms over the training steps, each on its own axis, with the first and the "
                           "last value. L_act depends on the number of negatives; L_gen and L_rec are nats per token.",
                           "note"))
    return blocks


def speed_blocks(log: list[dict[str, Any]]) -> list[Block]:
    return _charts(log, {"scale": "logit scale", "tokens_per_second": "tokens per second",
                         "peak_memory_bytes": "peak memory, GB", "grad_norm": "gradient norm"})


def share_blocks(log: list[dict[str, Any]]) -> list[Block]:
    charts, rows = [], []
    for where, title in (("share_u", "embedding u"), ("share_llm", "LLM weights")):
        series = {}
        for term in TERMS:
            steps, values = curve(log, f"{where}/{term}", 100.0)
            known = [v for v in values if math.isfinite(v)]
            if known:
                series[term] = (steps, values)
                rows.append([f"{title}: {term}", f"{known[0]:.0f}", f"{np.mean(known):.0f}", f"{known[-1]:.0f}"])
        if series:
            charts.append(Chart(f"{title}, %", series))
    if not charts:
        return []
    return [*_with_gaps(charts, log), Table(["gradient share, %", "first", "mean", "last"], rows),
            Text("Norm of each weighted term's gradient, at u and over the trained weights of the language model, "
                 "divided by the sum of these norms. L_gen does not reach u.", "note")]


def example_blocks(examples: list[Any]) -> list[Block]:
    return [_example(n, e) for n, e in enumerate(examples, 1) if isinstance(e, dict)]


def _example(n: int, example: dict[str, Any]) -> Example:
    target = str(example.get("target") or "")
    history = [str(title) for title in listed(example, "history")]
    top, found = [], False
    for entry in listed(example, "top"):
        entry = entry if isinstance(entry, dict) else {"title": entry}
        title, score = str(entry.get("title", "")), number(entry.get("score"))
        hit = entry.get("hit")
        if not isinstance(hit, bool):  # a file of before; the target's text begins with its title
            hit = not found and bool(title) and (target == title or target.startswith(f"{title} | "))
        found = found or hit
        top.append((title, f"{score:.3f}" if math.isfinite(score) else "–", hit))
    rank = number(example.get("target_rank"))
    place = f" (rank {rank:,.0f})" if 0 < rank < math.inf else ""
    facts = [("Search", example.get("query")), ("Target", target and target + place),
             ("Decoded from the embedding alone", example.get("decoded"))]
    return Example(f"User {example.get('user', n)}", history[-SHOWN_HISTORY:], max(0, len(history) - SHOWN_HISTORY),
                   top, [(name, str(text)) for name, text in facts if text])


def decoding_blocks(decoding: Any) -> list[Block]:
    if not isinstance(decoding, dict):
        return []
    matched, shuffled = number(decoding.get("matched_loss")), number(decoding.get("shuffled_loss"))
    if not (math.isfinite(matched) and math.isfinite(shuffled)):
        return []
    users, better = number(decoding.get("users")), number(decoding.get("share_better"))
    gap, mean = shuffled - matched, number(decoding.get("mean_loss"))
    rows = [["own embedding (matched)", f"{matched:.3f}"], ["another user's (shuffled)", f"{shuffled:.3f}"],
            ["difference", f"{gap:+.3f}"]]
    costs = f"{matched:.3f} nats per token from the user's own embedding, {shuffled:.3f} from another user's"
    if math.isfinite(mean):
        rows.insert(2, ["the mean of all embeddings", f"{mean:.3f}"])
        costs += f", {mean:.3f} from the mean of all embeddings"
    wins = better > 0.5 + 2 * math.sqrt(0.25 / users) if users > 0 else False  # by two standard errors of chance
    if gap <= 0:
        said = "No: the target's text is decoded no better from the user's own embedding than from another user's."
    elif wins and matched < mean:
        said = (f"Yes: the target's text costs {gap:.3f} nats per token less when it is decoded from the user's own "
                "embedding than from another user's.")
    elif wins and matched >= mean:
        said = f"Hardly yet: the target's text costs {costs}, so one embedding for everybody does as well."
    else:
        said = f"No evidence yet: the target's text costs {costs}."
    if math.isfinite(better):
        of = f" of {users:,.0f} users" if math.isfinite(users) else ""
        said += f" The own embedding wins for {100 * better:.0f}%{of}; 50% would be chance."
    return [Text(said), Table(["loss of the target's text, nats per token", "L_rec"], rows)]


def attention_blocks(attention: dict[str, Any]) -> list[Block]:
    labels = [str(label) for label in listed(attention, "labels")]
    maps = {}
    for key, name in (("before", "Before training"), ("after", "After training")):
        try:
            matrix = np.asarray(attention.get(key), dtype=np.float64)
        except (TypeError, ValueError, OverflowError):  # ragged, or not numbers
            continue
        if labels and matrix.shape == (len(labels), len(labels)):
            maps[name] = matrix
    if not maps:
        return []
    whose = f" of user {attention['user']}" if attention.get("user") else ""
    note = f" {attention['note']}" if attention.get("note") else ""
    return [HeatMaps(labels, maps), Text(
        f"Mean attention over heads and layers for one prompt{whose}. A row is a position of the prompt, a column is "
        "what it looks at. Both maps share one colour scale, the square root of the weight, so that small weights can "
        "be seen. A vertical stripe is a position that all later ones look at. One at the first token is normal: "
        "language models park unused attention there (an attention sink). Stripes over a few items, the same for all "
        "rows below, are what collapse looks like: the model matches a few items by identity and no longer reads the "
        f"rest. This is a picture of one prompt, not a measurement.{note}", "note")]


def measured_blocks(measured: dict[str, Any]) -> list[Block]:
    """What `karma-fast diagnose` found."""
    from ..diagnostics.section import collapse_blocks

    return collapse_blocks(measured)


def time_blocks(metrics: dict[str, Any]) -> list[Block]:
    stages = metrics.get("stage_seconds")
    stages = {str(k): number(v) for k, v in stages.items()} if isinstance(stages, dict) else {}
    stages = {k: v for k, v in stages.items() if math.isfinite(v) and v >= 0}
    total, known = number(metrics.get("seconds")), sum(stages.values())
    if not stages:
        return []
    if known * 1.01 < total < math.inf:
        stages["everything else"] = total - known
    total = max(total, known) if math.isfinite(total) else known
    shares = [v / total if total else 0.0 for v in stages.values()]
    rows = [[name, duration(v), f"{100 * s:.0f}%"] for (name, v), s in zip(stages.items(), shares, strict=True)]
    return [Table(["stage", "time", "share"], [*rows, ["total", duration(total), "100%"]], strong=len(rows),
                  bars=[*shares, 0.0])]


def duration(seconds: float) -> str:
    """
    >>> duration(4.25), duration(135), duration(7322), duration(math.inf)
    ('4.2 s', '2 min 15 s', '2 h 2 min', '–')
    """
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def setting_blocks(metrics: dict[str, Any], settings: str) -> list[Block]:
    versions = metrics.get("versions")
    versions = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else versions
    seconds, memory = number(metrics.get("seconds")), number(metrics.get("peak_rss_bytes"))
    facts = [("command", metrics.get("command")), ("device", metrics.get("device")), ("seed", metrics.get("seed")),
             ("versions", versions), ("wall time", duration(seconds) if math.isfinite(seconds) else None),
             ("peak memory", f"{memory / 1e9:.2f} GB" if math.isfinite(memory) else None)]
    rows = [[name, str(value)] for name, value in facts if value not in (None, "")]
    blocks: list[Block] = [Table(["", ""], rows, wraps=True)] if rows else []
    return blocks + [Code(settings)] * bool(settings.strip())
