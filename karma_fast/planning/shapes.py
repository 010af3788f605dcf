"""Sizes of language models by name, so that a plan needs no download.

Source: config.json of HuggingFaceTB/SmolLM2-135M-Instruct and of Qwen/Qwen2.5-0.5B-, 1.5B-, 3B- and 7B-Instruct.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "vocab_size", "tie_word_embeddings")
SHAPES = {
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 49152, True),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": ("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
}
HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M", "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
           "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B", "qwen2.5-3b": "Qwen/Qwen2.5-3B", "qwen2.5-7b": "Qwen/Qwen2.5-7B"}


def hub_id(name: str) -> str:
    """What the hub calls a model of ``SHAPES``, as training wants it; "" for any other name.

    >>> hub_id("qwen2.5-1.5b"), hub_id("Qwen2.5-7B-instruct"), hub_id("Qwen/Qwen2.5-7B")
    ('Qwen/Qwen2.5-1.5B', 'Qwen/Qwen2.5-7B-Instruct', '')
    """
    short = name.lower().removesuffix("-instruct")
    return HUB_IDS.get(short, "") and HUB_IDS[short] + "-Instruct" * (short != name.lower())


def language_model(name: str) -> PretrainedConfig:
    """transformers' configuration of a known name, a local folder or a hub id; nothing but config.json is read.

    Raises ConfigError for a name that is none of them.

    Example:
        >>> language_model("Qwen/Qwen2.5-7B-Instruct").hidden_size
        3584
    """
    from transformers import AutoConfig

    known = name.lower().rpartition("/")[2].removesuffix("-instruct")
    if known in SHAPES and not Path(name).exists():
        kind, *values = SHAPES[known]
        return AutoConfig.for_model(kind, **dict(zip(FIELDS, values, strict=True)))
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.backbone: {name!r} has no configuration that can be read: "
                          f"{str(error).splitlines()[0]}; give a local folder, a hub id that this machine can reach, "
                          f"or one of {', '.join(SHAPES)}") from error
