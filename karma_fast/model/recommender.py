"""What the models of all recipes share: a language model, prompts, saving, and the encoding of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..data.packing import Packed, TextTargets
from ..data.schema import Items, Split
from ..data.schema import Sequences as UserSequences
from ..data.windows import training_windows
from ..losses import WeightedLoss, text_loss
from .backbone import causal_lm
from .reading import decoder_states, logits
from .storage import save_model, save_tensors

if TYPE_CHECKING:
    from ..data.batches import PromptChunk


class Recommender(nn.Module):
    """Users and items meet in one space of unit vectors; their inner product is the score.

    A recipe's model adds ``loss`` (a `WeightedLoss`), ``prompts`` (whose ``build`` makes a `PromptChunk` of requests),
    ``width`` of the vectors, ``collator``, ``further_negatives``, ``read``, ``embedding_losses``, ``encode_items``,
    ``item_tensors``, and the class methods ``build`` and ``from_pretrained``. `karma_fast.step.backward` trains any.
    """

    loss: WeightedLoss

    def __init__(self, config, backbone: nn.Module, tokenizer, items: Items) -> None:
        super().__init__()
        self.config, self.tokenizer, self.items, self.backbone = config, tokenizer, items, backbone
        self.decode_projection: nn.Module | None = None  # from u to soft tokens that are decoded into text

    # ---- training ------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._embedding_table().device

    def training_windows(self, sequences: UserSequences, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """(W,) starts and (W,) ends of the windows of events that are trained on."""
        return training_windows(sequences, split, self.config.max_history, self.config.positions)

    def further_negatives(self, sequences: UserSequences) -> str:
        """What a request is compared with beside the targets of its batch, in words; "" for nothing."""
        raise NotImplementedError

    def read(self, chunk: PromptChunk, gen: bool = True) -> tuple[Tensor, Tensor]:
        """A pass over some prompts: (P, d) unit vectors of their pairs, and () the sum of their text losses.

        gen: False leaves the text losses out.
        """
        raise NotImplementedError

    def embedding_losses(self, u: Tensor, batch) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """(term, its loss) of what depends on the (P, d) vectors of a batch's pairs and not on how they were made.

        A term may come in several parts, which add up to it.
        """
        raise NotImplementedError

    def _decoder_states(self, inputs_embeds: Tensor, tokens: Packed) -> Tensor:
        """(N, hidden) rows of the embedding table, or what stands for such -> (N, hidden) last states."""
        return decoder_states(self.backbone, inputs_embeds, tokens)

    def _embedding_table(self) -> Tensor:
        return causal_lm(self.backbone).get_input_embeddings().weight

    @property
    def vocabulary(self) -> int:
        return causal_lm(self.backbone).get_output_embeddings().weight.shape[0]

    @property
    def head_is_trained(self) -> bool:
        return any(p.requires_grad for p in causal_lm(self.backbone).get_output_embeddings().parameters())

    def _text_loss(self, states: Tensor, texts: TextTargets) -> Tensor:
        return text_loss(self._logits, states, texts.labels, texts.weights, self.vocabulary,
                         frozen=not self.head_is_trained)

    def _logits(self, states: Tensor) -> Tensor:
        return logits(self.backbone, states)

    # ---- saving --------------------------------------------------------------------------------------------------

    def trained_names(self) -> set[str]:
        """Names of what `model.safetensors` holds: all trained weights and small buffers, no frozen language model.

        A tied weight, such as that of embeddings and output head, has one of its names.
        """
        first = {name for name, _ in self.named_parameters()}
        left_out = {name for name, p in self.named_parameters(remove_duplicate=False)
                    if name not in first or (name.startswith("backbone.") and not p.requires_grad)}
        return {name for name in self.state_dict() if name not in left_out
                and (not name.startswith("backbone.") or "lora_" in name or self.config.tuning == "full")}

    def save_weights(self, folder) -> None:
        """Writes ``model.safetensors``, the weights alone."""
        folder.mkdir(parents=True, exist_ok=True)
        names = self.trained_names()
        save_tensors({k: v for k, v in self.state_dict().items() if k in names}, folder / "model.safetensors")

    def with_weights(self, weights: dict[str, Tensor], folder) -> Recommender:
        """The model itself, ready to use, with what `save_weights` wrote; ConfigError if that does not fit."""
        wanted = self.trained_names()
        if set(weights) != wanted:
            raise ConfigError(f"{folder}: its weights do not fit its config: missing "
                              f"{sorted(wanted - set(weights))[:5]}, unknown {sorted(set(weights) - wanted)[:5]}")
        self.load_state_dict(weights, strict=False)
        return self.eval()

    def item_tensors(self) -> dict[str, Tensor]:
        """What `items.safetensors` holds: the items' frozen features."""
        raise NotImplementedError

    def save_pretrained(self, folder, facts: dict | None = None) -> None:
        """Writes config, weights, items with their features, and a model card that tells ``facts``.

        An index in the folder belonged to the model before and is removed; `ItemIndex.save` writes a new one.
        facts: for example {"data": ..., "protocol": ..., "rows": {"karma": {"HR@10": ...}}}.
        """
        save_model(self, Path(folder), facts)

    # ---- using ---------------------------------------------------------------------------------------------------

    def decode(self, u: Tensor, max_new_tokens: int | None = None) -> list[str]:
        """(n, d) vectors -> n texts; ValueError for a recipe without a decoder."""
        raise ValueError(f"the recipe {self.config.recipe} trains no decoder, so its embeddings cannot be decoded")

    @torch.no_grad()
    def encode_users(self, histories: Sequence[np.ndarray], queries: Sequence[str] | None = None, *,
                     batch_tokens: int = 4096, progress: bool = False) -> Tensor:
        """(U, d_e) float32 on the CPU: u of each request.

        Args:
            histories: U arrays of catalogue indices, oldest first; the last ``config.max_history`` count. One may be
                empty.
            queries: U texts, "" for none.
        """
        queries = [""] * len(histories) if queries is None else queries
        histories = [np.asarray(h, dtype=np.int64)[-self.config.max_history:] for h in histories]
        lengths = [self.prompts.length(h) + len(q) for h, q in zip(histories, queries, strict=True)]

        def build(part: np.ndarray) -> PromptChunk:
            return self.prompts.build([histories[i] for i in part], [queries[i] for i in part])

        return self.encode(build, np.array(lengths), batch_tokens, "users" if progress else None)

    @torch.no_grad()
    def encode(self, build: Callable[[np.ndarray], PromptChunk], lengths: np.ndarray, batch_tokens: int,
               shown: str | None = None) -> Tensor:
        """(n, d) float32 on the CPU: vectors of n prompts of about (n,) ``lengths`` tokens, like lengths together.

        build: numbers of prompts -> a chunk of them, each with one pair. shown: what a progress bar says is encoded.
        """
        from tqdm.auto import tqdm

        order = np.argsort(lengths, kind="stable")
        out = torch.zeros(len(order), self.width)
        training = self.training
        self.eval()
        with tqdm(total=len(order), desc=f"encoding {shown}", unit=(shown or "")[:-1], disable=shown is None) as bar:
            at = 0
            while at < len(order):
                # sorted, so the first that does not fit any more ends a part; a prompt has a token or more
                following = lengths[order[at:at + batch_tokens]]
                fits = np.arange(1, len(following) + 1) * following <= batch_tokens
                part = order[at:at + max(1, int(fits.sum()))]
                out[torch.from_numpy(part)] = self.read(build(part).to(self.device), gen=False)[0].float().cpu()
                bar.update(len(part))
                at += len(part)
        self.train(training)
        return out
