"""Ways to train a language model for retrieval.

A recipe is a configuration and a model; trainer, evaluation, commands and files are the same for all. Each is a module
with ``NAME`` and ``PAPER`` for readers, its ``Config`` and ``model_class()``; CONFIG.yaml chooses one by ``recipe:``.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from types import ModuleType

RECIPES = ("karma", "ra_rec")


def recipe(name: str) -> ModuleType:
    """The module of a recipe; ConfigError for an unknown one.

    >>> recipe("karma").Config.__name__
    'KarmaConfig'
    """
    from ..config import ConfigError

    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, n=1)
        raise ConfigError(f"recipe: got {name!r}; " + (f"did you mean {near[0]}?" if near else
                                                       f"allowed: {', '.join(RECIPES)}"))
    return import_module(f".{name}", __package__)


def load_model(folder, device=None):
    """The model of any recipe that ``save_pretrained`` wrote to ``folder``."""
    from ..model.storage import recipe_of

    return recipe(recipe_of(folder)).model_class().from_pretrained(folder, device)
