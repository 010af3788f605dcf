"""A language model with random weights, in a folder that transformers loads, and a catalogue with histories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from karma_fast.data.schema import Dataset, Items, Sequences, Split

from .cases import Shape

SHARD_BYTES = 1 << 30
EVENTS = 41  # of a user's training part with a history of 20: two full windows of all positions, 21 of the last one
HELD_OUT = 2


def write_model(shape: Shape, folder: Path, device: str, dtype: torch.dtype) -> None:
    """Draws the weights one by one on the device and quantises each there, so the whole never exists in ``dtype``."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=shape.tied, max_position_embeddings=4096, bos_token_id=None, eos_token_id=0,
        pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    linear = {f"{name}.weight" for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and name != "lm_head"}
    if shape.quantization == "4bit":
        config.quantization_config = four_bit(dtype, nested=device == "cuda")
    config.dtype, config.architectures = dtype, [type(model).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    shards, shard, size = {}, {}, 0
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():  # a tied head is not among them
        weight = random_weight(parameter, device, generator)
        packed = quantized(name, weight, nested=device == "cuda") \
            if name in linear and shape.quantization == "4bit" else {name: weight}
        shard |= {key: value.cpu() for key, value in packed.items()}
        size += sum(value.nbytes for value in packed.values())
        if size > SHARD_BYTES:
            save_shard(folder, shard, shards)
            shard, size = {}, 0
    save_shard(folder, shard, shards)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    config.save_pretrained(folder)
    write_tokenizer(folder, shape.vocabulary)


def random_weight(like: Tensor, device: str, generator: torch.Generator) -> Tensor:
    """As such models start: gains of 1, matrices of standard deviation 0.02."""
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=like.dtype)
    return torch.randn(like.shape, device=device, dtype=like.dtype, generator=generator) * 0.02


def four_bit(dtype: torch.dtype, nested: bool) -> dict:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                              bnb_4bit_use_double_quant=nested).to_dict()


def quantized(name: str, weight: Tensor, nested: bool) -> dict[str, Tensor]:
    """A weight as bitsandbytes saves it: packed, with the tensors of its quantisation beside it."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def save_shard(folder: Path, tensors: dict[str, Tensor], shards: dict[str, str]) -> None:
    file = f"model-{len(set(shards.values())) + 1:05d}.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    shards |= dict.fromkeys(tensors, file)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Words t1, t2, ... are the token ids 1, 2, ...; 0 ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0} | {f"t{n}": n for n in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)


def make_data(shape: Shape, users: int, seed: int = 0) -> tuple[Dataset, np.ndarray]:
    """Items with texts of 6 to 16 random tokens, some far more popular than others; (items, width) text vectors."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(f"t{t}" for t in rng.integers(1, shape.vocabulary, rng.integers(6, 17)))
             for _ in range(shape.items)]
    names = np.array([str(n) for n in range(shape.items)], dtype=object)
    share = 1 / (10 + np.arange(shape.items))
    length = EVENTS + HELD_OUT
    events = rng.choice(shape.items, users * length, p=share / share.sum()).astype(np.int32)
    indptr = np.arange(users + 1, dtype=np.int64) * length
    split = Split(indptr[1:] - HELD_OUT, indptr[1:] - 2, indptr[1:] - 1, "last but one and last event of each user")
    sequences = Sequences(np.array([f"u{n}" for n in range(users)], dtype=object), indptr, events)
    vectors = rng.standard_normal((shape.items, shape.feature_width)).astype(np.float32)
    return Dataset(Items(names, texts, texts), sequences, split, "synthetic"), vectors
