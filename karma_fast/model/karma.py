"""KarmaModel: histories and queries in, one interest embedding out, decodable into text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import KarmaConfig
from ..data.batches import DecodeChunk, KarmaBatch, KarmaCollator, PromptChunk, Prompts
from ..data.schema import Items, Split
from ..data.schema import Sequences as UserSequences
from ..data.windows import ONE_USER, training_windows
from ..data.words import word_vectors
from ..losses import InfoNCELoss, KarmaLoss, LossParts, frozen_decoder_loss, image_distance, text_losses
from .backbone import adapters_off, as_embedded, causal_lm, identity, load_backbone, resolve_backbone
from .features import ItemFeatures, cached_text_vectors
from .id_vectors import groups_of_users, held_out_id_vectors, id_vectors
from .initialise import item_projection, latest_mean, part_means, ridge
from .reading import autocast
from .recommender import Recommender
from .shortcut import HistoryShortcut, QueryShortcut
from .soft_prompt import SoftPromptProjection
from .storage import load_parts
from .warm_up import warm_up_decoder, warm_up_shortcut

BESIDE_SHORTCUT = 0.01  # length of W_o h at the start where the shortcut already says what a regression would


@dataclass
class KarmaOutput:
    """loss: the weighted total, (). parts: the terms. u: (P, d_e) interest embeddings of the batch's pairs."""

    loss: Tensor
    parts: LossParts
    u: Tensor


class KarmaModel(Recommender):
    """A language model with an item tower, an interest head and train-only decoders.

    Built by `KarmaModel.build` from data or `KarmaModel.from_pretrained` from a folder. Users and items meet in one
    space of ``config.embedding_dim`` unit vectors; their inner product is the score.
    """

    def __init__(self, config: KarmaConfig, backbone: nn.Module, tokenizer, items: Items,
                 features: ItemFeatures) -> None:
        super().__init__(config, backbone, tokenizer, items)
        model = causal_lm(backbone)
        hidden = model.config.get_text_config().hidden_size
        table = model.get_input_embeddings().weight
        norm = float(table.detach()[:: max(1, len(table) // 8192)].float().norm(dim=-1).mean())
        self.features = features
        self.item_projection = nn.Linear(features.width, config.embedding_dim, bias=False)  # W_e
        self.history_projection = SoftPromptProjection(features.width, hidden, mid_features=config.mid_features,
                                                       token_norm=norm)  # P_in
        self.interest_projection = nn.Linear(hidden, config.embedding_dim, bias=False)  # W_o
        self.emb_token = nn.Parameter(F.normalize(torch.randn(hidden), dim=0) * norm)
        if config.weight("rec") > 0:
            self.decode_projection = SoftPromptProjection(config.embedding_dim, hidden, config.num_soft_tokens,
                                                          mid_features=config.mid_features, token_norm=norm)  # P_rec
        self.image_head = None
        if config.weight("vis") > 0 and "image" in features.kinds:
            self.image_head = nn.Sequential(nn.Linear(config.embedding_dim, config.embedding_dim), nn.GELU(),
                                            nn.Linear(config.embedding_dim, features.widths["image"]))
        # last, so that what models with and without it share begins with the same random numbers
        self.shortcut = HistoryShortcut(features.width, config.embedding_dim) if config.history_shortcut else None
        self.query_shortcut = None
        if features.query_words is not None:
            self.query_shortcut = QueryShortcut(features.widths["words"], config.embedding_dim)
        self.loss = KarmaLoss(
            config.act_weight, config.gen_weight, config.rec_weight, config.vis_weight, config.decode_weight,
            InfoNCELoss(config.init_scale, config.learnable_scale, config.max_scale, symmetric=config.symmetric,
                        normalize=False, gather=True))
        self.prompts = Prompts(config, tokenizer, items.texts, features.vocabulary)
        self.to(model.device)

    # ---- building ------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, config: KarmaConfig, items: Items, sequences: UserSequences, split: Split, *, seed: int = 0,
              device: torch.device | str | None = None, cache=None, progress: bool = False) -> KarmaModel:
        """A model ready to train: loads the language model, encodes the items (cached), sets the starting point.

        Args:
            config: see `KarmaConfig`.
            items, sequences, split: from `karma_fast.data.load_dataset`. Only the training part is read.
            seed: of the new weights. device: default the GPU if there is one, under torchrun the process's own.
            cache: folder for text vectors; default the user's cache.
        """
        from ..data.assets import cache_dir

        name = resolve_backbone(config.backbone)  # a first conversion draws random numbers, so the seed comes after it
        torch.manual_seed(seed)
        backbone, tokenizer = load_backbone(config, device)
        torch.manual_seed(seed)  # once more, as LoRA draws and a frozen model does not
        vectors, query_words = {}, None
        text_kinds = config.text_kinds if any(items.texts) else ()
        if "words" in text_kinds:
            vectors["words"], of_words, words = word_vectors(items.texts, config.word_dim)
            if words and config.query_shortcut and sequences.queries is not None:
                query_words = words, of_words
        if "text" in text_kinds:
            key = f"{identity(name)} {config.quantization}"
            vectors["text"] = cached_text_vectors(items.texts, backbone, tokenizer, key, cache or cache_dir(),
                                                  config.item_instruction, progress)
        if items.image_vectors is not None:
            vectors["image"] = items.image_vectors
        if items.id_vectors is not None:
            vectors["id"] = items.id_vectors
        elif config.id_dim > 0:
            vectors["id"] = id_vectors(sequences, split, len(items), config.id_dim, config.id_window)
        held_out = None
        if config.id_folds and items.id_vectors is None and "id" in vectors:
            held_out = held_out_id_vectors(sequences, split, len(items), config.id_dim, config.id_window,
                                           config.id_folds, vectors["id"], progress)
        model = cls(config, backbone, tokenizer, items, ItemFeatures(vectors, held_out, query_words))
        model.set_starting_point(sequences, split, seed, progress=progress)
        if config.decoder_warmup_steps and model.decode_projection is not None:
            warm_up_decoder(model, config.decoder_warmup_steps, seed, progress)
        return model

    @torch.no_grad()
    def set_starting_point(self, sequences: UserSequences, split: Split, seed: int = 0,
                           num_windows: int = 192, progress: bool = False) -> None:
        """W_e and the shortcuts from the features, then ``shortcut_warmup_epochs`` without the language model.

        Without a shortcut of the history W_o is the regression to the latest items' mean; see
        `karma_fast.model.initialise`.
        """
        self.item_projection.weight.copy_(item_projection(self.features, self.config.embedding_dim))
        if self.query_shortcut is not None:
            of_words = self.item_projection.weight[:, self.features.columns("words")]
            self.query_shortcut.projection.weight.copy_(of_words)
        if self.shortcut is not None:
            self.shortcut.projection.weight.copy_(self.item_projection.weight)
            if self.config.shortcut_warmup_epochs and self.loss.wants("act"):
                warm_up_shortcut(self, sequences, split, self.config.shortcut_warmup_epochs, seed, progress)
            weight = self.interest_projection.weight
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight.copy_(BESIDE_SHORTCUT * len(weight) ** -0.5 * drawn)
        else:
            self._start_interest(sequences, split, seed, num_windows)
        if self.decode_projection is not None:
            self._start_decoder(seed)

    def _start_interest(self, sequences: UserSequences, split: Split, seed: int, num_windows: int) -> None:
        """W_o by ridge regression from the states of training windows to the mean of the latest items' embeddings."""
        starts, ends = training_windows(sequences, split, self.config.max_history, "all")
        if not len(starts):
            return
        chosen = np.random.default_rng(seed).choice(len(starts), min(num_windows, len(starts)), replace=False)
        chosen = chosen[np.argsort(ends[chosen] - starts[chosen], kind="stable")]
        states, targets, weights = [], [], []
        self.eval()
        for part in np.array_split(chosen, -(-len(chosen) // 32)):
            histories = [sequences.items[starts[w]:ends[w]][-self.config.max_history:] for w in part]
            chunk = self.prompts.build(histories, [""] * len(part))
            hidden = F.normalize(self._prompt_states(chunk.to(self.device)).float(), dim=-1)
            for emb, history in zip(chunk.emb.tolist(), histories, strict=True):
                states.append(hidden[emb - len(history):emb + 1])
                goal = latest_mean(self.encode_items(np.asarray(history)))
                targets.append(torch.cat([goal, goal[-1:]]))
                # [EMB] is what serving reads, so it weighs as much as the item positions together
                weights.append(torch.tensor([1.0] * len(history) + [float(len(history))]))
        states, targets, weights = torch.cat(states), torch.cat(targets).to(self.device), torch.cat(weights)
        self.interest_projection.weight.copy_(ridge(states, targets, weights.to(self.device)))

    def _start_decoder(self, seed: int, num_items: int = 4096) -> None:
        """P_rec's last layer from items' embeddings to the mean token embeddings of parts of their texts."""
        with_text = np.flatnonzero(self.prompts.texts.lengths)
        if not len(with_text):
            return
        if len(with_text) > num_items:
            with_text = np.sort(np.random.default_rng(seed).choice(with_text, num_items, replace=False))
        projection, table = self.decode_projection, self._embedding_table()
        e = self.encode_items(with_text).to(self.device)
        inner = F.gelu(projection.up(projection.norm(e)))
        goals = torch.stack([part_means(self.prompts.texts[i], projection.num_tokens, table) for i in with_text])
        projection.down.weight.copy_(ridge(inner, goals.flatten(1)))

    # ---- training ------------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Of u and e."""
        return self.config.embedding_dim

    def training_windows(self, sequences: UserSequences, split: Split) -> tuple[np.ndarray, np.ndarray]:
        starts, ends = super().training_windows(sequences, split)
        if self.loss.wants("act") and sequences.negatives is None and len(np.unique(sequences.user_of(starts))) == 1:
            raise ValueError(ONE_USER)
        return starts, ends

    def further_negatives(self, sequences: UserSequences) -> str:
        return "" if sequences.negatives is None else "its shown but unchosen items"

    def collator(self, sequences: UserSequences, log_q: np.ndarray | None = None, seed: int = 0,
                 chunk_size: int | None = None) -> KarmaCollator:
        """Makes batches of windows; chunk_size: windows that the language model reads at once, None for all."""
        if self.config.weight("gen") + self.config.weight("rec") > 0:
            _ = self.prompts.texts  # tokenised here, not by every worker
        first_rows = None
        if self.features.folds:
            first_rows = len(self.features) * (1 + groups_of_users(len(sequences), self.features.folds))
        return KarmaCollator(self.config, self.prompts, sequences.without_queries(self.config.query_dropout, seed),
                             log_q if self.config.log_q else None, seed=seed, chunk_size=chunk_size,
                             first_rows=first_rows)

    def _prompt_states(self, chunk: PromptChunk) -> Tensor:
        """(N, hidden) last states of a chunk's stream."""
        tokens = chunk.tokens
        embeds = self.history_projection.insert(tokens.token_ids[None], tokens.slots[None],
                                                self.features(chunk.history_items), self._embedding_table(),
                                                self.emb_token[None])
        return self._decoder_states(embeds[0], tokens)

    def interest(self, states: Tensor, chunk: PromptChunk) -> Tensor:
        """(P, hidden) states of a chunk's pairs -> (P, d_e) unit vectors, float32.

        States count by direction alone: their lengths, tens to hundreds, would make W_o's steps as much too long.
        """
        u = self.interest_projection(F.normalize(states.float(), dim=-1))
        past = self.past_language_model(chunk)
        return F.normalize(u if past is None else u + past, dim=-1)

    def past_language_model(self, chunk: PromptChunk) -> Tensor | None:
        """(P, d_e) float32, what the shortcuts say of a chunk's pairs; None without any."""
        parts = []
        if self.shortcut is not None:
            parts.append(self.shortcut(self.features(chunk.history_items), chunk.latest))
        if self.query_shortcut is not None:
            parts.append(self.query_shortcut(self.features.query_words, chunk.words))
        return sum(parts) if parts else None

    def item_embeddings(self, items: Tensor) -> Tensor:
        """(n,) rows of the features, such as catalogue indices -> (n, d_e) unit vectors, float32."""
        return F.normalize(self.item_projection(self.features(items)), dim=-1)

    def forward(self, batch: KarmaBatch) -> KarmaOutput:
        """The loss of a batch and its parts; a term with weight 0 is not computed.

        Keeps all chunks of the batch in memory; `karma_fast.step.backward` does not.
        """
        read = [self.read(chunk) for chunk in batch.prompts]
        u = torch.cat([u for u, _ in read])
        parts = LossParts()
        for name, loss_of in self.embedding_losses(u, batch):
            parts.add(name, loss_of())
        if self.loss.wants("gen"):
            parts.gen = torch.stack([gen for _, gen in read]).sum() / batch.num_texts
        # a batch may have nothing for the terms that are wanted
        return KarmaOutput(self.loss(parts) if parts.present() else u.sum() * 0, parts, u)

    def read(self, chunk: PromptChunk, gen: bool = True) -> tuple[Tensor, Tensor]:
        hidden = self._prompt_states(chunk)
        texts = hidden.new_zeros((), dtype=torch.float32)
        if gen and self.loss.wants("gen"):
            texts = self._text_loss(hidden[chunk.texts.index], chunk.texts)
        return self.interest(hidden[chunk.pairs], chunk), texts

    def embedding_losses(self, u: Tensor, batch: KarmaBatch) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        if self.loss.wants("act"):
            yield "act", lambda: self.contrastive_loss(u, batch)
        if self.loss.wants("rec"):
            for chunk in batch.decode:
                yield "rec", lambda c=chunk: self.reconstruction_loss(u[c.pairs], c) / batch.num_decoded
        if self.wants_images(batch):
            yield "vis", lambda: self.image_loss(u, batch)

    def contrastive_loss(self, u: Tensor, batch: KarmaBatch) -> Tensor:
        """L_act, () float32: (P, d_e) embeddings against the batch's keys.

        A key is no negative if it is another target of the same user or another copy of the target.
        """
        e = F.embedding(batch.key_index, self.item_embeddings(batch.key_items))
        ids = torch.stack([batch.keys, batch.key_users], dim=1)
        return self.loss.contrastive(u, e, None, None, ids, batch.log_q)

    def wants_images(self, batch: KarmaBatch) -> bool:
        return self.loss.wants("vis") and self.image_head is not None and len(batch.decode_pairs) > 0

    def image_loss(self, u: Tensor, batch: KarmaBatch) -> Tensor:
        """L_vis, () float32, of the batch's (P, d_e) embeddings."""
        targets = batch.keys[batch.decode_pairs]
        return image_distance(self.image_head(u[batch.decode_pairs]), self.features.image[targets],
                              self.features.image_present[targets], batch.num_decoded)

    def _text_states(self, embeds: Tensor, chunk: DecodeChunk) -> Tensor:
        """(N, hidden) inputs -> (G, hidden) states that predict the texts' tokens."""
        return self._decoder_states(embeds, chunk.tokens)[chunk.texts.index]

    def _decoder_inputs(self, u: Tensor, chunk: DecodeChunk) -> Tensor:
        tokens = chunk.tokens
        return self.decode_projection.insert(tokens.token_ids[None], tokens.slots[None], u,
                                             self._embedding_table())[0]

    def reconstruction_loss(self, u: Tensor, chunk: DecodeChunk) -> Tensor:
        """L_rec's sum over texts, () float32: of (S, d_e) embeddings, the mean token loss of S texts given each alone.
        """

        def loss_of(embeds: Tensor) -> Tensor:
            return self._text_loss(self._text_states(embeds, chunk), chunk.texts)

        embeds = self._decoder_inputs(u, chunk)
        if self.config.tuning == "full":  # the decoder is trained too: the plain path
            return loss_of(embeds)
        with adapters_off(self.backbone):
            return frozen_decoder_loss(embeds, loss_of)

    @torch.no_grad()
    def reconstruction_losses(self, u: Tensor, chunk: DecodeChunk) -> Tensor:
        """(S,) float32: the mean token loss of each text given its row of u, (S, d_e), alone."""
        with adapters_off(self.backbone):
            states = self._text_states(self._decoder_inputs(u, chunk), chunk)
            texts = chunk.texts
            return text_losses(self._logits, states, texts.labels, texts.weights, texts.rows, len(u), self.vocabulary)

    # ---- saving --------------------------------------------------------------------------------------------------

    def item_tensors(self) -> dict[str, Tensor]:
        return self.features.tensors()

    @classmethod
    def from_pretrained(cls, folder, device: torch.device | str | None = None) -> KarmaModel:
        """The model that `save_pretrained` wrote; the backbone is loaded from where the config names it."""
        config, items, features, weights = load_parts(folder, KarmaConfig.recipe)
        backbone, tokenizer = load_backbone(config, device)
        model = cls(config, backbone, tokenizer, items, ItemFeatures.from_tensors(features))
        return model.with_weights(weights, folder)

    # ---- using ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_items(self, items: np.ndarray | None = None, batch_size: int = 65_536) -> Tensor:
        """(n, d_e) float32 on the CPU: e of the given catalogue indices, or of all."""
        items = np.arange(len(self.items)) if items is None else np.asarray(items, dtype=np.int64)
        parts = [self.item_embeddings(torch.from_numpy(items[at:at + batch_size]).to(self.device)).cpu()
                 for at in range(0, len(items), batch_size)]
        return torch.cat(parts) if parts else torch.zeros(0, self.config.embedding_dim)

    @torch.no_grad()
    def decode(self, u: Tensor, max_new_tokens: int | None = None) -> list[str]:
        """(n, d_e) embeddings -> n texts, greedily decoded by the untuned model from the embedding alone."""
        if self.decode_projection is None:
            raise ValueError("this model was trained without L_rec (model.rec_weight or model.decode_weight is 0), so "
                             "its embeddings cannot be decoded")
        from transformers import GenerationConfig

        model = causal_lm(self.backbone)
        training = self.training
        self.eval()
        soft = as_embedded(model, self.decode_projection(u.to(self.device)))
        with adapters_off(self.backbone), autocast(self.device):
            # a config of our own, as a model's may ask for sampling or penalties
            greedy = GenerationConfig(max_new_tokens=max_new_tokens or self.config.max_text_tokens, do_sample=False,
                                      use_cache=True, eos_token_id=self.tokenizer.eos_token_id,
                                      pad_token_id=self.tokenizer.eos_token_id)
            mask = torch.ones(soft.shape[:2], dtype=torch.int64, device=self.device)
            ids = model.generate(inputs_embeds=soft, attention_mask=mask, generation_config=greedy)
        self.train(training)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
