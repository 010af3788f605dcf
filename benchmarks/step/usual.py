"""One KARMA training step as one writes it without this project: transformers, PEFT, bitsandbytes, plain PyTorch.

It computes the same loss from the same windows as `KarmaModel`, and is kept as good as these tools make it without
special work: a 4-bit NF4 model, LoRA, scaled-dot-product attention, bfloat16 autocast, fused AdamW, padding to the
longest row of the batch, no module run for a term that is switched off. What it does the plain way:

- a prompt is put together row by row with ``torch.cat``, and rows are padded;
- the language model gives the logits of every position of every row, of which the text losses read a few;
- the contrastive loss has its whole score matrix;
- the decoder of L_rec is the same model with its adapters disabled, whose graph is kept until the backward.

Its negatives are the other rows of a batch. Gradient accumulation adds none: it sums losses of small batches, each
with its own few negatives. To see 4096, the step holds the activations of all their windows at once. The way around
it, embeddings' gradients cached in a first pass (GradCache, in sentence-transformers), is not what Trainer offers for
a loss of several terms, and not the usual way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from karma_fast.config import KarmaConfig
from karma_fast.data.batches import LATEST

NO_TEXT = -100  # label of a position that predicts no token of a text; cross_entropy leaves it out


def load_language_model(config: KarmaConfig, device: torch.device | str, dtype: torch.dtype, folder: str,
                        attention: str = "sdpa") -> nn.Module:
    """The 4-bit (or, without quantisation, ``dtype``) model of a folder or hub id, with LoRA.

    Frozen weights stay in ``dtype``: `peft.prepare_model_for_kbit_training` would turn embeddings, head and norms to
    float32, for which a step with autocast has no use and which takes more memory.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict = {"dtype": dtype, "attn_implementation": attention}
    if config.quantization == "4bit":
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=torch.device(device).type == "cuda")
    model = AutoModelForCausalLM.from_pretrained(folder, **options).to(device)
    model.requires_grad_(False)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = config.lora_targets
    targets = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    return get_peft_model(model, LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, task_type="CAUSAL_LM",
                                            lora_dropout=config.lora_dropout, target_modules=targets))


class Collator:
    """Windows (start, end) of events -> the arguments of `UsualModel.forward`; lists hold a tensor for each window.

    ``ours`` is the `KarmaCollator` of the same data. It says what a window's random draws are, so that both sides look
    at the same texts.
    """

    def __init__(self, ours) -> None:
        self.ours, self.config, self.prompts, self.sequences = ours, ours.config, ours.prompts, ours.sequences

    def __call__(self, windows: Iterable[tuple[int, int]]) -> dict:
        events, queries, texts = self.sequences.items, self.sequences.queries, self.prompts.texts
        batch, targets, window_of, decoded, windows = defaultdict(list), [], [], 0, list(windows)
        for window, (start, end) in enumerate(windows):
            query = "" if queries is None or queries[end - 1] < 0 else self.sequences.query_texts[queries[end - 1]]
            first = start + 1 if self.config.positions == "all" else end - 1  # target of the first pair
            looked_at = self.ours._random(start, end).random() < self.config.decode_share
            batch["heads"].append(torch.tensor(self.prompts.instruction + self.prompts.query_ids(query)))
            batch["histories"].append(torch.from_numpy(events[start:end - 1].astype(np.int64)))
            wanted = looked_at and self.config.weight("gen") > 0
            batch["texts"].append(torch.tensor(texts[events[end - 1]] if wanted else [], dtype=torch.int64))
            if looked_at and self.config.weight("rec") + self.config.weight("vis") > 0:
                for pair in [*self.further_pairs(start, end, end - 1 - first), end - 1 - first]:
                    batch["decode_pairs"].append(len(targets) + pair)
                    batch["decode_texts"].append(torch.tensor(texts[events[first + pair]]))
            targets += range(first, end)
            window_of += [window] * (end - first)
            decoded += min(self.config.decode_positions, end - first)
        positives = torch.from_numpy(events[targets].astype(np.int64))
        users = self.sequences.user_of(targets).tolist()
        taken = set(zip(window_of, positives.tolist(), strict=True))
        hard = [(item, user if (window, item) in taken else -1) for user, window, items in
                zip(users, window_of, self.hard_negatives(targets), strict=True) for item in items]
        keys = torch.cat([positives, torch.tensor([item for item, _ in hard], dtype=torch.int64)])
        log_q = None if self.ours.log_q is None else torch.from_numpy(self.ours.log_q)[keys]
        return {**{name: batch[name] for name in ("heads", "histories", "texts", "decode_texts")},
                "decode_pairs": torch.tensor(batch["decode_pairs"], dtype=torch.int64), "keys": keys,
                "users": torch.tensor(users + [user for _, user in hard]), "pairs": len(targets), "log_q": log_q,
                "num_texts": len(windows) * self.config.decode_share,
                "num_decoded": decoded * self.config.decode_share}

    def further_pairs(self, start: int, end: int, inner: int) -> list[int]:
        extra = min(self.config.decode_positions - 1, inner)
        drawn = self.ours._random(start, end, 1).choice(inner, extra, replace=False) if extra > 0 else []
        return np.sort(drawn).tolist()

    def hard_negatives(self, targets: Sequence[int]) -> list[list[int]]:
        indptr, negatives = self.sequences.negatives_indptr, self.sequences.negatives
        if indptr is None:
            return [[] for _ in targets]
        return [negatives[indptr[t]:indptr[t + 1]][-self.ours.max_hard_negatives:].tolist() for t in targets]


class ItemProjection(nn.Module):
    """(R, in_features) -> (R, num_tokens, hidden) soft tokens of one length."""

    def __init__(self, in_features: int, mid_features: int, hidden: int, num_tokens: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(in_features, eps=1e-6)
        self.up = nn.Linear(in_features, mid_features)
        self.down = nn.Linear(mid_features, num_tokens * hidden, bias=False)
        self.register_buffer("token_norm", torch.tensor(1.0))
        self.num_tokens = num_tokens

    def forward(self, vectors: Tensor) -> Tensor:
        tokens = self.down(F.gelu(self.up(self.norm(vectors)))).unflatten(-1, (self.num_tokens, -1))
        return F.normalize(tokens.float(), dim=-1) * self.token_norm


class UsualModel(nn.Module):
    """The language model with its projections; its forward gives ``{"loss": ...}`` as transformers' Trainer wants it.

    Args:
        language_model: from `load_language_model`.
        features: module, (n,) catalogue indices -> (n, width) float32.
        dtype: of autocast; float32 switches it off.
    """

    def __init__(self, config: KarmaConfig, language_model: nn.Module, features: nn.Module, dtype: torch.dtype):
        super().__init__()
        if config.symmetric:
            raise ValueError("model.symmetric: got true; the usual step has the direction from users to items only")
        hidden, width = language_model.config.get_text_config().hidden_size, features.width
        self.config, self.backbone, self.features, self.dtype = config, language_model, features, dtype
        self.history_projection = ItemProjection(width, config.mid_features or width, hidden, 1)
        self.item_projection = nn.Linear(width, config.embedding_dim, bias=False)
        self.interest_projection = nn.Linear(hidden, config.embedding_dim, bias=False)
        self.emb_token = nn.Parameter(torch.zeros(hidden))
        self.log_scale = nn.Parameter(torch.zeros(()))
        if config.history_shortcut:
            self.shortcut = nn.Module()
            self.shortcut.projection = nn.Linear(width, config.embedding_dim, bias=False)
            self.shortcut.gain = nn.Parameter(torch.zeros(()))
            self.shortcut.age_logits = nn.Parameter(torch.zeros(LATEST))
        if config.weight("rec") > 0:
            self.decode_projection = ItemProjection(config.embedding_dim, config.mid_features or config.embedding_dim,
                                                    hidden, config.num_soft_tokens)
        self.image_head = None
        if config.weight("vis") > 0 and "image" in features.kinds:
            self.image_head = nn.Sequential(nn.Linear(config.embedding_dim, config.embedding_dim), nn.GELU(),
                                            nn.Linear(config.embedding_dim, features.widths["image"]))
        self.to(language_model.device)

    def forward(self, heads: list[Tensor], histories: list[Tensor], texts: list[Tensor], keys: Tensor, users: Tensor,
                pairs: int, log_q: Tensor | None, decode_texts: list[Tensor], decode_pairs: Tensor, num_texts: float,
                num_decoded: float) -> dict[str, Tensor]:
        config = self.config
        rows, labels = self.prompts(heads, histories, texts)
        states, logits = self.read(rows, wants_logits=config.weight("gen") > 0)
        queries = []
        for state, head, history in zip(states, heads, histories, strict=True):
            emb = len(head) + len(history)
            if config.positions == "all":  # every item but the last is a query too
                queries.append(state[len(head):emb - 1])
            queries.append(state[emb:emb + 1])
        u = self.interest_projection(F.normalize(torch.cat(queries).float(), dim=-1))
        if config.history_shortcut:
            u = u + self.shortcut.gain * torch.cat([self.latest_mean(history) for history in histories])
        u = F.normalize(u, dim=-1)
        parts = {}
        if config.weight("act") > 0:
            parts["act"] = self.contrastive(u, keys, users, pairs, log_q)
        if config.weight("gen") > 0:
            parts["gen"] = text_losses(logits, labels).sum() / num_texts
        if config.weight("rec") > 0 and len(decode_texts):
            parts["rec"] = self.reconstruction(u[decode_pairs], decode_texts).sum() / num_decoded
        if config.weight("vis") > 0 and self.image_head is not None and len(decode_pairs):
            targets = keys[decode_pairs]
            distance = (self.image_head(u[decode_pairs]) - self.features.image[targets]).square().sum(dim=-1)
            parts["vis"] = (distance * self.features.image_present[targets]).sum() / num_decoded
        return {"loss": sum(config.weight(name) * value for name, value in parts.items()), **parts}

    def latest_mean(self, history: Tensor) -> Tensor:
        """(H,) items -> a mean of the latest items for each query of the window."""
        if not len(history):
            return self.shortcut.gain.new_zeros(1, self.config.embedding_dim)
        e = F.normalize(self.shortcut.projection(self.features(history)), dim=-1)
        age = torch.arange(len(e), device=e.device)[:, None] - torch.arange(len(e), device=e.device)
        weights = torch.where((age >= 0) & (age < LATEST), self.shortcut.age_logits.exp()[age.clamp(0, LATEST - 1)], 0)
        means = (weights / weights.sum(dim=1, keepdim=True)) @ e
        return means if self.config.positions == "all" else means[-1:]

    def prompts(self, heads: list[Tensor], histories: list[Tensor], texts: list[Tensor]
                ) -> tuple[list[Tensor], list[Tensor]]:
        """Input embeddings and labels of each row: [instruction] [query] [item] ... [item] [EMB] [text]."""
        embed = self.backbone.get_input_embeddings()
        with self.autocast():
            items = self.history_projection(self.features(torch.cat(histories))).flatten(0, 1).to(embed.weight.dtype)
        emb, rows, labels = self.emb_token[None].to(embed.weight.dtype), [], []
        for head, item, text in zip(heads, items.split([len(h) for h in histories]), texts, strict=True):
            rows.append(torch.cat([embed(head), item, emb, embed(text)]))
            labels.append(F.pad(text, (len(head) + len(item) + 1, 0), value=NO_TEXT))
        return rows, labels

    def read(self, rows: list[Tensor], wants_logits: bool = True) -> tuple[Tensor, Tensor | None]:
        """Rows (T_i, hidden) -> last states (B, T, hidden) and logits (B, T, vocabulary), T the longest row's."""
        embeds = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
        mask = (torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]).long()
        with self.autocast():
            if not wants_logits:
                base = self.backbone.get_base_model().base_model
                return base(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state, None
            out = self.backbone(inputs_embeds=embeds, attention_mask=mask, use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1], out.logits

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.emb_token.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def contrastive(self, u: Tensor, keys: Tensor, users: Tensor, pairs: int, log_q: Tensor | None) -> Tensor:
        """(P, d_e) embeddings against (N,) keys, the first P of them targets, and (N,) users; pairs: P."""
        e = F.normalize(self.item_projection(self.features(keys)), dim=-1)
        scores = self.log_scale.exp() * u @ e.T
        if log_q is not None:
            scores = scores - log_q
        labels = torch.arange(pairs, device=u.device)
        same = (keys[:pairs, None] == keys) | (users[:pairs, None] == users)
        same[labels, labels] = False
        return F.cross_entropy(scores.masked_fill(same, -torch.inf), labels)

    def reconstruction(self, u: Tensor, texts: list[Tensor]) -> Tensor:
        """(S, d_e) embeddings and their S texts -> (S,) losses of each text given the embedding, adapters disabled.

        Not checkpointed: the backward would compute its layers anew with the adapters on, which is another function.
        """
        embed, model = self.backbone.get_input_embeddings(), self.backbone.get_base_model()
        with self.autocast():
            soft = self.decode_projection(u)
        rows = [torch.cat([s.to(embed.weight.dtype), embed(text)]) for s, text in zip(soft, texts, strict=True)]
        labels = [F.pad(text, (self.config.num_soft_tokens, 0), value=NO_TEXT) for text in texts]
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        try:
            with self.backbone.disable_adapter():
                return text_losses(self.read(rows)[1], labels)
        finally:
            if self.config.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def text_losses(logits: Tensor, labels: list[Tensor]) -> Tensor:
    """(B, T, V) logits of every position and B rows of labels -> (B,) mean token loss of each text, 0 without."""
    labels = pad_sequence(labels, batch_first=True, padding_value=NO_TEXT)[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
    return losses.view(labels.shape).sum(dim=1) / (labels != NO_TEXT).sum(dim=1).clamp_min(1)


def make_trainer(model: UsualModel, windows: Sequence[tuple[int, int]], collate: Callable, folder: str, **settings):
    """transformers' Trainer over the windows, all of them in one batch unless ``settings`` say otherwise."""
    from transformers import Trainer, TrainingArguments

    args = {"per_device_train_batch_size": len(windows), "optim": "adamw_torch_fused", "learning_rate": 3e-4,
            "max_grad_norm": 1.0, "report_to": "none", "save_strategy": "no", "remove_unused_columns": False,
            "disable_tqdm": True} | settings
    return Trainer(model, TrainingArguments(folder, **args), train_dataset=windows, data_collator=collate)
