"""What the losses for sentence-transformers take: settings they can compute, ids in the label column."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..processes import several

NO_ID = torch.iinfo(torch.int64).min  # of a candidate that is dropped from no row


def refuse_unsupported(similarity_fct: Callable, directions: set[str], partition_mode: str, hardness_mode: str | None,
                       hardness_strength: float) -> None:
    """Raises a ValueError for settings of the host that are no softmax over one set of candidates for each anchor."""
    from sentence_transformers.util import cos_sim, dot_score

    advice = "for others take the class of the same name from sentence_transformers.sentence_transformer.losses"
    if similarity_fct not in (cos_sim, dot_score):
        raise ValueError(f"similarity_fct: got {getattr(similarity_fct, '__name__', similarity_fct)}; cos_sim or "
                         f"dot_score of sentence_transformers.util is supported, {advice}")
    if directions != {"query_to_doc"} and (directions, partition_mode) not in (
            ({"query_to_doc", "doc_to_query"}, "per_direction"), ({"query_to_doc", "query_to_query"}, "joint")):
        raise ValueError(f"directions: got {sorted(directions)} with partition_mode {partition_mode!r}; supported are "
                         "query_to_doc alone, with doc_to_query and 'per_direction', or with query_to_query and "
                         f"'joint'; {advice}")
    if hardness_mode is not None and hardness_strength > 0:
        raise ValueError(f"hardness_mode: got {hardness_mode!r} with hardness_strength {hardness_strength}; None is "
                         f"supported, {advice}")


def item_ids(labels: Tensor | None, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(rows,) or (rows, columns) integers -> ids of the rows' positives and of the (columns * rows,) candidates."""
    if labels is None:
        raise ValueError("labels_are_ids: the batch has no labels; give the data set an integer column named 'label' "
                         "with the id of each row's positive")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels_are_ids: got labels of dtype {labels.dtype}; integers are needed, the ids of items")
    if labels.shape not in ((rows,), (rows, columns)):
        raise ValueError(f"labels_are_ids: got labels of shape {tuple(labels.shape)}; ({rows},), the id of each row's "
                         f"positive, or ({rows}, {columns}), an id for each candidate column, is needed")
    ids = labels.to(device, torch.int64)
    if ids.ndim == 1:
        ids = torch.cat([ids.unsqueeze(1), ids.new_full((rows, columns - 1), NO_ID)], dim=1)
    return ids[:, 0], ids.T.flatten()


@torch.no_grad()
def average_gradient(parameter: Tensor) -> None:
    """Mean over the processes; what was accumulated before is equal on all and stays as it is."""
    if several():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
