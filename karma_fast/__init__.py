"""karma_fast: train an LLM to find the next item, with an embedding that stays decodable into text."""

from importlib import import_module

__version__ = "0.1.0"

# names are loaded when first used, so that `import karma_fast` and `--help` stay light
_HOMES = {
    "InfoNCELoss": "losses.info_nce",
    "KarmaConfig": "config",
    "KarmaLoss": "losses.karma",
    "KarmaModel": "model.karma",
    "KarmaTrainer": "trainer",
    "KarmaTrainingArguments": "training_arguments",
    "SoftPromptProjection": "model.soft_prompt",
    "load_dataset": "data",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'karma_fast' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
