"""In-batch-negatives losses for sentence-transformers, computed by :func:`karma_kernels.info_nce`.

Change the import and keep the rest: both classes take the arguments of the host's classes of the same name and give
the same values and gradients, without the (batch x candidates) score matrix and with ids that mask false negatives.

Needs sentence-transformers 6.2 or later: ``pip install 'sentence-transformers[train]>=6.2'``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..losses.info_nce import InfoNCELoss

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.losses import RandContext
    from sentence_transformers.base.losses.merged_forward import embed_columns
    from sentence_transformers.sentence_transformer import losses as host
    from sentence_transformers.util import cos_sim, get_rank
except ImportError as error:
    raise ImportError("karma_fast.integrations.sentence_transformers needs sentence-transformers 6.2 or later: "
                      "pip install 'sentence-transformers[train]>=6.2'") from error

from .sentence_transformers_inputs import NO_ID, average_gradient, item_ids, refuse_unsupported


class MultipleNegativesRankingLoss(host.MultipleNegativesRankingLoss):
    r"""The host's loss of this name: each anchor against the candidates of the whole batch.

    .. math:: \ell_i = -\log \frac{\exp(s \, \mathrm{sim}(a_i, p_i))}{\sum_{j \notin M_i} \exp(s \, \mathrm{sim}(a_i,
              c_j))}

    The candidates c are all positives, then the first negatives of all rows, and so on. M_i is empty, as in the host,
    unless ``labels_are_ids``.

    Args:
        model: the model to train.
        scale: s = 1 / temperature, any number above 0.
        similarity_fct: ``util.cos_sim`` or ``util.dot_score`` of the host, whose usual scale is 1.
        gather_across_devices: candidates of all processes, see below.
        directions: with ``partition_mode`` one of

            - ``("query_to_doc",)``: the formula above
            - ``("query_to_doc", "doc_to_query")``, ``"per_direction"``: the mean of it and of the softmax over the
              anchors for each positive
            - ``("query_to_doc", "query_to_query")``, ``"joint"``: the other anchors are candidates too
        partition_mode: see ``directions``.
        hardness_mode, hardness_strength: only without effect: None, or strength 0.
        labels_are_ids: the ``label`` column holds ids of items, integers. A candidate with the id of row i's positive
            is then no negative for row i. See below.
        learnable_scale: train s, from ``scale`` on, up to 100. Its logarithm is a parameter of the loss, which the
            host's trainer optimises too but does not save: a resumed run starts from ``scale`` again. The present
            value is ``loss.info_nce.scale``. Over several processes its gradient is averaged, for which all must use
            this loss in the same step.
        backend: implementation, see :func:`karma_kernels.info_nce`.

    Ids: the host tokenises every column of the data set but ``label`` (or ``labels``, ``score``, ``scores``), which
    reaches the loss as it is. It holds integers (``dataset.class_encode_column`` makes them of names):

    - one a row, the id of its positive: rows that look for the same item are not negatives of each other. Hard
      negatives have no id then and are never dropped.
    - or a list a row, ``[positive, negative_1, ...]``: a hard negative that is the positive of another row is dropped
      from that row too.

    Anchors carry the id of their positive in the other two directions. The ``NO_DUPLICATES`` batch sampler is not
    needed then. Without ``labels_are_ids`` a label column is ignored, as in the host::

        dataset = Dataset.from_dict({
            "anchor": ["red pan", "a pot", "the red pan"],
            "positive": ["Pan, red", "Pot", "Pan, red, steel"],
            "label": [7, 8, 7],
        })
        loss = MultipleNegativesRankingLoss(model, labels_are_ids=True)
        SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss).train()

    Several processes: with ``gather_across_devices`` each computes the rows of its own anchors against the candidates
    of all, and a candidate gets its gradient from the rows of all. As in the host, DistributedDataParallel then makes
    of it (the average over the processes) what one process with the whole batch would compute; here also where
    batches differ in size, see :class:`karma_fast.InfoNCELoss`. All processes must have as many columns.

    What differs from the host: the scores of half-precision embeddings are computed in float32, under autocast too.

    Raises:
        ValueError: other settings of the host, which its own class computes; labels that are missing or of a wrong
            shape with ``labels_are_ids``. TypeError: labels that are not integers.

    Example:
        >>> from sentence_transformers.sentence_transformer.modules import BoW, Dense
        >>> _ = torch.manual_seed(0)
        >>> model = SentenceTransformer(modules=[BoW("red blue steel pan pot".split()), Dense(5, 8)], device="cpu")
        >>> columns = [model.preprocess(texts) for texts in (["red", "blue", "steel"], ["red pan", "pot", "pan"])]
        >>> loss = MultipleNegativesRankingLoss(model, labels_are_ids=True)(columns, torch.tensor([7, 8, 7]))
        >>> loss.backward()
    """

    def __init__(self, model: SentenceTransformer, scale: float = 20.0,
                 similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim, gather_across_devices: bool = False,
                 directions: tuple[str, ...] = ("query_to_doc",), partition_mode: str = "joint",
                 hardness_mode: str | None = None, hardness_strength: float = 0.0, *, labels_are_ids: bool = False,
                 learnable_scale: bool = False, backend: str = "auto") -> None:
        super().__init__(model, scale=scale, similarity_fct=similarity_fct,
                         gather_across_devices=gather_across_devices, directions=directions,
                         partition_mode=partition_mode, hardness_mode=hardness_mode,
                         hardness_strength=hardness_strength)
        refuse_unsupported(similarity_fct, set(directions), partition_mode, hardness_mode, hardness_strength)
        self.labels_are_ids, self.learnable_scale, self.backend = labels_are_ids, learnable_scale, backend
        self.info_nce = InfoNCELoss(
            scale, learnable_scale, 100.0 if learnable_scale else max(scale, 100.0),
            symmetric="doc_to_query" in directions, normalize=similarity_fct is cos_sim, gather=gather_across_devices,
            backend=backend)
        if learnable_scale:  # the host wraps the model alone in DistributedDataParallel
            self.info_nce.log_scale.register_post_accumulate_grad_hook(average_gradient)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return self.compute_loss_from_embeddings(embed_columns(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """Two or more (rows, width) columns: anchors, positives, first negatives, ... -> the loss, one element."""
        if len(embeddings) < 2:
            raise ValueError(f"got {len(embeddings)} text column(s); anchors and positives are needed at least")
        anchors, candidates, rows = embeddings[0], torch.cat(embeddings[1:]), len(embeddings[0])
        anchor_ids = candidate_ids = None
        if self.labels_are_ids:
            anchor_ids, candidate_ids = item_ids(labels, rows, len(embeddings) - 1, anchors.device)
        if "query_to_query" in self.directions:
            if anchor_ids is None:  # each anchor is dropped from its own row and from no other, on any process
                anchor_ids = torch.arange(rows, device=anchors.device) + (get_rank() << 32)
                candidate_ids = anchor_ids.new_full((len(candidates),), NO_ID)
            candidates = torch.cat([candidates, anchors])
            candidate_ids = torch.cat([candidate_ids, anchor_ids])

        info_nce = self.info_nce.to(anchors.device)  # the host's loss needs no .to() in a loop of one's own
        if self.learnable_scale:
            info_nce.clamp_()  # nobody calls it after the optimiser's step
        else:
            info_nce.log_scale.fill_(math.log(self.scale))  # loss.scale may be set between steps, as in the host
        return info_nce(anchors, candidates, None, anchor_ids, candidate_ids)

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {"labels_are_ids": self.labels_are_ids,
                                            "learnable_scale": self.learnable_scale, "backend": self.backend}


class CachedMultipleNegativesRankingLoss(host.CachedMultipleNegativesRankingLoss):
    """The host's loss of this name: :class:`MultipleNegativesRankingLoss` for batches that do not fit in memory.

    The batch is embedded in mini-batches without gradients; the loss of the whole batch and the gradients of its
    embeddings come from one call of :func:`karma_kernels.info_nce`; ``backward()`` embeds each mini-batch again, with
    the same dropout and autocast, and sends its gradients through (Gao et al. 2021,
    https://arxiv.org/abs/2101.06983). The frame is the host's ``CachedLossMixin``, which does not restore autocast.

    Args:
        model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode,
            hardness_strength, labels_are_ids, learnable_scale, backend: see :class:`MultipleNegativesRankingLoss`.
        mini_batch_size: rows embedded at once. Changes memory, speed and the draws of dropout, not the loss.
        mini_batch_num_tokens: tokens embedded at once, in place of ``mini_batch_size``.
        show_progress_bar: one for each column and pass.

    The weights of a ``MatryoshkaLoss`` around this class do not reach the gradient of a learnable scale.
    Raises as :class:`MultipleNegativesRankingLoss`, and a ValueError for models whose inputs cannot be split.

    Example:
        >>> from sentence_transformers.sentence_transformer.modules import BoW, Dense
        >>> model = SentenceTransformer(modules=[BoW("red blue pan pot".split()), Dense(4, 8)], device="cpu")
        >>> columns = [model.preprocess(texts) for texts in (["red", "blue", "pan"], ["red pan", "blue pot", "pan"])]
        >>> loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)(columns)
        >>> loss.backward()  # embeds again
    """

    def __init__(self, model: SentenceTransformer, scale: float = 20.0,
                 similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim, mini_batch_size: int = 32,
                 mini_batch_num_tokens: int | None = None, gather_across_devices: bool = False,
                 directions: tuple[str, ...] = ("query_to_doc",), partition_mode: str = "joint",
                 show_progress_bar: bool = False, hardness_mode: str | None = None, hardness_strength: float = 0.0, *,
                 labels_are_ids: bool = False, learnable_scale: bool = False, backend: str = "auto") -> None:
        super().__init__(model, mini_batch_size=mini_batch_size, mini_batch_num_tokens=mini_batch_num_tokens,
                         show_progress_bar=show_progress_bar)
        self.loss = MultipleNegativesRankingLoss(  # the settings live there, the host's properties read them
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode,
            hardness_strength, labels_are_ids=labels_are_ids, learnable_scale=learnable_scale, backend=backend)

    def embed_minibatch(self, sentence_feature: dict[str, Any], begin: int, end: int, with_grad: bool,
                        copy_random_state: bool, random_state: RandContext | None = None
                        ) -> tuple[Tensor, RandContext | None]:
        """Rows begin to end of a column -> embeddings, and the state that makes the repetition equal."""
        with nullcontext() if random_state is None else torch.autocast(**random_state.autocast):
            reps, state = super().embed_minibatch(sentence_feature, begin, end, with_grad, copy_random_state,
                                                  random_state)
        if state is not None:  # backward() is mostly called outside the autocast context
            kind = reps.device.type
            state.autocast = {"device_type": kind, "enabled": torch.is_autocast_enabled(kind),
                              "dtype": torch.get_autocast_dtype(kind)}
        return reps, state

    def calculate_loss(self, reps: list[list[Tensor]], labels: Tensor | None = None, *,
                       with_backward: bool = False) -> Tensor:
        """Embeddings of each mini-batch of each column -> the loss; ``with_backward`` also fills their ``grad``."""
        loss = self.loss.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if not with_backward:
            return loss
        leaves, log_scale = [rep for column in reps for rep in column], self.loss.info_nce.log_scale
        grads = torch.autograd.grad(loss, [*leaves, log_scale] if self.loss.learnable_scale else leaves)
        for rep, grad in zip(leaves, grads, strict=False):
            rep.grad = grad
        if self.loss.learnable_scale:
            self._log_scale_grad = self._log_scale_grad + grads[-1]
        return loss.detach()

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        self._log_scale_grad = 0.0
        loss = super().forward(sentence_features, labels)
        if self.loss.learnable_scale and loss.requires_grad:
            # adds 0, and the known gradient once backward() brings its factor (accumulation, gradient scaling)
            log_scale = self.loss.info_nce.log_scale
            loss = loss + (log_scale - log_scale.detach()) * self._log_scale_grad
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        return self.loss.get_config_dict() | super().get_config_dict()
