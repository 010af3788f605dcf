"""RaRecModel: requests and items read by one frozen language model, told apart by injected ID vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config import ConfigError
from ...data.schema import Items, Split
from ...data.schema import Sequences as UserSequences
from ...losses.bpr import BPRLoss
from ...model.backbone import causal_lm, decoder_layers, load_backbone
from ...model.packed_attention import PACKED
from ...model.recommender import Recommender
from ...model.storage import ID_FOLDER, load_parts
from ...processes import several
from .config import RaRecConfig
from .id_models import known_vectors, load_id_model, make_id_model, save_id_model
from .injection import LayerVectors, inject_into
from .loss import RaRecLoss, first_here
from .prompts import HybridChunk, HybridPrompts, RaRecBatch, RaRecCollator
from .select import select_requests

SAMPLE = 64  # requests, and items, whose states set the starting point
LEAST_SPREAD = 0.1  # of the length of the mean state: texts that are all the same have no spread of their own


class RaRecModel(Recommender):
    """A frozen language model whose layers get ID vectors of the user or the item before the text.

    Built by `RaRecModel.build` from data or `RaRecModel.from_pretrained` from a folder. u and e are the last token's
    state of a request's and an item's prompt, less the mean at the start of training, as unit vectors; their inner
    product is the score.
    """

    def __init__(self, config: RaRecConfig, backbone: nn.Module, tokenizer, items: Items, id_model,
                 item_vectors: Tensor) -> None:
        super().__init__(config, backbone, tokenizer, items)
        model = causal_lm(backbone)
        hidden = model.config.get_text_config().hidden_size
        layers = decoder_layers(model)
        self.given = inject_into(layers)
        self.prompts = HybridPrompts(config, tokenizer, items, id_model, item_vectors)
        count, width = len(layers) if config.injection == "layers" else 1, self.prompts.item_vectors.shape[1]
        self.injected = nn.ModuleDict({kind: LayerVectors(width, count, config.num_context_tokens, hidden)
                                       for kind in ("user", "item")})
        # users and items have ID vectors in one space, where like ones are near; so they begin in one here too
        self.injected["item"].load_state_dict(self.injected["user"].state_dict())
        for kind in ("user", "item"):
            self.register_buffer(f"{kind}_scale", torch.ones(()))  # ID vectors times this have a mean square norm of 1
            self.register_buffer(f"{kind}_center", torch.zeros(hidden))  # of last states
            # what both sides of the alignment are compared less: means of text, and of what is injected, at the start
            self.register_buffer(f"{kind}_texts", torch.zeros(count, hidden))
            self.register_buffer(f"{kind}_injected", torch.zeros(count, hidden))
        self.loss = RaRecLoss(config.act_weight, config.align_weight, config.align_scale,
                              BPRLoss(config.init_scale, config.learnable_scale, config.max_scale, gather=True))
        self._encoded: tuple[tuple, Tensor] | None = None
        self.to(self.device)

    # ---- building ------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, config: RaRecConfig, items: Items, sequences: UserSequences, split: Split, *, seed: int = 0,
              device: torch.device | str | None = None, cache=None, progress: bool = False) -> RaRecModel:
        """A model ready to train: fits or reads the ID model, loads the language model, sets the starting point.

        Args:
            config: see `RaRecConfig`.
            items, sequences, split: from `karma_fast.data.load_dataset`. Only the training part is read.
            seed: of the new weights. device: default the GPU if there is one, under torchrun the process's own.
            cache: folder for trained ID models; default the user's cache.
        """
        from ...data.assets import cache_dir

        id_model = make_id_model(config, items, sequences, split, seed, Path(cache or cache_dir()), progress)
        backbone, tokenizer = load_backbone(config, device)
        torch.manual_seed(seed)
        model = cls(config, backbone, tokenizer, items, id_model, known_vectors(id_model, sequences, split))
        model.set_starting_point(sequences, split, seed)
        return model

    @torch.no_grad()
    def set_starting_point(self, sequences: UserSequences, split: Split, seed: int = 0) -> None:
        """Injected vectors in the range of the text's states at their layer, and the centre of last states."""
        self.eval()
        random = np.random.default_rng(seed)
        starts, ends = self.training_windows(sequences, split)
        windows = random.choice(len(ends), min(SAMPLE, len(ends)), replace=False) if len(ends) else []
        histories = [sequences.items[starts[w]:ends[w] - 1][-self.config.max_history:] for w in windows]
        items = np.sort(random.choice(len(self.items), min(SAMPLE, len(self.items)), replace=False))
        for kind, chunk in (("user", self.prompts.build(histories, [""] * len(histories))),
                            ("item", self.prompts.of_items(items))):
            if not len(chunk.pairs):
                continue
            chunk = chunk.to(self.device)
            vectors = chunk.vectors[~chunk.vectors.isnan().any(dim=1)]
            if len(vectors):
                getattr(self, f"{kind}_scale").copy_(1 / vectors.square().sum(dim=1).mean().sqrt().clamp_min(1e-6))
            layers = self.injected[kind]
            count, tokens = len(layers.weight), self.config.num_context_tokens
            mean = self.text_states(chunk)[:count].mean(dim=1)  # (layers, hidden)
            apart = self._states_of_one(chunk, random)[:count] - mean[:, None]  # (layers, S, hidden)
            spread = apart.square().sum(dim=2).mean(dim=1).sqrt()
            spread = spread.maximum(LEAST_SPREAD * mean.norm(dim=1))
            # the context begins as what real text has at these places; texts shorter than that repeat their mean
            at_places = self._text_means(chunk, chunk.text.positions.clamp_max(tokens), tokens)[:count]
            empty = torch.arange(tokens, device=mean.device) >= chunk.text.longest
            at_places[:, empty] = mean[:, None]
            layers.start_at(torch.cat([at_places, mean[:, None]], dim=1), spread)
            getattr(self, f"{kind}_texts").copy_(mean)
            scaled = chunk.vectors * getattr(self, f"{kind}_scale")
            getattr(self, f"{kind}_injected").copy_(torch.stack([m.mean(dim=0) for m in layers.means(scaled)]))
            getattr(self, f"{kind}_center").copy_(self._last_states(chunk).mean(dim=0))

    def _states_of_one(self, chunk: HybridChunk, random: np.random.Generator) -> Tensor:
        """(all layers, S, hidden) state of a drawn token of each prompt's text, of a one-token text that token.

        States of single tokens lie much farther apart than means over a text, and an injected vector stands for one.
        """
        lengths = chunk.text.offsets.diff().cpu().numpy()
        drawn = random.integers(np.minimum(1, lengths - 1), lengths)
        count = len(drawn)
        is_drawn = chunk.text.positions == torch.from_numpy(drawn).to(self.device)[chunk.owner]
        return self._text_means(chunk, chunk.owner.masked_fill(~is_drawn, count), count)

    # ---- training ------------------------------------------------------------------------------------------------

    @property
    def id_model(self):
        return self.prompts.id_model  # which is no module, so neither device nor optimiser reach the ID model

    @property
    def width(self) -> int:
        """Of u and e."""
        return self.user_center.shape[0]

    def training_windows(self, sequences: UserSequences, split: Split) -> tuple[np.ndarray, np.ndarray]:
        starts, ends = super().training_windows(sequences, split)
        if self.config.select_share == 1 and not self.config.select_overlap:
            return starts, ends
        chosen = select_requests(sequences, split, self.items, starts, ends, share=self.config.select_share,
                                 overlap=self.config.select_overlap).chosen
        if len(starts) and not len(chosen):
            raise ConfigError("model.select_overlap: got true, but no training request's target shares a word with "
                              "the titles of its history; set it to false")
        return starts[chosen], ends[chosen]

    def further_negatives(self, sequences: UserSequences) -> str:
        drawn = self.config.num_negatives
        return f"{drawn:,} drawn item{'s' * (drawn > 1)} a process" if drawn else ""

    def collator(self, sequences: UserSequences, log_q: np.ndarray | None = None, seed: int = 0,
                 chunk_size: int | None = None) -> RaRecCollator:
        """Makes batches of windows; chunk_size: prompts that the language model reads at once, None for all.

        log_q is there for recipes that correct for sampling.
        """
        _ = self.prompts.titles, self.prompts.item_texts  # tokenised here, not by every worker
        return RaRecCollator(self.prompts, sequences.without_queries(self.config.query_dropout, seed), chunk_size,
                             seed)

    def read(self, chunk: HybridChunk, gen: bool = True) -> tuple[Tensor, Tensor]:
        rows = self._last_states(chunk)
        center = self.item_center if chunk.of_items else self.user_center
        return F.normalize(rows - center, dim=-1), rows.new_zeros(())

    def _last_states(self, chunk: HybridChunk) -> Tensor:
        """(S, hidden) float32 state of each prompt's last token, with injection."""
        kind = "item" if chunk.of_items else "user"
        values = self.injected[kind](chunk.vectors * getattr(self, f"{kind}_scale")).flatten(1, 2)
        tokens = chunk.tokens
        places = chunk.places if self._is_packed else tokens.places[chunk.places]
        with self.given.writing(values, places):
            states = self._decoder_states(F.embedding(tokens.token_ids, self._embedding_table()), tokens)
        return states[chunk.pairs].float()

    @property
    def _is_packed(self) -> bool:
        return causal_lm(self.backbone).config._attn_implementation == PACKED

    @torch.no_grad()
    def text_states(self, chunk: HybridChunk) -> Tensor:
        """(all layers, S, hidden) float32 mean state of each prompt's text at the layers' inputs, nothing injected.

        Without its first token, whose state language models use as a place to look at and make far longer than others.
        """
        count = len(chunk.pairs)
        return self._text_means(chunk, chunk.owner.masked_fill(chunk.text.positions == 0, count), count)

    def _text_means(self, chunk: HybridChunk, owner: Tensor, count: int) -> Tensor:
        text = chunk.text
        if not self._is_packed:
            owner = owner.new_full((len(text) * text.longest,), count).index_copy(0, text.places, owner)
        with self.given.collecting(owner, count) as means:
            self._decoder_states(F.embedding(text.token_ids, self._embedding_table()), text)
            return torch.stack(means)

    def embedding_losses(self, u: Tensor, batch: RaRecBatch) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        requests = len(batch.labels)
        if self.loss.wants("act"):
            yield "act", lambda: self.loss.ranking(u[:requests], u[requests:], batch.labels, batch.keys)
        for kind in ("user", "item"):
            if self.loss.wants(kind):
                yield kind, lambda kind=kind: self.alignment_loss(batch, kind)

    def alignment_loss(self, batch: RaRecBatch, kind: str) -> Tensor:
        """L_ua or L_ia, () float32."""
        chunks = [chunk for chunk in batch.prompts if chunk.of_items == (kind == "item")]
        centers = getattr(self, f"{kind}_injected"), getattr(self, f"{kind}_texts")
        texts = torch.cat([self.text_states(chunk)[:len(centers[0])] for chunk in chunks], dim=1)
        vectors = torch.cat([chunk.vectors for chunk in chunks]) * getattr(self, f"{kind}_scale")
        if kind == "item" and self.loss.alignment.gather and several():
            own = first_here(batch.keys)  # an item that several processes have counts once
            texts, vectors = texts[:, own], vectors[own]
        losses = [self.loss.alignment(mean - start, text - center) for mean, text, start, center in
                  zip(self.injected[kind].means(vectors), texts, *centers, strict=True)]
        return torch.stack(losses).mean()

    # ---- saving --------------------------------------------------------------------------------------------------

    def item_tensors(self) -> dict[str, Tensor]:
        return {"id": self.prompts.item_vectors}

    def save_pretrained(self, folder, facts: dict | None = None) -> None:
        save_id_model(self.id_model, Path(folder) / ID_FOLDER)
        super().save_pretrained(folder, facts)

    @classmethod
    def from_pretrained(cls, folder, device: torch.device | str | None = None) -> RaRecModel:
        """The model that `save_pretrained` wrote; the backbone is loaded from where the config names it."""
        config, items, tensors, weights = load_parts(folder, RaRecConfig.recipe)
        backbone, tokenizer = load_backbone(config, device)
        model = cls(config, backbone, tokenizer, items, load_id_model(Path(folder) / ID_FOLDER), tensors["id"])
        return model.with_weights(weights, folder)

    # ---- using ---------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> RaRecModel:
        if mode:
            self._encoded = None  # fused optimisers change weights without raising their version
        return super().train(mode)

    @torch.no_grad()
    def encode_items(self, items: np.ndarray | None = None, *, batch_tokens: int = 4096,
                     progress: bool = False) -> Tensor:
        """(n, hidden) float32 on the CPU: e of the given catalogue indices, or of all.

        The language model reads every item's text for this; the result for all items is kept until a weight changes.
        """
        version = tuple(p._version for p in [*self.injected.parameters(), *self.buffers()])
        if self._encoded is None or self._encoded[0] != version:
            lengths = self.prompts.item_lengths
            if items is not None and 2 * len(items) < len(lengths):
                items = np.asarray(items, dtype=np.int64)
                return self.encode(lambda part: self.prompts.of_items(items[part]), lengths[items], batch_tokens)
            self._encoded = version, self.encode(self.prompts.of_items, lengths, batch_tokens,
                                                 "items" if progress else None)
        found = self._encoded[1]
        return found if items is None else found[torch.from_numpy(np.asarray(items, dtype=np.int64))]
