"""The loss of open_clip's training loop without its score matrices, and with ids: the same caption is no negative."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from karma_kernels import info_nce
from karma_kernels.info_nce import check_inputs

from ..losses.info_nce import batch_sizes, gather_rows, in_one_dtype


class ClipLoss(nn.Module):
    r"""Called as open_clip's ``ClipLoss`` is, with the same values and gradients. open_clip itself is not needed.

    .. math:: \frac{1}{2N} \sum_{i=1}^{N} \left(
              -\log \frac{\exp(s \, x_i \cdot y_i)}{\sum_j \exp(s \, x_i \cdot y_j)}
              -\log \frac{\exp(s \, x_i \cdot y_i)}{\sum_j \exp(s \, x_j \cdot y_i)} \right)

    over the N pairs of all processes. What differs from open_clip: the scores come from
    :func:`karma_kernels.info_nce`, in float32 also where features are half precision and under autocast; each process
    computes the rows of its own pairs only, whatever ``local_loss`` is; batches of different sizes are weighted right;
    and pairs that share an id are not pushed apart.

    Args:
        local_loss: with ``world_size`` > 1, whether the value is that of the pairs of this process (True) or of all.
        gather_with_grad: whether the features of other processes are differentiated. See the table.
        cache_labels: accepted and without effect, there are no labels to cache.
        rank: of this process in the default process group.
        world_size: processes of that group; 1 leaves ``torch.distributed`` alone.
        use_horovod: must be False.
        backend: implementation, see :func:`karma_kernels.info_nce`.

    Gradients after DistributedDataParallel has averaged them over W processes, against those of one process with the
    whole batch. They follow open_clip, so that learning rates carry over:

    +------------+------------------+-----------------------------------------------------------+-------------+
    | local_loss | gather_with_grad | towers                                                    | logit_scale |
    +============+==================+===========================================================+=============+
    | any        | True             | the same                                                  | the same    |
    +------------+------------------+-----------------------------------------------------------+-------------+
    | False      | False (default)  | 1 / W of it; Adam divides that out, SGD and the clipping  | the same    |
    |            |                  | of gradient norms do not                                  |             |
    +------------+------------------+-----------------------------------------------------------+-------------+
    | True       | False            | a part: a feature learns as the query of its own row, not | the same    |
    |            |                  | as a key of any row, not even of its pair's               |             |
    +------------+------------------+-----------------------------------------------------------+-------------+

    Inputs:
        image_features: (B, D) floating, normalised by the caller, as open_clip's models do.
        text_features: (B, D), row i belongs to image i.
        logit_scale: s itself (not its logarithm), a number or a tensor with one element, which gets its gradient.
        logit_bias: one element or None. The same number added to all scores leaves a softmax as it is, so it changes
            nothing and its gradient is zero.
        output_dict: return ``{"contrastive_loss": loss}``.
        ids: (B,) integers; pairs with the same id, such as a hash of the caption, are no negatives of each other.

    Returns:
        the loss, one element: float64 for float64 features, else float32.

    Raises:
        ValueError, TypeError: unsupported options or inputs, see :func:`karma_kernels.info_nce`. RuntimeError: the
            default process group is not the one that ``rank`` and ``world_size`` describe.

    References:
        Radford et al. 2021, https://arxiv.org/abs/2103.00020; interface and conventions: open_clip 3.3,
        https://github.com/mlfoundations/open_clip

    Example:
        >>> image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], requires_grad=True)
        >>> text, loss_fn = image.detach(), ClipLoss()
        >>> loss = loss_fn(image, text, logit_scale=torch.tensor(7.0))
        >>> loss.backward()
        >>> loss.item()
        0.4630
        >>> loss_fn(image, text, logit_scale=torch.tensor(7.0), ids=torch.tensor([5, 6, 6])).item()
        0.0012
    """

    def __init__(self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False,
                 rank: int = 0, world_size: int = 1, use_horovod: bool = False, *, backend: str = "auto") -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: got True; processes talk through torch.distributed only, leave it False")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank} with world_size {world_size}; 0 <= rank < world_size is needed")
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.backend = rank, world_size, backend

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
                logit_bias: float | Tensor | None = None, output_dict: bool = False, *,
                ids: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        image_features, text_features = in_one_dtype(image_features, text_features)
        if image_features.shape[:1] != text_features.shape[:1]:
            raise ValueError(f"image_features has shape {tuple(image_features.shape)} and text_features "
                             f"{tuple(text_features.shape)}; one text for each image is needed")
        check_inputs(image_features, text_features, query_ids=ids, key_ids=ids)
        if isinstance(logit_bias, Tensor) and logit_bias.numel() != 1:
            raise ValueError(f"logit_bias: got shape {tuple(logit_bias.shape)}; one element is needed")

        if self.world_size == 1:
            loss = info_nce(image_features, text_features, scale=logit_scale, key_ids=ids, symmetric=True,
                            backend=self.backend)
        else:
            loss = self.gathered(image_features, text_features, logit_scale, ids)
        if logit_bias is not None:  # a zero gradient, so that DistributedDataParallel does not miss one
            loss = loss + 0.0 * torch.as_tensor(logit_bias).reshape(()).to(loss)
        return {"contrastive_loss": loss} if output_dict else loss

    def gathered(self, image: Tensor, text: Tensor, scale: float | Tensor, ids: Tensor | None) -> Tensor:
        """The loss with the pairs of all processes; each computes both directions for its own pairs."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(f"world_size is {self.world_size} but there is no default process group; call "
                               "torch.distributed.init_process_group first or leave world_size at 1")
        if (dist.get_rank(), dist.get_world_size()) != (self.rank, self.world_size):
            raise RuntimeError(f"rank {self.rank} of {self.world_size} was given, but this is rank {dist.get_rank()} "
                               f"of {dist.get_world_size()} in the default process group; give these")
        ids = None if ids is None else ids.long()  # one dtype for all processes
        sizes = batch_sizes(image, text, ids, ids, None)[:, 0]
        share = self.world_size / max(int(sizes.sum()), 1)  # the mean over the own pairs where all sizes are the same
        own = torch.arange(image.shape[0], device=image.device) + int(sizes[:self.rank].sum())
        all_ids = None if ids is None else gather_rows(ids, sizes)
        # open_clip differentiates the mean over all pairs by the own features here, one of W terms of that gradient
        factor = 1.0 if self.gather_with_grad or self.local_loss else 1 / self.world_size
        if not self.local_loss and isinstance(scale, Tensor):
            scale = _MeanGradient.apply(scale, 1 / factor)
        detached = self.local_loss and not self.gather_with_grad
        loss = 0.0
        for query, key in ((image, text), (text, image)):
            all_keys = gather_rows(key.detach() if detached else key, sizes)
            loss = loss + info_nce(query, all_keys, own, scale=scale, query_ids=ids, key_ids=all_ids, reduction="sum",
                                   backend=self.backend) * (share / 2)
        if self.local_loss:
            return loss
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        return whole / self.world_size + factor * (loss - loss.detach())  # the value of all, the gradient of the own


class _MeanGradient(torch.autograd.Function):
    """The tensor itself; its gradient is ``weight`` times the mean of the gradients of all processes."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total)
        return total * (ctx.weight / dist.get_world_size()), None
