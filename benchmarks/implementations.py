"""Every way to compute the loss that is compared: a function from inputs to the mean loss, and what it can do.

Other libraries are imported only when asked for. Where one is missing, or cannot do what a case needs, it is reported
as absent with the reason.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .cases import Case, Inputs

EVERYTHING = frozenset({"one direction", "both directions", "id mask", "logQ", "more keys than queries", "float32",
                        "CPU"})


@dataclass(frozen=True)
class Implementation:
    name: str
    loss: Callable[[Inputs], Tensor]
    offers: frozenset[str] = EVERYTHING
    probe: Callable[[str], object] = lambda device: None  # given the device; raises where it cannot run
    ours: bool = False
    workspace: bool = False  # takes Inputs.workspace_bytes


def absent(implementation: Implementation, case: Case, device: str) -> str | None:
    """Why it cannot be measured on this case, or None."""
    missing = case.needs(device) - implementation.offers
    if missing:
        return "does not offer: " + ", ".join(sorted(missing))
    return why_not(implementation.probe, device)


def why_not(probe: Callable[[str], object], device: str) -> str | None:
    """The first line of what the probe raises, without where on this machine a module lies; None if nothing."""
    try:
        probe(device)
    except Exception as error:  # a library that does not even import may raise anything
        return re.sub(r" \((/|[A-Z]:)[^)]*\)$", "", f"{type(error).__name__}: {error}".splitlines()[0])
    return None


# ------------------------------------------------------------------------------------------------ ours

def karma(inputs: Inputs, backend: str) -> Tensor:
    from karma_kernels import info_nce

    return info_nce(inputs.query, inputs.key, scale=inputs.scale, key_ids=inputs.key_ids, log_q=inputs.log_q,
                    symmetric=inputs.symmetric, backend=backend, workspace_bytes=inputs.workspace_bytes)


def probe_karma(device: str, backend: str) -> None:
    """Asks for a loss of no rows: says whether the backend exists here, without running a kernel."""
    from karma_kernels import info_nce

    nothing = torch.empty(0, 16, device=device)
    info_nce(nothing, nothing, backend=backend)


def ours(backend: str) -> Implementation:
    return Implementation(f"karma {backend}", functools.partial(karma, backend=backend), ours=True,
                          probe=functools.partial(probe_karma, backend=backend), workspace=backend != "reference")


# ------------------------------------------------------------------------------------------------ plain torch

def dense_loss(query: Tensor, key: Tensor, labels: Tensor | None, scale: float | Tensor,
               query_ids: Tensor | None = None, key_ids: Tensor | None = None, log_q: Tensor | None = None,
               symmetric: bool = False, normalize: bool = False, reduction: str = "mean") -> Tensor:
    """The whole score matrix in the dtype of the inputs and torch's cross-entropy, as most training loops have it."""
    if normalize:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    scores = (scale * query) @ key.T
    own = torch.arange(len(query), device=query.device)
    back = scores[:, :len(query)] if labels is None else scores[:, labels]
    labels = own if labels is None else labels
    logits = scores if log_q is None else scores - log_q.to(scores.dtype)
    if key_ids is not None:
        pair_ids = key_ids[labels]
        query_ids = pair_ids if query_ids is None else query_ids
        others = labels.unsqueeze(1) != torch.arange(len(key), device=key.device)
        logits = logits.masked_fill(same_item(query_ids, key_ids) & others, -torch.inf)
    loss = F.cross_entropy(logits, labels, reduction=reduction)
    if not symmetric:
        return loss
    if key_ids is not None:
        back = back.masked_fill(same_item(query_ids, pair_ids) & (own.unsqueeze(1) != own), -torch.inf)
    return (loss + F.cross_entropy(back.T, own, reduction=reduction)) / 2


def same_item(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """(B,), (N,) ids, or (B, 2), (N, 2) of two kinds -> (B, N), whether those of either kind are equal."""
    equal = query_ids.unsqueeze(1) == key_ids
    return equal if key_ids.ndim == 1 else equal.any(-1)


def dense(inputs: Inputs, function: Callable[..., Tensor] = dense_loss) -> Tensor:
    return function(inputs.query, inputs.key, None, inputs.scale, key_ids=inputs.key_ids, log_q=inputs.log_q,
                    symmetric=inputs.symmetric)


@functools.cache
def compiled_dense() -> Callable[..., Tensor]:
    # for each shape anew: a kernel for any shape would be slower; the runner resets the compiler between cases
    return torch.compile(dense_loss, dynamic=False, fullgraph=True)


def compiled(inputs: Inputs) -> Tensor:
    return dense(inputs, compiled_dense())


def both_ways(loss: Callable[[Tensor, Tensor, Inputs], Tensor], inputs: Inputs) -> Tensor:
    """A loss of one direction, called a second time with queries and keys changed over if both are wanted."""
    there = loss(inputs.query, inputs.key, inputs)
    return (there + loss(inputs.key, inputs.query, inputs)) / 2 if inputs.symmetric else there


def torch_chunked(inputs: Inputs, fill_workspace: bool) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` in chunks: of its own choice, or such that the scores of a chunk fill
    the workspace."""
    rows = max(1, inputs.workspace_bytes // (inputs.key.shape[0] * inputs.key.element_size()))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows if fill_workspace else None)

    def one_way(query: Tensor, key: Tensor, inputs: Inputs) -> Tensor:
        bias = -inputs.log_q.to(query.dtype) if inputs.log_q is not None and query is inputs.query else None
        return F.linear_cross_entropy(inputs.scale * query, key, inputs.labels, linear_bias=bias, options=options)

    return both_ways(one_way, inputs)


def probe_torch_chunked(device: str) -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise NotImplementedError(f"torch {torch.__version__} has no chunked linear_cross_entropy; 2.13 has")


# ------------------------------------------------------------------------------------------------ other libraries

@functools.cache
def ranking_loss(scale: float, symmetric: bool) -> torch.nn.Module:
    try:
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    except ImportError:
        from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    directions = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    return MultipleNegativesRankingLoss(None, scale=scale, similarity_fct=dot_score,
                                        **(directions if symmetric else {}))


def sentence_transformers(inputs: Inputs) -> Tensor:
    """Its loss on ready embeddings: queries, their documents, and further documents as negatives."""
    rows = inputs.query.shape[0]
    documents = [inputs.key] if inputs.key.shape[0] == rows else [inputs.key[:rows], inputs.key[rows:]]
    loss = ranking_loss(inputs.scale, inputs.symmetric)
    return loss.compute_loss_from_embeddings([inputs.query, *documents], inputs.labels)


def open_clip(inputs: Inputs) -> Tensor:
    from open_clip.loss import ClipLoss

    return ClipLoss()(inputs.query, inputs.key, inputs.scale)


def memeff(inputs: Inputs) -> Tensor:
    """stable=False gives the gradient of the loss itself; a margin of 2 masks nothing."""
    from memeff import MemoryEfficientCLIPLoss, MemoryEfficientQwen3Loss

    options = {"temperature": 1 / inputs.scale, "normalized_inputs": True, "stable": False}
    loss = MemoryEfficientCLIPLoss(**options) if inputs.symmetric else MemoryEfficientQwen3Loss(margin=2.0, **options)
    return loss(inputs.query, inputs.key)


def cut_cross_entropy(inputs: Inputs) -> Tensor:
    """Gradient filtering, its default, is off: it leaves out small gradients, which here add up."""
    from cut_cross_entropy import linear_cross_entropy

    def one_way(query: Tensor, key: Tensor, inputs: Inputs) -> Tensor:
        return linear_cross_entropy(inputs.scale * query, key, inputs.labels, filter_eps=None)

    return both_ways(one_way, inputs)


def inf_cl(inputs: Inputs) -> Tensor:
    """It cuts the width into heads of equal size, a power of two."""
    from inf_cl import cal_flash_loss

    width = inputs.query.shape[1]
    head = min(256, width & -width)

    def one_way(query: Tensor, key: Tensor, inputs: Inputs) -> Tensor:
        return cal_flash_loss(query, key, inputs.labels, inputs.scale, head).mean()

    return both_ways(one_way, inputs)


def importing(*modules: str) -> Callable[[str], None]:
    def probe(device: str) -> None:
        for module in modules:
            importlib.import_module(module)

    return probe


IMPLEMENTATIONS = (
    ours("auto"), ours("chunked"), ours("fused"), ours("reference"),
    Implementation("dense", dense),
    Implementation("dense, torch.compile", compiled),
    Implementation("torch linear_cross_entropy", functools.partial(torch_chunked, fill_workspace=False),
                   EVERYTHING - {"id mask"}, probe_torch_chunked),
    Implementation("torch linear_cross_entropy, chunks by workspace",
                   functools.partial(torch_chunked, fill_workspace=True), EVERYTHING - {"id mask"},
                   probe_torch_chunked, workspace=True),
    Implementation("sentence-transformers", sentence_transformers, EVERYTHING - {"id mask", "logQ"},
                   importing("sentence_transformers")),
    Implementation("open_clip", open_clip, frozenset({"both directions", "float32", "CPU"}), importing("open_clip")),
    Implementation("memeff", memeff, frozenset({"one direction", "both directions", "float32"}), importing("memeff")),
    Implementation("cut-cross-entropy, exact", cut_cross_entropy,
                   frozenset({"one direction", "both directions", "more keys than queries"}),
                   importing("cut_cross_entropy")),
    Implementation("Inf-CL", inf_cl,
                   frozenset({"one direction", "both directions", "more keys than queries", "float32"}),
                   importing("inf_cl")),
)
