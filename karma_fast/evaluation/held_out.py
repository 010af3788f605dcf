"""Ranks of held-out requests: what a user chose before is no candidate, and no hit either."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data.flat import slices
from .catalogue import Catalogue
from .csr import seen_before
from .ranks import Ranks, target_ranks


def held_out_ranks(sequences: Any, positions: np.ndarray, users: Any, items: Any, *, mask_seen: bool = True,
                   **options: Any) -> Ranks:
    """`target_ranks` of the requests whose targets stand at flat ``positions``.

    Args:
        sequences: :class:`karma_fast.data.Sequences`.
        users: (T, D) vectors of the requests. items: (N, D), or a :class:`Catalogue`, which is made of them
            (unless they are a memory map) where the requests' histories are too long for one go
            (`karma_fast.data.flat.PAIRS`).
        mask_seen: leave out what the user chose before the target. A target that was itself chosen before counts as
            missed then: among unseen items alone whatever is near the history would find it at once, and a list
            without seen items never shows it.
        options: of :func:`target_ranks`.
    """
    positions = np.asarray(positions, np.int64)
    targets = sequences.items[positions].astype(np.int64)
    if not mask_seen:
        return target_ranks(users, items, targets, **options)
    parts = list(slices(positions - sequences.indptr[sequences.user_of(positions)]))
    if len(parts) > 1 and not isinstance(items, (Catalogue, np.memmap)) and not getattr(items, "is_cuda", False):
        items = Catalogue(items)  # packed once for all parts; maps may be larger than memory, a GPU packs nothing
    ranks = [target_ranks(users[part], items, targets[part], seen=seen_before(sequences, positions[part]), **options)
             for part in parts]
    return Ranks.concat(ranks).missed(sequences.chosen_before(positions))


def ranking_rule(data: Any, positions: np.ndarray, mask_seen: bool, drawn_from: int = 0) -> str:
    """What was ranked and how, beside a table.

    data: :class:`karma_fast.data.Dataset`. drawn_from: how many requests there were to draw from.
    """
    rule = "seen items left out" if mask_seen else "seen items kept"
    repeated = int(data.sequences.chosen_before(positions).sum()) if mask_seen else 0
    if repeated:
        rule += f" ({repeated:,} targets chosen before count as missed)"
    drawn = f", drawn by seed from {drawn_from:,}," if len(positions) < drawn_from else ""
    return (f"{data.name or 'data'}: {len(positions):,} requests{drawn} ranked against all {len(data.items):,} items, "
            f"{rule}, ties count half")
