"""One run from configuration to report: `karma-fast train` and `karma-fast demo` are this.

Everything lands in the run's folder: config.yaml, log.jsonl, checkpoint-N/, metrics.json, examples.json,
attention.json, model/ (weights, items, index) and report.html with report.md.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .baselines import baseline_rows
from .baselines.rows import KEYS
from .callbacks import Lines
from .checkpoints import last_checkpoint
from .commands.common import device_name, requests_to_rank, table
from .config import ConfigError, RunConfig
from .data import DataError
from .data.batches import KarmaCollator, request
from .data.check import checked
from .data.flat import draw
from .data.schema import Dataset
from .evaluation import held_out_ranks, seen_before, top_k
from .evaluation.attention import NoAttention, attention_map
from .evaluation.decoding import decoding_check
from .evaluation.evaluate import encode_requests, evaluate_model, protocol
from .evaluation.report import write_report
from .evaluation.verdict import verdict
from .model.recommender import Recommender
from .model.storage import versions, write_atomically
from .recipes import recipe
from .retrieval import ItemIndex, faiss_for
from .run_setup import banner, explain_memory, fit_to_gpu, prepare_folder, training_arguments
from .trainer import KarmaTrainer, peak_memory_bytes

EXAMPLES, PRINTED = 8, 3  # test requests in examples.json, and of these on the terminal
DECODED = 512  # test requests whose target's text is decoded with losses


def run(config: RunConfig, folder: str | Path, *, command: str = "", resume: bool = False, overwrite: bool = False,
        test_users: int | None = None, started: float | None = None, leave: bool = False,
        say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains and evaluates what ``config`` describes.

    Args:
        folder: of the run. One that holds a run already is refused, unless ``resume`` (go on from its last complete
            checkpoint) or ``overwrite``.
        command: recorded in metrics.json. test_users: test requests to evaluate on, drawn by a seed; 0: all; None:
            all, but at most ``MOST_REQUESTS``.
        started: `time.perf_counter()` at the start of what the recorded seconds count; default now.
        leave: whether this is the last training of several processes, so that their group ends after it.
        say: where the lines for the reader go.

    Returns what metrics.json holds. Raises ConfigError, DataError, FloatingPointError, MemoryError with what to do,
    and KeyboardInterrupt if Ctrl-C stopped the training (its last step is saved then).
    """
    started = time.perf_counter() if started is None else started
    folder, stages = Path(os.path.expanduser(folder)), {}
    args = training_arguments(config, folder)
    if config.model.index != "flat":
        try:
            faiss_for(config.model.index)  # now, as the index is made after the training
        except ImportError as error:
            raise ConfigError(f"model.index: {error}") from error
    leader = args.process_index == 0  # under torchrun the others only train
    bars = leader and not args.disable_tqdm
    say = say if leader else lambda text: None
    if leader:
        prepare_folder(folder, config, resume, overwrite)

    with stage("data", stages):
        data = checked_data(config, say)
        if config.model.positions == "all":
            KarmaCollator(config.model, None, data.sequences, None)  # refuses queries before any model is loaded
        positions = np.sort(requests_to_rank(data.split.test, test_users, say))
        shown = draw(positions, EXAMPLES, args.seed)
    config.model = fit_to_gpu(args, config.model, data, say)
    model_class = recipe(config.model.recipe).model_class()
    say(f"loading {config.model.backbone} and encoding {len(data.items):,} items")
    with stage("model", stages):
        model = model_class.build(config.model, data.items, data.sequences, data.split, seed=args.seed,
                                  device=args.device, progress=bars)
        trainer = KarmaTrainer(model, args, data, callbacks=[Lines()] if args.disable_tqdm else None)
    say("\n" + banner(trainer, data, folder))
    rows, own = {}, config.model.recipe
    if leader:
        say(f"ranking {len(positions):,} test requests before training")
        with stage("baselines", stages):
            rows |= {KEYS.get(name, name): row for name, row in baseline_rows(data, positions, progress=bars).items()}
        best = max(row["HR@10"] for row in rows.values())
        with stage("start", stages):
            before = encode_requests(model, data, positions, bars)
            rows[f"{own}_start"] = evaluate_model(model, data, positions, users=before, progress=bars)
            try:
                labels, map_before = attention_of(model, data, shown[0])
            except NoAttention as error:
                labels = []
                say(f"  {error}")
        say(f"  HR@10 {rows[f'{own}_start']['HR@10']:.4f}; best of the baselines {best:.4f}\n")

    with stage("training", stages):
        if resume:
            found = last_checkpoint(folder)
            say(f"going on from {found}" if found else f"{folder} has no complete checkpoint: starting at step 0")
        with explain_memory(args, config.model, folder):
            trainer.train(resume_from_checkpoint=resume, overwrite=overwrite)
        if leave:
            trainer.leave_processes()
    if trainer.interrupted:
        say(f"\nstopped at step {trainer.state.global_step}, which is saved in {folder}; the same command with "
            "--resume goes on from there")
        raise KeyboardInterrupt
    if not leader:
        return {}

    say(f"ranking {len(positions):,} test requests after training")
    with stage("evaluation", stages):
        after = encode_requests(model, data, positions, bars)
        rows[own] = evaluate_model(model, data, positions, users=after, progress=bars)
        of_users = data.sequences.first_of_each(positions)  # a decoding is compared with another user's
        drawn = np.searchsorted(positions, draw(of_users, DECODED, args.seed))
        decoding = decoding_check(model, after[drawn], data.sequences.items[positions[drawn]])
        examples = examples_of(model, data, shown, after[np.searchsorted(positions, shown)])
        if labels:
            _, map_after = attention_of(model, data, shown[0])
    there = len(data.split.test)
    metrics = {"recipe": own, "rows": rows, "requests": len(positions), "drawn_from": there, "seed": args.seed,
               "protocol": protocol(data, positions, config.model.max_history, drawn_from=there),
               "steps": trainer.state.global_step, "command": command, "versions": versions(),
               "device": device_name(args.device), "decoding": decoding}
    with stage("saving", stages):
        model.save_pretrained(folder / "model", {"data": data.name or config.data.interactions, **{
            name: metrics[name] for name in ("protocol", "rows", "requests", "seed", "steps", "command", "device")}})
        ItemIndex(model.encode_items(), model.config.index).save(folder / "model")
    write_json(folder / "examples.json", examples)
    if labels:
        write_json(folder / "attention.json", {
            "labels": labels, "before": map_before.tolist(), "after": map_after.tolist(), "user": examples[0]["user"],
            "note": "Before training the adapters change nothing, but the items' tokens come from untrained "
                    "projections."})
    metrics |= {"seconds": time.perf_counter() - started, "stage_seconds": stages,
                "peak_rss_bytes": peak_memory_bytes(model.device)}
    write_json(folder / "metrics.json", metrics)
    html, markdown = write_report(folder)
    say(summary(metrics, examples, len(data.items)))
    say(f"report  {html}\n        {markdown}\nmodel   {folder / 'model'}")
    return metrics


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Adds a part of the run to its list of times."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def checked_data(config: RunConfig, say: Callable[[str], None]) -> Dataset:
    """The dataset; DataError after a full report if it cannot be trained on."""
    report, data = checked(config.data)
    if data is None:
        say(report.to_text())
        raise DataError(f"{report.problems[0]}" + (f" ({len(report.problems) - 1} more above)"
                                                   if len(report.problems) > 1 else ""))
    for text in report.warnings:
        say(f"data warning: {text}")
    return data


def attention_of(model: Recommender, data: Dataset, position: int) -> tuple[list[str], np.ndarray]:
    return attention_map(model, *request(data.sequences, position, model.config.max_history))


def examples_of(model: Recommender, data: Dataset, positions: np.ndarray, u) -> list[dict[str, Any]]:
    """What examples.json holds: requests with history, target, the five best items and the decoded embedding."""
    items, sequences, vectors = data.items, data.sequences, model.encode_items()
    targets = sequences.items[positions].astype(np.int64)
    scores, best = top_k(u, vectors, 5, seen=seen_before(sequences, positions))
    ranks = held_out_ranks(sequences, positions, u, vectors).expected
    out = []
    texts = [None] * len(u) if model.decode_projection is None else model.decode(u)
    for n, (position, text) in enumerate(zip(positions, texts, strict=True)):
        history, query = request(sequences, position, model.config.max_history)
        out.append({"user": str(sequences.user_ids[sequences.user_of(position)]), "query": query,
                    "history": [name_of_item(items, i) for i in history],
                    "target": items.texts[targets[n]] or name_of_item(items, targets[n]),
                    "target_rank": int(ranks[n]) + 1,
                    "top": [{"title": name_of_item(items, i), "score": float(score), "hit": bool(i == targets[n])}
                            for i, score in zip(best[n], scores[n], strict=True) if i >= 0],
                    "decoded": text})
    return out


def name_of_item(items, index: int) -> str:
    return items.titles[index] or str(items.ids[index])


def summary(metrics: dict[str, Any], examples: list[dict[str, Any]], num_items: int) -> str:
    """The end of a run for the terminal: table, protocol, who wins, some users."""
    lines = ["", table(metrics["rows"]), "", metrics["protocol"], "",
             *verdict(metrics["rows"], metrics["requests"], metrics["recipe"])]
    if metrics["decoding"]:
        found = metrics["decoding"]
        lines.append(f"Decoding: a held-out target's text costs {found['matched_loss']:.3f} nats a token given its "
                     f"user's embedding, {found['shuffled_loss']:.3f} given another user's, {found['mean_loss']:.3f} "
                     f"given the mean of all; the own one is better than another's for {found['share_better']:.0%} of "
                     f"{found['users']} users (50% is chance).")
    for example in examples[:PRINTED]:
        lines += ["", f"user {example['user']}: ... {' > '.join(example['history'][-4:])}"]
        if example["query"]:
            lines.append(f"  searches     {example['query']}")
        lines += [f"  recommended  {'; '.join(entry['title'] for entry in example['top'])}"]
        if example["decoded"] is not None:
            lines.append(f"  decoded      {example['decoded']!r}")
        lines.append(f"  came next    {example['target']} (rank {example['target_rank']:,} of {num_items:,})")
    minutes, seconds = divmod(round(metrics["seconds"]), 60)
    return "\n".join([*lines, "", f"{minutes} min {seconds} s, peak memory {metrics['peak_rss_bytes'] / 1e9:.1f} GB"])

