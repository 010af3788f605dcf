"""The report of a run: what it says, that it survives broken runs, and that nothing in a title can break the page."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karma_fast.evaluation.charts import heat_map, line_chart, sparkline, text_heat_map, tick_labels, ticks
from karma_fast.evaluation.page import Section, Table, columns, to_markdown
from karma_fast.evaluation.report import write_report
from karma_fast.evaluation.verdict import standard_error, verdict

NASTY = '<script>alert("x")</script> & \'quotes\' | *stars* [link](x) `code`'
TITLES = ["Toy Story", "GoldenEye", "Four Rooms", "Get Shorty", "Twelve Monkeys", "Dead Man Walking", "Seven", "Babe",
          "Mighty Aphrodite", "Postino, Il", "French Twist (Gazon maudit)", "From Dusk Till Dawn", "White Balloon, The",
          "Antonia's Line", "Angels and Insects", "Rumble in the Bronx", "Birdcage, The", "Brothers McMullen, The"]


def synthetic_run(folder, steps=340, seed=0):
    """A realistic run folder, made from a seed alone."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)

    def noise(scale):
        return float(random.normal(0, scale))

    lines = []
    for step in range(10, steps + 1, 10):
        done = step / steps
        line = {"step": step, "epoch": done, "loss": 6.2 - 2.1 * done + noise(0.1), "grad_norm": 1.4 + noise(0.2),
                "learning_rate": 3e-4 * (1 - done), "act": 5.6 - 1.5 * (1 - math.exp(-4 * done)) + noise(0.06),
                "gen": 3.1 - 1.2 * (1 - math.exp(-5 * done)) + noise(0.08),
                "rec": 4.4 - 1.9 * (1 - math.exp(-3 * done)) + noise(0.1), "vis": 1.1 - 0.4 * done + noise(0.02),
                "scale": 14.3 + 6 * done, "tokens_per_second": 3420 + noise(90), "peak_memory_bytes": int(1.92e9 + 2e8 * done),
                "share_u/act": 0.80 - 0.1 * done + noise(0.02), "share_u/rec": 0.15 + 0.1 * done + noise(0.02),
                "share_u/vis": 0.05 + noise(0.005)}
        if step % 50 == 0:
            line |= {"share_llm/act": 0.6 + noise(0.03), "share_llm/gen": 0.3 + noise(0.03), "share_llm/rec": 0.1}
        lines.append(line)
        if step % 60 == 0:
            lines.append({"step": step, "epoch": done, "eval_HR@1": 0.02, "eval_HR@10": 0.07 + 0.06 * done + noise(0.004),
                          "eval_HR@50": 0.25 + 0.1 * done + noise(0.005), "eval_NDCG@10": 0.035 + 0.03 * done,
                          "eval_MRR": 0.04 + 0.02 * done + noise(0.002)})
    lines.append({"step": steps, "train_runtime": 301.2, "train_loss": 4.9})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def row(*values):
        names = ("HR@1", "HR@5", "HR@10", "HR@50", "HR@200", "NDCG@10", "MRR", "AUC", "tie_share", "NDCG@1")
        return dict(zip(names, values, strict=True))

    metrics = {"rows": {
        "popularity": row(0.0095, 0.0339, 0.0541, 0.1909, 0.4899, 0.0273, 0.0284, 0.8113, 0.4, 0.0095),
        "item_knn": row(0.0201, 0.0668, 0.1166, 0.3446, 0.6818, 0.0582, 0.0529, 0.8890, 0.0, 0.0201),
        "title_tfidf": row(0.0032, 0.0106, 0.0191, 0.0753, 0.2386, 0.0096, 0.0111, 0.5842, 0.5, 0.0032),
        "karma_untrained": row(0.0095, 0.0435, 0.0817, 0.2556, 0.5556, 0.0395, 0.0380, 0.8500, 0.0, 0.0095),
        "karma": row(0.0223, 0.0774, 0.1304, 0.3796, 0.7211, 0.0667, 0.0591, 0.9012, 0.0, 0.0223)},
        "protocol": "MovieLens-100K: 943 requests ranked against all 1,682 items, seen items left out, ties count half, the "
                    "model reads the last 20 items; leave one out: last event test, last but one validation; equal timestamps "
                    "shuffled with seed 0",
        "seconds": 512.4, "stage_seconds": {"data": 4.2, "model": 38.1, "untrained": 22.0, "train": 301.2, "evaluate": 88.0,
                                            "index": 1.4},
        "peak_rss_bytes": 2_310_000_000, "seed": 0, "command": "karma-fast demo --data.name MovieLens-100K",
        "versions": {"python": "3.11.7", "karma-fast": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.19.0"},
        "device": "CPU, 2 cores, AVX-512",
        "decoding": {"matched_loss": 2.412, "shuffled_loss": 2.871, "users": 200, "share_better": 0.87}}
    (folder / "metrics.json").write_text(json.dumps(metrics))

    def example(user, target, hit):
        top = [str(t) for t in random.choice(TITLES, 5, replace=False) if t != target][:4]
        top.insert(2 if hit else 4, target if hit else "Fargo")
        return {"user": str(user), "history": [str(t) for t in random.choice(TITLES, 16, replace=False)], "query": "",
                "target": f"{target} | 1995 | Drama Thriller", "target_rank": 3 if hit else 118,
                "top": [{"title": t, "score": 0.71 - 0.04 * n} for n, t in enumerate(top)],
                "decoded": f"{target[:6]} | 1995 | Drama", "decoded_untrained": "the the | The | 1"}

    examples = [example(196, "Seven", True), example(22, "Toy Story", False), example(7, "Babe", True)]
    examples[2] |= {"query": NASTY, "history": [NASTY, "Supercalifragilistic" * 6, "ابن القرصان (1999)", "千と千尋の神隠し"]}
    examples[2]["top"][0]["title"] = NASTY
    (folder / "examples.json").write_text(json.dumps(examples))

    labels = ["The", "user", "chose", ",", "oldest", "first", ":", *TITLES[:16], "חלום מתוק", NASTY[:24], "[EMB]"]
    size = len(labels)

    def attention(stripes):
        logits = random.normal(0, 0.7, (size, size)) - 0.08 * np.subtract.outer(np.arange(size), np.arange(size))
        logits[:, 0] += 3.5
        logits[:, stripes] += 2.2
        weights = np.where(np.tril(np.ones((size, size))) > 0, np.exp(logits), 0)
        return (weights / weights.sum(axis=1, keepdims=True)).round(5).tolist()

    (folder / "attention.json").write_text(json.dumps(
        {"labels": labels, "before": attention([]), "after": attention([9, 13]), "user": "196", "note": "30 layers, 9 heads."}))
    (folder / "config.yaml").write_text(
        "data:\n  interactions: ml-100k.inter\n  items: ml-100k.item\n  name: MovieLens-100K\n  split: leave_one_out\n  seed: 0\n"
        "model:\n  backbone: smollm2-135m-instruct\n  quantization: 4bit\n  tuning: lora\n  lora_rank: 16\n"
        "  embedding_dim: 256\n  positions: all\n  max_history: 20\n  max_text_tokens: 24\n"
        "  instruction: 'The user chose, oldest first:'\n  act_weight: 1.0\n  decode_weight: 0.1\n  gen_weight: 1.0\n"
        "  rec_weight: 1.0\n  vis_weight: 1.0\ntraining:\n  learning_rate: 0.0003\n  projection_learning_rate: 0.001\n"
        "  per_device_train_batch_size: 32\n  num_train_epochs: 1.0\n  logging_steps: 10\n")
    return folder
