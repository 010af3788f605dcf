"""The model of a run on simulated tensors, with three decoder layers where all are alike."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..config import KarmaConfig
from ..model.backbone import causal_lm, compute_dtype, decoder_layers, quantization_config, ready_to_train
from ..model.features import KINDS, ItemFeatures
from .simulated import SimulatedTensor, Simulation
from .timeline import REPEATED
from .workload import Tokens, Workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ..model.karma import KarmaModel

LAYERS = 3  # that are simulated


def with_layers(shape: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same language model, less deep."""
    shape = copy.deepcopy(shape)
    text = shape.get_text_config()
    text.num_hidden_layers = layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) > layers and name.startswith("layer"):
            setattr(text, name, value[:layers])  # such as layer_types
    return shape


def layers_are_alike(shape: PretrainedConfig) -> bool:
    """Whether all decoder layers have the same parameters: those of hybrids and of many mixtures of experts differ."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(shape))
    kinds = {tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in decoder_layers(model)}
    return len(kinds) == 1


def simulated_backbone(config: KarmaConfig, shape: PretrainedConfig, simulation: Simulation) -> nn.Module:
    """What `load_backbone` gives, from a language model's configuration alone; for use inside the simulation."""
    from transformers import AutoModelForCausalLM

    device = simulation.place
    dtype = torch.float32 if config.tuning == "full" else compute_dtype(device)
    attention = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    with torch.device("meta"), outside(simulation):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, **attention)
        model.tie_weights()
        if config.quantization != "none":
            quantised_shell(model, quantization_config(config, dtype, nested=device.type == "cuda"))
    simulate_weights(model, simulation)
    return ready_to_train(model, config)


@contextlib.contextmanager
def outside(simulation: Simulation):
    """Plain tensors for a while."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def quantised_shell(model: PreTrainedModel, quantisation) -> None:
    """Puts bitsandbytes' layers where transformers puts them."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantisation)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantisation.load_in_4bit, quantisation.load_in_8bit
    model.quantization_method = quantisation.quant_method


def simulate_weights(model: nn.Module, simulation: Simulation) -> None:
    """Every parameter and buffer becomes a simulated one; 4-bit and 8-bit layers get their packed weights."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None:
                continue
            if id(weight) not in done:  # tied weights stay one
                kind = type(module).__name__
                make = {"Linear4bit": packed_4bit, "Linear8bitLt": packed_8bit}.get(kind if name == "weight" else "")
                new = make(module, simulation) if make else meta(simulation, weight.shape, weight.dtype)
                parameter = done[id(weight)] = nn.Parameter(new, requires_grad=False)
                parameter.__dict__.update({k: v for k, v in vars(new).items() if k not in vars(parameter)})
            module._parameters[name] = done[id(weight)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = simulation.simulated(buffer)


def meta(simulation: Simulation, size: tuple[int, ...], dtype: torch.dtype) -> SimulatedTensor:
    with outside(simulation):
        inner = torch.empty(size, dtype=dtype, device="meta")
    return simulation.simulated(inner)


def packed_4bit(layer, simulation: Simulation) -> SimulatedTensor:
    """Two weights a byte and a scale for 64 of them; with nested scales (8 bits each) a scale for 256 scales."""
    from bitsandbytes.functional import QuantState

    count = layer.in_features * layer.out_features
    shape, scales = torch.Size((layer.out_features, layer.in_features)), -(-count // 64)
    nested = layer.weight.compress_statistics
    of_scales = None if not nested else QuantState(
        meta(simulation, (-(-scales // 256),), torch.float32), code=meta(simulation, (256,), torch.float32),
        blocksize=256, dtype=torch.float32)
    weight = meta(simulation, (-(-count // 2), 1), torch.uint8)
    weight.quant_state = QuantState(
        meta(simulation, (scales,), torch.uint8 if nested else torch.float32), shape=shape,
        code=meta(simulation, (16,), torch.float32), blocksize=64, quant_type="nf4", dtype=layer.compute_dtype,
        offset=meta(simulation, (), torch.float32) if nested else None, state2=of_scales)
    weight.compress_statistics, weight.quant_type, weight.bnb_quantized = nested, "nf4", True
    return weight


def packed_8bit(layer, simulation: Simulation) -> SimulatedTensor:
    """A byte a weight and a float32 scale a row."""
    weight = meta(simulation, (layer.out_features, layer.in_features), torch.int8)
    weight.CB, weight.SCB = weight, meta(simulation, (layer.out_features,), torch.float32)
    weight.has_fp16_weights = False
    return weight


def simulated_model(config: KarmaConfig, shape: PretrainedConfig, workload: Workload, batch_size: int,
                    simulation: Simulation, layers: int = LAYERS) -> KarmaModel:
    """A `KarmaModel` with the features of ``workload.items`` items; for use inside the simulation."""
    from ..model.karma import KarmaModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone = simulated_backbone(config, with_layers(shape, min(layers, depth(shape))), simulation)
        with outside(simulation):
            one_word = (["x"], np.zeros((1, config.word_dim), np.float32)) if workload.query_words else None
            features = ItemFeatures(workload.two_rows(), query_words=one_word)
        for kind in KINDS:
            if kind in features.kinds:
                rows = workload.items * (1 + workload.id_folds if kind == "id" else 1)
                setattr(features, kind, meta(simulation, (rows, features.widths[kind]), torch.float32))
                setattr(features, f"{kind}_present", meta(simulation, (rows,), torch.bool))
        if workload.query_words:
            features.query_words = meta(simulation, (workload.query_words, config.word_dim), torch.float32)
        features.folds = workload.id_folds
        simulate_missing(features, simulation)
        model = KarmaModel(config, backbone, Tokens(), workload.catalogue(batch_size), features)
        simulate_missing(model, simulation)
    model.loss.contrastive.gather = False  # no other process takes part in a simulation
    return model.train()


def simulate_missing(module: nn.Module, simulation: Simulation) -> None:
    """Parameters and buffers that were made from arrays."""
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None and not isinstance(weight, SimulatedTensor):
                part._parameters[name] = nn.Parameter(simulation.simulated(weight.detach()), weight.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and not isinstance(buffer, SimulatedTensor):
                part._buffers[name] = simulation.simulated(buffer)


def depth(shape: PretrainedConfig) -> int:
    return shape.get_text_config().num_hidden_layers


def weight_bytes(model: KarmaModel, simulation: Simulation, extra_layers: int) -> dict[str, int]:
    """Bytes of weights by part, each storage once; the repeated layer's ``1 + extra_layers`` times."""
    layer = decoder_layers(causal_lm(model.backbone))[REPEATED]
    repeated = set(map(id, layer.modules())) if extra_layers else set()
    out, seen = {"frozen weights": 0, "trained weights": 0, "item features": 0}, set()
    for name, module in model.named_modules():
        times = 1 + extra_layers if id(module) in repeated else 1
        for x in [*module._parameters.values(), *module._buffers.values()]:
            if x is None:
                continue
            part = ("trained weights" if x.requires_grad else "item features" if name == "features"
                    else "frozen weights")
            for tensor in [x, *packed_parts(x)]:
                block = simulation.block_of(tensor)
                if id(block) not in seen:
                    seen.add(id(block))
                    out[part] += times * block.bytes
    return out


def packed_parts(weight: SimulatedTensor) -> list[SimulatedTensor]:
    """The scales of a 4-bit or 8-bit weight."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return [weight.SCB] if getattr(weight, "SCB", None) is not None else []
    found = [state.absmax, state.code, state.offset]
    if state.state2 is not None:
        found += [state.state2.absmax, state.state2.code]
    return [x for x in found if x is not None]
