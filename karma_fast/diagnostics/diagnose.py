"""All measurements of a model, as one JSON-able dictionary."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..data.batches import request
from ..data.flat import draw
from ..data.schema import DataError, Dataset
from ..evaluation import seen_before, top_k
from ..evaluation.evaluate import encode_requests
from ..model.storage import versions
from .attention import attention_statistics, layer_maps
from .attributes import attribute_texts, list_likeness, title_texts, word_matrix
from .decoder import decoder_entries
from .embeddings import embedding_statistics
from .entries import DEFINITIONS, mean_entry
from .perplexity import chosen_items, retained_perplexity
from .probe import probe_entries
from .states import Untuned

if TYPE_CHECKING:
    from ..model.karma import KarmaModel
    from .plain import PlainModel

FORMAT = 1
LISTED = 50
PROBED_ITEMS = 4096  # of a larger catalogue so many items are probed


@dataclasses.dataclass
class Sample:
    """The held-out requests that everything is measured on."""

    data: Dataset
    positions: np.ndarray  # (n,) flat positions of the targets
    attention: np.ndarray  # (a,) of these, those whose attention is looked at
    train: np.ndarray  # (n,) bool, requests of the users that probes are trained on
    decoder_steps: int
    seed: int
    progress: bool
    words: dict[str, Any]  # "attributes", "title" -> (N, V) sparse

    @property
    def targets(self) -> np.ndarray:
        return self.data.sequences.items[self.positions].astype(np.int64)


def diagnose(model: KarmaModel | PlainModel, data: Dataset, *, requests: int = 1024, attention_requests: int = 64,
             decoder_steps: int = 60, split: str = "test", seed: int = 0, untuned: bool = False,
             say: Callable[[str], None] | None = None, progress: bool = False) -> dict[str, Any]:
    """Measures collapse on held-out requests.

    Args:
        model: a `KarmaModel`, or a `karma_fast.diagnostics.PlainModel`; its items are those of the data.
        requests: held-out requests to look at, drawn by the seed; 0: all. attention_requests: of these, those whose
            attention is computed (eagerly, one at a time).
        decoder_steps: training steps of the fresh decoders; 0 leaves them out.
        split: ``"test"`` or ``"valid"``.
        untuned: also measure the same projections around the language model before tuning.
        say: told what is being done.

    Returns:
        ``{"states": {"trained": {name: entry}, "untuned": ...}, "definitions": ..., ...}``. An entry has value (None
        with a reason where there is none), n (sample size) and definition; see docs/diagnostics.md. Nothing in it is
        NaN.

    Raises:
        DataError: the split has no target. ValueError: ``untuned`` of a model whose untuned form is not known, or an
            argument that is not allowed.
    """
    started, say = time.perf_counter(), say or (lambda text: None)
    if split not in ("test", "valid"):
        raise ValueError(f"split: got {split!r}; test or valid is needed")
    if decoder_steps < 0:
        raise ValueError(f"decoder_steps: got {decoder_steps}; 0 (none) or more is needed")
    # of different users, so that another request is another user's
    positions = draw(data.sequences.first_of_each(getattr(data.split, split)), requests, seed)
    if not len(positions):
        raise DataError(f"the data has no {split} target, so nothing can be measured; see `karma-fast check-data`")
    users = data.sequences.user_of(positions)
    trained_on = np.random.default_rng(seed).permutation(np.unique(users))[::2]
    sample = Sample(data, positions, draw(positions, attention_requests, seed), np.isin(users, trained_on),
                    decoder_steps, seed, progress,
                    {"attributes": word_matrix(attribute_texts(data.items))[0],
                     "title": word_matrix(title_texts(data.items))[0]})
    before, reason = None, ""
    try:
        before = Untuned(model)
    except ValueError as error:
        if untuned:
            raise
        reason = str(error)
    states = {"trained": measured(model, before, sample, say)}
    if untuned:
        say("the same around the untuned language model:")
        with before.applied():
            states["untuned"] = measured(model, None, sample, say)
    say("reading item texts")
    items, which = chosen_items(data, seed)
    tuned, plain = retained_perplexity(model, before, [data.items.texts[i] for i in items], reason)
    states["trained"] |= tuned
    states.setdefault("untuned", {}).update(plain)
    first = sample.attention[0]
    return {
        "format": FORMAT, "data": data.name, "split": split, "requests": len(positions),
        "attention_requests": len(sample.attention), "seed": seed, "backbone": model.config.backbone,
        "untuned": None if before is None else before.how,
        "compared": "untuned: the language model before tuning "
                    f"({'unknown' if before is None else before.how}), around the same trained projections",
        "decoder": "the tuned language model, frozen" if before is None else "the untuned language model, frozen",
        "texts": which, "states": states, "definitions": DEFINITIONS,
        "maps": maps(model, before, *request(data.sequences, first, model.config.max_history)),
        "versions": versions(), "device": str(model.device), "seconds": round(time.perf_counter() - started, 1)}


def measured(model: KarmaModel | PlainModel, untuned: Untuned | None, sample: Sample, say: Callable[[str], None]
             ) -> dict[str, dict[str, Any]]:
    """All entries of the model as it is now; perplexity apart."""
    data, limit = sample.data, model.config.max_history
    say(f"attention of {len(sample.attention):,} requests")
    out = attention_statistics(model, [request(data.sequences, p, limit) for p in sample.attention])
    say(f"embeddings of {len(sample.positions):,} requests and {len(data.items):,} items")
    u = encode_requests(model, data, sample.positions, sample.progress).float()
    e = model.encode_items().float()
    for name, vectors in (("u", u), ("e", e)):
        out |= {f"{name}_{key}": value for key, value in embedding_statistics(vectors, sample.seed).items()}
    say("probes")
    out |= word_probes(u, e, sample)
    out |= likeness(u, e, sample)
    if sample.decoder_steps:
        say(f"a fresh decoder, {sample.decoder_steps} steps")
    with contextlib.nullcontext() if untuned is None else untuned.applied():
        return out | decoder_entries(model, u, sample.targets, sample.train, sample.decoder_steps, sample.seed,
                                     sample.progress)


def word_probes(u: Tensor, e: Tensor, sample: Sample) -> dict[str, dict[str, Any]]:
    """Linear probes of u for the target's words, of shuffled u as a control, and of e for the item's own words."""
    out, random = {}, np.random.default_rng(sample.seed)
    items = np.sort(random.permutation(len(e))[:PROBED_ITEMS])
    half = random.permutation(len(items)) % 2 == 0
    for kind, words in sample.words.items():
        for who, found in (("u", probe_entries(u.numpy(), words, sample.targets, sample.train)),
                           ("u_shuffled", probe_entries(u.numpy(), words, sample.targets, sample.train,
                                                        shuffle=sample.seed)),
                           ("e", probe_entries(e[items].numpy(), words, items, half))):
            out |= {f"{who}_{kind}_{name}": value for name, value in found.items()}
    return out


def likeness(u: Tensor, e: Tensor, sample: Sample) -> dict[str, dict[str, Any]]:
    """``js@50`` by attributes and by titles, beside lists of popular and of random items."""
    data, targets = sample.data, sample.targets
    seen = seen_before(data.sequences, sample.positions)
    counts = data.split.training_counts(data.sequences, len(data.items)).astype(np.float32)
    best = top_k(u, e, min(LISTED, len(data.items)), seen=seen)[1]
    popular = top_k(np.ones((len(u), 1), np.float32), counts[:, None], best.shape[1], seen=seen)[1]
    drawn = np.random.default_rng(sample.seed).integers(0, len(data.items), best.shape)
    out = {}
    for kind, words in sample.words.items():
        found, common, chance = (list_likeness(words, lists, targets) for lists in (best, popular, drawn))
        out[f"{kind}_js@50"] = mean_entry("js@50", found, f"no target has {kind} words",
                                          popular=mean_entry("js@50", common)["value"],
                                          random=mean_entry("js@50", chance)["value"])
    return out


def maps(model: KarmaModel | PlainModel, untuned: Untuned | None, history: np.ndarray, query: str) -> dict[str, Any]:
    """Maps of some layers for one request, trained and, where it is known, untuned; {} for too long a prompt."""
    trained = layer_maps(model, history, query)
    if not trained or not hasattr(model, "prompts"):
        return {}
    out = {"labels": model.prompts.labels(history, query, model.items), "trained": trained}
    if untuned is not None:
        with untuned.applied():
            out["untuned"] = layer_maps(model, history, query)
    return out
