"""KARMA (Sun et al. 2026, arXiv 2603.22779): an interest embedding that stays decodable into text."""

from ..config import KarmaConfig as Config  # noqa: F401 - each recipe has one

NAME, PAPER = "KARMA", "arXiv 2603.22779"


def model_class():
    from ..model.karma import KarmaModel

    return KarmaModel
