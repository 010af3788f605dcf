"""Memory of a training step, part by part, and the settings that fit a budget."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import ConfigError, KarmaConfig
from ..data.schema import Dataset
from ..data.windows import negatives_of
from ..model.backbone import decoder_layers
from ..processes import several
from ..step import first_line
from .build import LAYERS, depth, layers_are_alike, simulated_model, weight_bytes
from .gpu import ASSUMED_CAPABILITY, has_bfloat16
from .optimiser import state_bytes
from .shapes import language_model
from .simulated import Simulation
from .timeline import REPEATED, Peak, Recorder, peak_of
from .workload import Numbers, Workload

if TYPE_CHECKING:
    from ..data.batches import KarmaBatch
    from ..model.karma import KarmaModel

# Assumed, not simulated: what a process takes on a GPU outside torch's allocator (context, kernels, libraries), the
# allocator's workspaces for cuBLAS, and its loss by cutting, as a share of what is in use
CUDA_CONTEXT, CUBLAS, FRAGMENTS = 500 << 20, 32 << 20, 0.04


class Unpredicted(ConfigError):
    """The simulation does not know the model, which may train all the same."""


@contextlib.contextmanager
def known_alone() -> Iterator[None]:
    """Of a simulation: whatever goes wrong in it is Unpredicted, but for settings that are wrong themselves."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise Unpredicted("the memory of this run could not be predicted "
                          f"({type(error).__name__}: {first_line(error)[:80]})") from error


@dataclass
class MemoryPlan:
    """Bytes of a step at its peak, by part; they add up to ``peak``.

    parts: "frozen weights" (4-bit ones packed, with their scales), "trained weights", "item features", "optimiser";
    at the moment of the peak "gradients" of weights, "activations" that forwards saved and "temporaries"; on a GPU
    "runtime", which is assumed. negatives: that each query sees. assumed: what was not known, in sentences. changes:
    where nothing fits, settings with the ``peak_bytes`` each would give, the best first.
    """

    parts: dict[str, int]
    backbone: str
    device_type: str
    batch_size: int
    chunk_size: int
    gradient_checkpointing: bool
    max_history: int
    negatives: int
    assumed: list[str] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def fits(self, budget_bytes: int) -> bool:
        return self.peak <= budget_bytes

    def to_dict(self) -> dict[str, Any]:
        return {"peak_bytes": self.peak, **dataclasses.asdict(self)}


@known_alone()
def plan_memory(config: KarmaConfig, *, batch_size: int = 32, chunk_size: int | None = None, device_type: str = "cuda",
                data: Dataset | None = None, tokenizer=None, optimiser: str = "adamw_torch_fused",
                capability: tuple[int, int] = ASSUMED_CAPABILITY) -> MemoryPlan:
    """The memory of a training step at its peak, from the language model's configuration alone.

    The model's own code runs on tensors without values, with three decoder layers that stand for all, or with all of
    them where their parameters differ. No weight is loaded and no GPU is needed.

    Args:
        config: the model's settings; ``backbone`` may be a name of `karma_fast.planning.shapes`.
        batch_size: windows of a step on one device. chunk_size: windows that are read at once; None: all.
        device_type: "cuda" or "cpu".
        data: its numbers and longest texts and histories are used; else the limits of the settings are taken to be
            met by every window, over 100,000 items.
        tokenizer: of the backbone, to count the instruction's tokens; else 4 characters are taken for one.
        optimiser: as in the training setting ``optim``.
        capability: the GPU's compute capability; before 8.0 there is no bfloat16, and numbers take twice the bytes.

    Raises ConfigError for a backbone whose configuration cannot be read, and its subclass Unpredicted for a model that
    the simulation does not know.

    Example:
        >>> config = KarmaConfig(backbone="smollm2-135m-instruct", quantization="none", decode_weight=0.0)
        >>> plan_memory(config, batch_size=512, chunk_size=2).fits(4 * 10**9)
        True
    """
    return Planner(config, batch_size=batch_size, device_type=device_type, data=data, tokenizer=tokenizer,
                   optimiser=optimiser, capability=capability).plan(chunk_size)


class Planner:
    """One simulated model, for plans with several chunk sizes; arguments as for `plan_memory`.

    layers: that are simulated, where all have the same parameters and the others can be taken to be like them; else
    all are.
    """

    def __init__(self, config: KarmaConfig, *, batch_size: int, device_type: str = "cuda",
                 data: Dataset | Numbers | None = None, tokenizer=None, optimiser: str = "adamw_torch_fused",
                 capability: tuple[int, int] = ASSUMED_CAPABILITY, layers: int = LAYERS) -> None:
        self.shape = language_model(config.backbone)
        self.workload = Workload.of(config, self.shape.get_text_config().hidden_size, data, tokenizer)
        self.config, self.batch_size, self.optimiser = config, batch_size, optimiser
        self.device_type, self.data = device_type, data
        self.simulation = Simulation(device_type, capability)
        whole = depth(self.shape)
        layers = min(layers, whole)
        if layers < whole and not layers_are_alike(self.shape):
            layers = whole
        try:
            self.model = self._simulated(layers)
        except ConfigError:
            if layers == whole:
                raise
            layers = whole  # adapters that the layers left out have alone
            self.model = self._simulated(layers)
        self.extra_layers = whole - layers

    def _simulated(self, layers: int) -> KarmaModel:
        with self.simulation.entered():
            return simulated_model(self.workload.applied(self.config), self.shape, self.workload, self.batch_size,
                                   self.simulation, layers)

    def peak(self, chunk_size: int | None) -> Peak:
        """Of a step's forward and backward, beyond what is there before it."""
        simulation, model = self.simulation, self.model
        batch = self.workload.batch(model, self.batch_size, chunk_size)
        layers = layers_of(model)
        with simulation.entered():
            simulation.forget()
            recorder = Recorder(simulation, *layers)
            training_step(model, batch, simulation)
            recorder.stop()
            repeated = {id(p) for p in layers[1][REPEATED].parameters()} if self.extra_layers else set()
            of = {id(p): simulation.block_of(p.grad) for p in model.parameters() if p.grad is not None}
            found = peak_of(simulation, recorder.passes, self.extra_layers, set(of.values()),
                            {block for p, block in of.items() if p in repeated})
            model.zero_grad()
        return found

    def weights(self) -> dict[str, int]:
        """Bytes of "frozen weights", "trained weights" and "item features"."""
        with self.simulation.entered():
            return weight_bytes(self.model, self.simulation, self.extra_layers)

    def plan(self, chunk_size: int | None = None) -> MemoryPlan:
        """Of steps of ``chunk_size`` windows at once; None: all."""
        trained = trained_sizes(self.model, self.extra_layers)
        peak = self.peak(chunk_size)
        gradients = sum(4 * size for size in trained)
        second = gradients if several() else 0  # DistributedDataParallel's buckets
        if gradients > peak.total:  # the optimiser's step is the moment of the peak
            peak = Peak(gradients, 0, 0)
        parts = {**self.weights(), "optimiser": state_bytes(trained, self.optimiser, self.simulation.granularity),
                 "gradients": peak.gradients + second, "activations": peak.activations,
                 "temporaries": peak.temporaries}
        if self.device_type == "cuda":
            parts["runtime"] = CUDA_CONTEXT + CUBLAS + int(FRAGMENTS * sum(parts.values()))
        pairs = self.workload.history if self.config.positions == "all" else 1
        return MemoryPlan(parts, self.config.backbone, self.device_type, self.batch_size,
                          min(chunk_size or self.batch_size, self.batch_size), self.config.gradient_checkpointing,
                          self.workload.history, negatives_of(self.batch_size, pairs, self.workload.hard_negatives),
                          self.assumed(gradients))

    def assumed(self, gradients: int) -> list[str]:
        load, out = self.workload, []
        if self.data is None:
            widths = " + ".join(f"{width} ({kind})" for kind, width in load.widths.items())
            sets = f", {1 + load.id_folds} sets of ID vectors" if load.id_folds else ""
            out.append(f"{load.items:,} items with vectors of {widths} numbers{sets}")
        out.append(f"every window has {load.history} items before its target, a text of {load.text_tokens} tokens"
                   + (f" and a query of {load.query_tokens}" if load.query_tokens else ""))
        if self.device_type == "cuda":
            if not several():
                out.append(f"one process; each of several holds its gradients twice, {gradients / 1e9:.2f} GB more")
            out.append(f"{CUDA_CONTEXT >> 20} MiB for the CUDA context, {CUBLAS >> 20} MiB for cuBLAS, and "
                       f"{FRAGMENTS:.0%} of the rest lost between the allocator's blocks")
            major, minor = self.simulation.capability
            out.append("bfloat16 and fused attention, as on GPUs of compute capability 8.0 and later"
                       if has_bfloat16((major, minor)) else
                       f"float32 and padded attention, as on GPUs of compute capability {major}.{minor}")
        return out


def layers_of(model: KarmaModel) -> tuple[nn.Module, nn.ModuleList]:
    from ..model.backbone import causal_lm

    lm = causal_lm(model.backbone)
    return lm.base_model, decoder_layers(lm)


def trained_sizes(model: KarmaModel, extra_layers: int) -> list[int]:
    """Elements of each trained tensor of the full model."""
    repeated = {id(p) for p in layers_of(model)[1][REPEATED].parameters()} if extra_layers else set()
    return [p.numel() for p in model.parameters() if p.requires_grad
            for _ in range(1 + (extra_layers if id(p) in repeated else 0))]


def training_step(model: KarmaModel, batch: KarmaBatch, simulation: Simulation) -> None:
    """Forward and backward as in training; of many chunks the first and the last are read, the others are one that
    costs next to nothing."""
    from ..step import backward

    prompts, decode = shortened(batch.prompts), shortened(batch.decode)
    short = dataclasses.replace(batch, prompts=prompts, decode=decode).mapped(simulation.simulated)
    simulation.take(bytes_of(batch, simulation.granularity) - bytes_of(short, simulation.granularity))
    unread = short.prompts[1:-1] if len(prompts) < len(batch.prompts) else []
    model.read = except_for(unread, model.read, lambda chunk, **_: (
        stand_in(model, len(chunk.pairs), model.config.embedding_dim), stand_in(model)))
    unread = short.decode[1:-1] if len(decode) < len(batch.decode) else []
    model.reconstruction_loss = except_for(unread, model.reconstruction_loss, lambda u, chunk: u.sum())
    try:
        backward(model, short)
    finally:
        del model.read, model.reconstruction_loss


def shortened(chunks: list) -> list:
    """The first and the last chunk, and one with the pairs of all between."""
    if len(chunks) <= 3:
        return chunks
    between = copy.copy(chunks[1])
    between.pairs, between.bare = torch.cat([chunk.pairs for chunk in chunks[1:-1]]), None
    return [chunks[0], between, chunks[-1]]


def bytes_of(batch, granularity: int) -> int:
    """Of all tensors in it."""
    total = 0

    def count(x: Tensor) -> Tensor:
        nonlocal total
        total += -(-x.nbytes // granularity) * granularity
        return x

    batch.mapped(count)
    return total


def except_for(chunks: list, call: Callable, instead: Callable) -> Callable:
    """``call``, or ``instead`` where one of the chunks is an argument."""
    names = set(map(id, chunks))
    return lambda *args, **options: (instead if names & set(map(id, args)) else call)(*args, **options)


def stand_in(model: KarmaModel, *size: int) -> Tensor:
    return torch.zeros(size, device=model.device, requires_grad=torch.is_grad_enabled())
