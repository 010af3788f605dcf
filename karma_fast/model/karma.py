"""KarmaModel: histories and queries in, one interest embedding out, decodable into text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ConfigError, KarmaConfig
from ..data.batches import KarmaBatch, KarmaCollator, Prompts
from ..data.schema import Items, Split
from ..data.schema import Sequences as UserSequences
from ..data.windows import training_windows
from ..losses import InfoNCELoss, KarmaLoss, LossParts, frozen_decoder_loss, image_distance, text_losses
from .backbone import adapters_off, causal_lm, compute_dtype, identity, load_backbone, resolve_backbone, token_logits
from .features import ItemFeatures, cached_text_vectors
from .id_vectors import id_vectors
from .initialise import item_projection, latest_mean, part_means, ridge
from .soft_prompt import SoftPromptProjection
from .storage import load_parts, save_model, save_tensors


@dataclass
class KarmaOutput:
    """loss: the weighted total, (). parts: the terms. u: (P, d_e) interest embeddings of the batch's pairs."""

    loss: Tensor
    parts: LossParts
    u: Tensor


class KarmaModel(nn.Module):
    """A language model with an item tower, an interest head and train-only decoders.

    Built by `KarmaModel.build` from data or `KarmaModel.from_pretrained` from a folder. Users and items meet in one
    space of ``config.embedding_dim`` unit vectors; their inner product is the score.
    """

    def __init__(self, config: KarmaConfig, backbone: nn.Module, tokenizer, items: Items,
                 features: ItemFeatures) -> None:
        super().__init__()
        self.config, self.tokenizer, self.items = config, tokenizer, items
        self.backbone = backbone
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
        self.decode_projection = None
        if config.weight("rec") > 0:
            self.decode_projection = SoftPromptProjection(config.embedding_dim, hidden, config.num_soft_tokens,
                                                          mid_features=config.mid_features, token_norm=norm)  # P_rec
        self.image_head = None
        if config.weight("vis") > 0 and "image" in features.kinds:
            self.image_head = nn.Sequential(nn.Linear(config.embedding_dim, config.embedding_dim), nn.GELU(),
                                            nn.Linear(config.embedding_dim, features.widths["image"]))
        gather = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.loss = KarmaLoss(
            config.act_weight, config.gen_weight, config.rec_weight, config.vis_weight, config.decode_weight,
            InfoNCELoss(config.init_scale, config.learnable_scale, config.max_scale, symmetric=config.symmetric,
                        normalize=False, gather=gather))
        self.prompts = Prompts(config, tokenizer, items.texts)
        self.to(model.device)

    # ---- building ------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, config: KarmaConfig, items: Items, sequences: UserSequences, split: Split, *, seed: int = 0,
              device: torch.device | str | None = None, cache=None, progress: bool = False) -> KarmaModel:
        """A model ready to train: loads the language model, encodes the items (cached), sets the starting point.

        Args:
            config: see `KarmaConfig`.
            items, sequences, split: from `karma_fast.data.load_dataset`. Only the training part is read.
            seed: of the new weights. device: default the GPU if there is one.
            cache: folder for text vectors; default the user's cache.
        """
        from ..data.assets import cache_dir

        name = resolve_backbone(config.backbone)  # a first conversion draws random numbers, so the seed comes after it
        torch.manual_seed(seed)
        backbone, tokenizer = load_backbone(config, device)
        vectors = {}
        if any(items.texts):
            key = f"{identity(name)} {config.quantization}"
            vectors["text"] = cached_text_vectors(items.texts, backbone, tokenizer, key, cache or cache_dir(),
                                                  config.item_instruction, progress)
        if items.image_vectors is not None:
            vectors["image"] = items.image_vectors
        if items.id_vectors is not None:
            vectors["id"] = items.id_vectors
        elif config.id_dim > 0:
            vectors["id"] = id_vectors(sequences, split, len(items), config.id_dim)
        model = cls(config, backbone, tokenizer, items, ItemFeatures(vectors))
        model.set_starting_point(sequences, split, seed)
        if config.decoder_warmup_steps and model.decode_projection is not None:
            model.warm_up_decoder(config.decoder_warmup_steps, seed, progress)
        return model

    @torch.no_grad()
    def set_starting_point(self, sequences: UserSequences, split: Split, seed: int = 0,
                           num_windows: int = 192) -> None:
        """W_e from the features, W_o by regression to the latest items' mean; see `karma_fast.model.initialise`."""
        self.item_projection.weight.copy_(item_projection(self.features, self.config.embedding_dim))
        if self.decode_projection is not None:
            self._start_decoder(seed)
        starts, ends = training_windows(sequences, split, self.config.max_history, "all")
        if not len(starts):
            return
        chosen = np.random.default_rng(seed).choice(len(starts), min(num_windows, len(starts)), replace=False)
        chosen = chosen[np.argsort(ends[chosen] - starts[chosen], kind="stable")]
        states, targets, weights = [], [], []
        self.eval()
        for part in np.array_split(chosen, -(-len(chosen) // 32)):
            histories = [sequences.items[starts[w]:ends[w]][-self.config.max_history:] for w in part]
            fields = self.prompts.build(histories, [""] * len(part))
            hidden = self._prompt_states(fields).float()
            for row, history in enumerate(histories):
                emb = int(fields["emb_columns"][row])
                states.append(hidden[row, emb - len(history):emb + 1])
                goal = latest_mean(self.encode_items(np.asarray(history)))
                targets.append(torch.cat([goal, goal[-1:]]))
                # [EMB] is what serving reads, so it weighs as much as the item positions together
                weights.append(torch.tensor([1.0] * len(history) + [float(len(history))]))
        states, targets, weights = torch.cat(states), torch.cat(targets).to(self.device), torch.cat(weights)
        self.interest_projection.weight.copy_(ridge(states, targets, weights.to(self.device)))

    def _start_decoder(self, seed: int, num_items: int = 4096) -> None:
        """P_rec's last layer from items' embeddings to the mean token embeddings of parts of their texts."""
        with_text = np.flatnonzero([len(t) > 0 for t in self.prompts.texts])
        if not len(with_text):
            return
        if len(with_text) > num_items:
            with_text = np.sort(np.random.default_rng(seed).choice(with_text, num_items, replace=False))
        projection, table = self.decode_projection, self._embedding_table()
        e = self.encode_items(with_text).to(self.device)
        inner = F.gelu(projection.up(projection.norm(e)))
        goals = torch.stack([part_means(self.prompts.texts[i], projection.num_tokens, table) for i in with_text])
        projection.down.weight.copy_(ridge(inner, goals.flatten(1)))

    def warm_up_decoder(self, steps: int, seed: int = 0, progress: bool = False, batch_size: int = 64,
                        learning_rate: float = 3e-3) -> list[float]:
        """Trains P_rec alone to decode items' texts from their own embeddings; returns the loss of each step.

        An item's embedding says what the text is, which a user's does only roughly, so P_rec learns faster from it.
        """
        from tqdm.auto import tqdm

        with_text = np.flatnonzero([len(t) > 0 for t in self.prompts.texts])
        random, order, losses = np.random.default_rng(seed), np.zeros(0, dtype=np.int64), []
        optimiser = torch.optim.AdamW(self.decode_projection.parameters(), lr=learning_rate)
        self.train()
        for step in tqdm(range(steps if len(with_text) else 0), desc="warming up the decoder", unit="step",
                         disable=not progress):
            if len(order) < batch_size:
                order = np.concatenate([order, random.permutation(with_text)])
            items, order = order[:batch_size], order[batch_size:]
            ids, lengths = (x.to(self.device) for x in self.prompts.padded_texts(items))
            loss = self.reconstruction_loss(self.encode_items(items).to(self.device), ids, lengths, len(items))
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * min(1, (step + 1) / 5, (steps - step) / (steps / 2))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.decode_projection.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.item())
        return losses

    # ---- training ------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.emb_token.device

    def collator(self, sequences: UserSequences, log_q: np.ndarray | None = None, seed: int = 0) -> KarmaCollator:
        return KarmaCollator(self.config, self.prompts, sequences, log_q if self.config.log_q else None, seed=seed)

    def _autocast(self):
        dtype = compute_dtype(self.device)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def _decoder_states(self, inputs_embeds: Tensor) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden) last states. Right padding needs no mask in a causal model."""
        model = causal_lm(self.backbone)
        with self._autocast():
            return model.base_model(inputs_embeds=inputs_embeds.to(model.dtype), use_cache=False).last_hidden_state

    def _embedding_table(self) -> Tensor:
        return causal_lm(self.backbone).get_input_embeddings().weight

    def _states(self, token_ids: Tensor, slots: Tensor, history_items: Tensor, emb_columns: Tensor) -> Tensor:
        vectors = self.features(history_items)
        embeds = self.history_projection.insert(token_ids, slots, vectors, self._embedding_table())
        rows = torch.arange(len(embeds), device=embeds.device)
        embeds = embeds.index_put((rows, emb_columns), self.emb_token.to(embeds.dtype))
        return self._decoder_states(embeds)

    def _prompt_states(self, fields: dict[str, Tensor]) -> Tensor:
        """States of what `Prompts.build` made."""
        return self._states(**{k: v.to(self.device) for k, v in fields.items() if not k.startswith("gen_")})

    def interest(self, states: Tensor) -> Tensor:
        """(n, hidden) states at a query's position -> (n, d_e) unit vectors, float32."""
        return F.normalize(self.interest_projection(states.float()), dim=-1)

    def item_embeddings(self, items: Tensor) -> Tensor:
        """(n,) catalogue indices -> (n, d_e) unit vectors, float32."""
        return F.normalize(self.item_projection(self.features(items)), dim=-1)

    def forward(self, batch: KarmaBatch) -> KarmaOutput:
        """The loss of a batch and its parts; a term with weight 0 is not computed."""
        hidden = self._states(batch.token_ids, batch.slots, batch.history_items, batch.emb_columns)
        u = self.interest(hidden[batch.pair_rows, batch.pair_columns])
        parts = LossParts()
        if self.loss.wants("act"):
            keys, index = torch.unique(batch.keys, return_inverse=True)
            e = self.item_embeddings(keys)[index]
            parts.act = self.loss.contrastive(u, e, None, None, batch.keys, batch.log_q)
        if self.loss.wants("gen"):
            states = hidden[batch.gen_rows, batch.gen_columns]
            losses = text_losses(self._logits(states), batch.gen_labels, batch.gen_rows, len(batch))
            parts.gen = losses.sum() / batch.num_texts
        num_decoded = batch.num_texts * self.config.decode_positions
        if self.loss.wants("rec") and len(batch.decode_pairs):
            parts.rec = self.reconstruction_loss(u[batch.decode_pairs], batch.text_ids, batch.text_lengths,
                                                 num_decoded)
        if self.loss.wants("vis") and self.image_head is not None and len(batch.decode_pairs):
            targets = batch.keys[batch.decode_pairs]
            parts.vis = image_distance(self.image_head(u[batch.decode_pairs]), self.features.image[targets],
                                       self.features.image_present[targets], num_decoded)
        return KarmaOutput(self.loss(parts), parts, u)

    def _logits(self, states: Tensor) -> Tensor:
        with self._autocast():
            return token_logits(causal_lm(self.backbone), states)

    def reconstruction_losses(self, soft: Tensor, text_ids: Tensor, text_lengths: Tensor) -> Tensor:
        """(S, K, hidden) soft tokens, (S, Y) texts, (S,) lengths -> (S,) mean token loss of each text after them."""
        y = F.embedding(text_ids, self._embedding_table())
        present = torch.arange(text_ids.shape[1], device=soft.device) < text_lengths[:, None]
        states = self._decoder_states(torch.cat([soft.to(y.dtype), y], dim=1))
        # the last soft token predicts the first token of the text
        logits = self._logits(states[:, soft.shape[1] - 1:-1][present])
        return text_losses(logits, text_ids[present], present.nonzero()[:, 0], len(text_ids))

    def reconstruction_loss(self, u: Tensor, text_ids: Tensor, text_lengths: Tensor, num_texts: float) -> Tensor:
        """L_rec: (S, d_e) embeddings, (S, Y) texts, (S,) lengths -> (): the texts given the embeddings alone.

        The sum over the texts is divided by ``num_texts``.
        """
        soft = self.decode_projection(u)

        def loss_of(soft: Tensor) -> Tensor:
            return self.reconstruction_losses(soft, text_ids, text_lengths).sum() / num_texts

        if self.config.tuning == "full":  # the decoder is trained too: the plain path
            return loss_of(soft)
        with adapters_off(self.backbone):
            return frozen_decoder_loss(soft, loss_of)

    # ---- saving --------------------------------------------------------------------------------------------------

    def trained_names(self) -> set[str]:
        """Names of what `model.safetensors` holds: all trained weights and small buffers, no frozen language model."""
        frozen = {f"backbone.{name}" for name, p in self.backbone.named_parameters() if not p.requires_grad}
        return {name for name in self.state_dict() if name not in frozen
                and (not name.startswith("backbone.") or "lora_" in name or self.config.tuning == "full")}

    def save_weights(self, folder) -> None:
        """Writes ``model.safetensors``, the weights alone."""
        folder.mkdir(parents=True, exist_ok=True)
        names = self.trained_names()
        save_tensors({k: v for k, v in self.state_dict().items() if k in names}, folder / "model.safetensors")

    def save_pretrained(self, folder, facts: dict | None = None) -> None:
        """Writes config, weights, items with their features, and a model card that tells ``facts``.

        facts: for example {"data": ..., "protocol": ..., "rows": {"karma": {"HR@10": ...}}}.
        """
        save_model(self, Path(folder), facts)

    @classmethod
    def from_pretrained(cls, folder, device: torch.device | str | None = None) -> KarmaModel:
        """The model that `save_pretrained` wrote; the backbone is loaded from where the config names it."""
        config, items, features, weights = load_parts(folder)
        backbone, tokenizer = load_backbone(config, device)
        model = cls(config, backbone, tokenizer, items, ItemFeatures.from_tensors(features))
        wanted = model.trained_names()
        if set(weights) != wanted:
            raise ConfigError(f"{folder}: its weights do not fit its config: missing "
                              f"{sorted(wanted - set(weights))[:5]}, unknown {sorted(set(weights) - wanted)[:5]}")
        model.load_state_dict(weights, strict=False)
        return model.eval()

    # ---- using ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_items(self, items: np.ndarray | None = None, batch_size: int = 65_536) -> Tensor:
        """(n, d_e) float32 on the CPU: e of the given catalogue indices, or of all."""
        items = np.arange(len(self.items)) if items is None else np.asarray(items, dtype=np.int64)
        parts = [self.item_embeddings(torch.from_numpy(items[at:at + batch_size]).to(self.device)).cpu()
                 for at in range(0, len(items), batch_size)]
        return torch.cat(parts) if parts else torch.zeros(0, self.config.embedding_dim)

    @torch.no_grad()
    def encode_users(self, histories: Sequence[np.ndarray], queries: Sequence[str] | None = None, *,
                     batch_tokens: int = 4096, progress: bool = False) -> Tensor:
        """(U, d_e) float32 on the CPU: u of each request.

        Args:
            histories: U arrays of catalogue indices, oldest first; the last ``config.max_history`` count. One may be
                empty.
            queries: U texts, "" for none.
        """
        from tqdm.auto import tqdm

        queries = [""] * len(histories) if queries is None else queries
        histories = [np.asarray(h, dtype=np.int64)[-self.config.max_history:] for h in histories]
        order = np.argsort([len(h) + len(q) for h, q in zip(histories, queries, strict=True)], kind="stable")
        width = self.config.max_history + len(self.prompts.instruction) + 1
        out = torch.zeros(len(histories), self.config.embedding_dim)
        training = self.training
        self.eval()
        with tqdm(total=len(order), desc="encoding users", unit="user", disable=not progress) as bar:
            for at in range(0, len(order), max(1, batch_tokens // width)):
                part = order[at:at + max(1, batch_tokens // width)]
                fields = self.prompts.build([histories[i] for i in part], [queries[i] for i in part])
                hidden = self._prompt_states(fields)
                emb = hidden[torch.arange(len(part)), fields["emb_columns"]]
                out[torch.from_numpy(part)] = self.interest(emb).cpu()
                bar.update(len(part))
        self.train(training)
        return out

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
        soft = self.decode_projection(u.to(self.device)).to(model.dtype)
        with adapters_off(self.backbone), self._autocast():
            # a config of our own, as a model's may ask for sampling or penalties
            greedy = GenerationConfig(max_new_tokens=max_new_tokens or self.config.max_text_tokens, do_sample=False,
                                      use_cache=True, eos_token_id=self.tokenizer.eos_token_id,
                                      pad_token_id=self.tokenizer.eos_token_id)
            mask = torch.ones(soft.shape[:2], dtype=torch.int64, device=self.device)
            ids = model.generate(inputs_embeds=soft, attention_mask=mask, generation_config=greedy)
        self.train(training)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
