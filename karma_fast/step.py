"""The backward of a batch whose prompts do not fit in memory at once: exact gradients, one chunk at a time.

L_act compares every pair with every other, so plain accumulation over chunks would lose negatives. Instead the
embeddings u of all chunks are made first, without a graph but for the last chunk's; L_act, L_rec and L_vis, which
depend on u alone, are formed once and leave the gradient of u; then each chunk is read again, and this gradient and
that of L_gen go back through it. The method is gradient caching (Gao et al. 2021, arXiv 2101.06983), extended to the
text losses.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .losses import Terms
from .model.backbone import causal_lm
from .model.recommender import Recommender


class OutOfMemory(MemoryError):
    """part: what did not fit: "prompts", "contrastive", "reconstruction"; in a trainer "optimiser", "evaluation"
    and "checkpoint" too.
    """

    def __init__(self, part: str, message: str) -> None:
        super().__init__(message)
        self.part = part


@dataclass
class StepResult:
    """What a backward tells, all of it () on the model's device, so that nothing waits for it.

    parts: the terms before weighting. norms_u, norms_llm: of each weighted term's gradient for u and for the trained
    weights of the language model; the latter only if asked for.
    """

    parts: Terms
    norms_u: dict[str, Tensor] = field(default_factory=dict)
    norms_llm: dict[str, Tensor] = field(default_factory=dict)


def backward(model: Recommender, batch, *, scale: float = 1.0, llm_norms: bool = False) -> StepResult:
    """Adds ``scale`` times the gradient of the batch's loss to ``.grad`` of the model's weights.

    The gradients that the loss of the whole batch has, with only one of ``batch.prompts`` and one of
    ``batch.decode`` in memory at a time. Of C chunks of prompts C - 1 are read twice, so one alone costs nothing more.

    With dropout in the language model, the second pass over a chunk draws what its first drew. Without it, the first
    pass leaves out the texts, which no u can see.

    Args:
        batch: of ``model.collator(..., chunk_size=)``.
        scale: 1 / number of batches whose gradients are accumulated.
        llm_norms: also measure the terms' gradients for the language model, at one backward a term.

    Raises:
        OutOfMemory: names the part. No weight was changed; the gradients are incomplete.
    """
    replay = len(batch.prompts) > 1 and draws_dropout(model.backbone)
    gradients = Gradients(model, llm_norms)
    parts = model.loss.parts()
    states, read = [], []
    for chunk in batch.prompts[:-1]:
        with within("prompts"), torch.no_grad():
            states.append(random_state(model.device) if replay else None)
            # a head with adapters draws too
            read.append(model.read(chunk if replay or chunk.bare is None else chunk.bare,
                                   gen=replay and model.head_is_trained)[0])
    with within("prompts"):
        kept = model.read(batch.prompts[-1])

    u = torch.cat([*read, kept[0].detach()]).requires_grad_()
    sizes = [len(x) for x in read] + [len(kept[0])]
    at_u: dict[str, Tensor] = {}
    for name, loss_of in model.embedding_losses(u, batch):
        with within("reconstruction" if name in ("rec", "vis") else "contrastive"):
            loss = loss_of()
            (found,) = gradients.add(name, [loss], [torch.full_like(loss, scale * model.loss.weights[name])], [u])
            if found is not None:  # a loss of the injected vectors alone has no gradient there
                at_u[name] = at_u[name] + found if name in at_u else found
            parts.add(name, loss.detach())
            del loss
    by_chunk = {name: g.split(sizes) for name, g in at_u.items()}

    for at in reversed(range(len(batch.prompts))):
        with within("prompts"):
            if kept is None:
                with drawing_from(states[at], model.device):
                    kept = model.read(batch.prompts[at])
            (chunk_u, gen), kept = kept, None
            terms = {name: ([chunk_u], [g[at]]) for name, g in by_chunk.items()}
            if model.loss.wants("gen"):
                weight = scale * model.loss.weights["gen"] / batch.num_texts
                terms["gen"] = [gen], [torch.full_like(gen, weight)]
                parts.add("gen", gen.detach() / batch.num_texts)
            gradients.add_all(terms)
            del chunk_u, gen, terms
    return StepResult(parts, {name: g.norm() for name, g in at_u.items()}, gradients.norms())


class Gradients:
    """Adds up gradients of the model's weights; if asked, also each term's alone for the language model."""

    def __init__(self, model: Recommender, by_term: bool) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.by_term = by_term
        llm = {id(p) for p in model.backbone.parameters()}
        self.in_llm = [n for n, p in enumerate(self.weights) if id(p) in llm]
        self.terms: dict[str, list[Tensor]] = {}

    def add(self, term: str, losses: Sequence[Tensor], factors: Sequence[Tensor], inputs: Sequence[Tensor] = ()
            ) -> tuple[Tensor, ...]:
        """Backward of sum(loss * factor); the gradients of ``inputs``."""
        if not self.by_term:
            for x in inputs:
                x.grad = None
            torch.autograd.backward(losses, factors)
            return tuple(x.grad for x in inputs)
        found = torch.autograd.grad(losses, [*inputs, *self.weights], factors, retain_graph=True, allow_unused=True)
        at_inputs, found = found[:len(inputs)], found[len(inputs):]
        for weight, g in zip(self.weights, found, strict=True):
            if g is not None:
                weight.grad = g if weight.grad is None else weight.grad + g
        sums = self.terms.setdefault(term, [torch.zeros((), device=g.device) for g in self.weights])
        for n in self.in_llm:
            if found[n] is not None:
                sums[n] = sums[n] + found[n]
        return at_inputs

    def add_all(self, terms: dict[str, tuple[list[Tensor], list[Tensor]]]) -> None:
        """Backward of several terms: (losses, factors) by name."""
        if self.by_term:
            for name, (losses, factors) in terms.items():
                self.add(name, losses, factors)
            return
        if not terms:  # no text was looked at, and nothing else is wanted
            return
        # a tensor that several terms reach goes through the graph once
        together: dict[int, tuple[Tensor, Tensor]] = {}
        for losses, factors in terms.values():
            for x, factor in zip(losses, factors, strict=True):
                together[id(x)] = (x, together[id(x)][1] + factor if id(x) in together else factor)
        self.add("", *zip(*together.values(), strict=True))

    def norms(self) -> dict[str, Tensor]:
        return {name: torch.stack([sums[n].float().square().sum() for n in self.in_llm]).sum().sqrt()
                for name, sums in self.terms.items() if self.in_llm}


def draws_dropout(backbone: nn.Module) -> bool:
    """Whether a pass in training mode may draw random numbers.

    Some families draw by functions, which only their configuration tells.
    """
    if not backbone.training:
        return False
    settings = causal_lm(backbone).config.get_text_config().to_dict()
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in backbone.modules()) or any(
        isinstance(value, (int, float)) and value > 0 for name, value in settings.items()
        if "drop" in name or "jitter" in name)


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextlib.contextmanager
def drawing_from(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Iterator[None]:
    """Random numbers as from `random_state`; afterwards as if nothing had been drawn. None: nothing is changed."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        set_random_state(state, device)
        yield


@contextlib.contextmanager
def within(part: str) -> Iterator[None]:
    """Says which part of a step ran out of memory, and lets go of what it held."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        raise OutOfMemory(part, first_line(error)) from None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "CUDA error: out of memory", "_ALLOC_FAILED"))


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
