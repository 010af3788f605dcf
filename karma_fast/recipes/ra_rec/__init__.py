"""RA-Rec (Yu et al. 2024, arXiv 2402.04527): vectors of an ID recommender as soft prompts of a frozen LLM.

A prompt is hybrid: text (an instruction and the titles of the history, or an item's text) behind a learned context and
the projected ID vector, which every layer gets anew. What the paper leaves open is ours: unit vectors with a learned
scale, centred at the start; the last token's state; mean pooling and equal weights in the alignment.
"""

from .config import RaRecConfig as Config  # noqa: F401 - each recipe has one

NAME, PAPER = "RA-Rec", "arXiv 2402.04527"


def model_class():
    from .model import RaRecModel

    return RaRecModel
