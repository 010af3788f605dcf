"""Loading the language model: hub id, local folder or a known asset; 4-bit, 8-bit or 16-bit; LoRA."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import ConfigError, KarmaConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# names that `fetch` knows -> (asset, GGUF file inside it)
GGUF_ASSETS = {"smollm2-135m-instruct": ("smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def default_device() -> torch.device:
    """The GPU if there is one; each of torchrun's processes takes its own, as transformers' Trainer does."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    process = os.environ.get("LOCAL_RANK")
    return torch.device("cuda" if process is None else f"cuda:{int(process) % torch.cuda.device_count()}")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32 (float16 would need a loss scaler)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # without these units a CPU's bfloat16 product is several times slower than its float32 one
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16") else torch.float32


def resolve_backbone(name: str, cache: Path | None = None) -> str:
    """A known asset's name -> the folder with its converted weights; anything else is returned as it is."""
    if name.lower() not in GGUF_ASSETS or Path(name).exists():
        return name
    from ..data.assets import cache_dir, fetch

    asset, gguf_name = GGUF_ASSETS[name.lower()]
    folder = (cache or cache_dir()) / "models" / name.lower()
    if not _is_model(folder):
        convert_gguf(fetch(asset) / gguf_name, folder)
    return str(folder)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file as a plain bfloat16 model folder, which loads in a second and can be quantised."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..data.assets import put_in_place

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    values = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype"):
        values.pop(key, None)
    # a model read from GGUF cannot be saved as it is, so its weights move into a fresh one of the same shape
    plain = AutoModelForCausalLM.from_config(type(source.config)(**values), dtype=torch.bfloat16)
    plain.load_state_dict(source.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.part-", dir=folder.parent) as temporary:
        part = Path(temporary) / "files"
        plain.save_pretrained(part)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
        put_in_place(part, folder, _is_model)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists()


def identity(name: str) -> str:
    """A text that changes when the weights behind a resolved backbone change; part of cache keys."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return json.dumps([folder.name, [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]])


def load_backbone(config: KarmaConfig, device: torch.device | str | None = None
                  ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal LM (frozen, adapters added if ``tuning`` is lora) and its tokenizer.

    Raises ConfigError with what to do when the model cannot be had, or a needed package is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(device) if device is not None else default_device()
    name = resolve_backbone(config.backbone)
    dtype = torch.float32 if config.tuning == "full" else compute_dtype(device)
    options: dict = {"dtype": dtype}
    if config.attention != "auto":
        options["attn_implementation"] = config.attention
    if config.quantization != "none":
        options["quantization_config"] = quantization_config(config, dtype, nested=device.type == "cuda")
        options["device_map"] = {"": device}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except OSError as error:
        from ..planning.shapes import hub_id

        known = hub_id(name)  # a known asset's name is a folder by now
        why, wanted = ("", "a hub id that this machine can reach") if not known else (
            "this short name is for `karma-fast plan` alone; ", f"the hub id {known}")
        advice = f"{why}give {wanted}, a local folder, or {', '.join(GGUF_ASSETS)}"
        raise ConfigError(f"model.backbone: {config.backbone!r} cannot be loaded: {str(error).splitlines()[0]}; "
                          f"{advice}") from error
    if config.quantization == "none":
        model.to(device)
    return ready_to_train(model, config), tokenizer


def ready_to_train(model: PreTrainedModel, config: KarmaConfig) -> nn.Module:
    """A loaded model with its attention, adapters and checkpointing as the settings say, and the rest frozen."""
    from .packed_attention import use_packed_attention

    keep_differentiable(model)
    if config.attention == "auto":
        use_packed_attention(model)
    model.requires_grad_(config.tuning == "full")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    return add_lora(model, config) if config.tuning == "lora" else model


def quantization_config(config: KarmaConfig, dtype: torch.dtype, nested: bool):
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"model.quantization: {config.quantization} needs bitsandbytes ({error}); "
                          "pip install bitsandbytes, or set model.quantization none") from error
    from transformers import BitsAndBytesConfig

    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                              bnb_4bit_use_double_quant=nested)


def keep_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for CPU inference.

    On CPUs with AVX512-BF16 a forward in eval mode repacks them for good, and the product that reads this form has no
    backward: training would go on with gradients that miss every frozen layer.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def add_lora(model: PreTrainedModel, config: KarmaConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = config.lora_targets
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                      target_modules=targets if targets == "all-linear" else [t.strip() for t in targets.split(",")],
                      task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft against newer transformers
        try:
            adapted = get_peft_model(model, lora)
        except ValueError as error:
            raise ConfigError(f"model.lora_targets: {targets!r} does not fit this backbone: {error}") from error
    if hasattr(model.get_input_embeddings(), "base_layer"):
        raise ConfigError(f"model.lora_targets: {targets!r} takes the token embeddings too, whose adapters prompts of "
                          "soft tokens pass by; name linear layers only")
    return adapted


def adapters_off(backbone: nn.Module) -> contextlib.AbstractContextManager:
    """The language model as it was before tuning, for the time of a `with` block."""
    return backbone.disable_adapter() if hasattr(backbone, "disable_adapter") else contextlib.nullcontext()


def causal_lm(backbone: nn.Module) -> PreTrainedModel:
    """The causal LM inside an adapter wrapper, or the model itself."""
    return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone


def as_embedded(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """(..., hidden) rows as the model's own embedding gives them: Gemma and others multiply those of their table."""
    scale = getattr(model.get_input_embeddings(), "embed_scale", None)
    return rows.to(model.dtype) if scale is None else rows.to(model.dtype) * scale


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a causal LM, first to last; ConfigError where they cannot be told."""
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ConfigError(f"model.backbone: its decoder layers were not found in a {type(model).__name__}")


def token_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(n, hidden) final states -> (n, vocabulary) float32 logits, with the scalings some families apply."""
    logits = model.get_output_embeddings()(hidden).float()
    text = model.config.get_text_config()
    if getattr(text, "logits_scaling", None):  # Granite
        logits = logits / text.logits_scaling
    if getattr(text, "logit_scale", None):  # Cohere
        logits = logits * text.logit_scale
    cap = getattr(text, "final_logit_softcapping", None)  # Gemma
    return cap * torch.tanh(logits / cap) if cap else logits
