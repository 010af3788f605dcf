"""Collapse, measured: attention, embeddings, retained perplexity, and what a fresh probe reads from an embedding.

`diagnose` measures a model on held-out requests. docs/diagnostics.md has the formulas and whose they are.
"""

from .diagnose import diagnose
from .plain import PlainModel

__all__ = ["PlainModel", "diagnose"]
