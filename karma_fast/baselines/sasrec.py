"""SASRec: self-attention over a user's items, trained with the softmax over the whole catalogue."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ConfigError, Section, require
from ..losses.info_nce import InfoNCELoss

HISTORIES_AT_ONCE = 2048


@dataclass
class SASRecConfig(Section):
    """Architecture and training. docs/baselines.md says which defaults were compared with others, and on what."""

    section = "sasrec"

    dim: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    max_history: int = 50
    scoring: Literal["cosine", "dot"] = "cosine"  # cosine: unit vectors and a learnable scale
    init_scale: float = 1 / 0.07  # of the cosine
    batch_windows: int = 128  # sequences a step; every event but the first of each is a target
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    epochs: int = 100  # at most
    patience: int = 5  # epochs without a better validation NDCG@10 before training stops

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "max_history", "batch_windows", "epochs", "patience"):
            require(getattr(self, name) >= 1, f"sasrec.{name}: got {getattr(self, name)}; at least 1 is needed")
        require(self.dim % self.heads == 0, f"sasrec.heads: got {self.heads}; a divisor of dim ({self.dim}) is needed")
        require(0 <= self.dropout < 1, f"sasrec.dropout: got {self.dropout}; from 0 to below 1 is needed")
        require(0 < self.init_scale <= 100, f"sasrec.init_scale: got {self.init_scale}; above 0, up to 100 is needed")
        require(self.learning_rate > 0, f"sasrec.learning_rate: got {self.learning_rate}; above 0 is needed")
        require(self.weight_decay >= 0, f"sasrec.weight_decay: got {self.weight_decay}; 0 or more is needed")


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a layer norm and added to its input."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        d = config.dim
        self.heads, self.dropout = config.heads, config.dropout
        self.norm_attention, self.norm_feed = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (T, d), places (T,) of the tokens in a (sequences, length) grid -> (T, d)."""
        dropout = self.dropout if self.training else 0.0
        q, k, v = self.on_grid(self.qkv(self.norm_attention(x)), places, grid)
        # padding stands right of all tokens of its row, so the causal mask hides it from them
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        mixed = mixed.transpose(1, 2).flatten(0, 1).flatten(1)[places]
        x = x + F.dropout(self.out(mixed), dropout)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_feed(x)))), dropout)

    def on_grid(self, qkv: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
        """(T, 3 d) -> (3, sequences, heads, length, d / heads), 0 where there is no token."""
        padded = qkv.new_zeros(grid[0] * grid[1], qkv.shape[1]).index_copy(0, places, qkv)
        return padded.view(*grid, 3, self.heads, -1).permute(2, 0, 3, 1, 4)


class SASRec(nn.Module):
    r"""Next-item recommendation from the ids of a user's items alone.

    .. math:: x_t = E_{i_t} \sqrt{d} + p_t, \qquad h = \mathrm{blocks}(x), \qquad
              z_{tj} = s \, \langle h_t, E_j \rangle, \qquad \ell_t = -\log \mathrm{softmax}(z_t)_{i_{t+1}}

    The item table E is both input and output. With ``scoring="cosine"`` h and E are divided by their lengths there and
    s is learned; with "dot" s = 1. The softmax runs over the whole catalogue at every position, by
    :func:`karma_kernels.info_nce`: neither negatives are sampled nor is a score matrix kept.

    Source: Kang and McAuley 2018, https://arxiv.org/abs/1808.09781, which trains with one sampled negative a position;
    the full softmax is much stronger (Klenitskiy and Vasilev 2023, arXiv 2309.07602).

    Args:
        num_items: N, size of the catalogue. config: see :class:`SASRecConfig`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = SASRec(10, SASRecConfig(dim=8))
        >>> model.user_vectors([[3, 1], []]).shape, model.item_vectors().shape
        (torch.Size([2, 8]), torch.Size([10, 8]))
    """

    def __init__(self, num_items: int, config: SASRecConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SASRecConfig()
        cosine = config.scoring == "cosine"
        self.items = nn.Embedding(num_items, config.dim)
        self.places = nn.Embedding(config.max_history, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.loss_fn = InfoNCELoss(config.init_scale if cosine else 1.0, learnable=cosine, normalize=cosine)
        self.facts: dict[str, Any] = {}  # about the training, saved with the model
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=0.02)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """States behind each item: (T, d), a state sees its item and those before it in the same sequence.

        Args:
            items: (T,) int64, the sequences one after the other, without padding.
            lengths: (B,) int64, items of each, 1 to ``max_history``.
        """
        rows, length = len(lengths), int(lengths.max())
        starts = lengths.cumsum(0) - lengths
        row = torch.repeat_interleave(torch.arange(rows, device=items.device), lengths)
        place = torch.arange(len(items), device=items.device) - starts[row]
        dropout = self.config.dropout if self.training else 0.0
        x = F.dropout(self.items(items) * math.sqrt(self.config.dim) + self.places(place), dropout)
        for block in self.blocks:
            x = block(x, row * length + place, (rows, length))
        return self.norm(x)

    def loss(self, items: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        """Mean over all positions of the cross-entropy of ``targets`` (T,) among all N items."""
        return self.loss_fn(self(items, lengths), self.items.weight, targets)

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """(N, d) float32 on the CPU, also for items without a training event; scores are inner products with them."""
        return self._scored(self.items.weight).float().cpu()

    @torch.no_grad()
    def user_vectors(self, histories: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """(U, d) float32 on the CPU: the state behind the last item.

        Args:
            histories: U lists of places in the catalogue, oldest first; the last ``max_history`` of each are read. An
                empty one has the zero vector, for which all items tie.

        Raises:
            ValueError: an item outside the catalogue.
        """
        device, training = self.items.weight.device, self.training
        vectors = torch.zeros(len(histories), self.config.dim)
        cut = [np.asarray(h, dtype=np.int64)[-self.config.max_history:] for h in histories]
        # of like lengths together, as attention pads to the longest
        filled = sorted((n for n, history in enumerate(cut) if len(history)), key=lambda n: len(cut[n]))
        self.eval()
        for start in range(0, len(filled), HISTORIES_AT_ONCE):
            part = filled[start:start + HISTORIES_AT_ONCE]
            items = np.concatenate([cut[place] for place in part])
            if items.min() < 0 or items.max() >= self.items.num_embeddings:
                raise ValueError(f"histories: got items {items.min()} to {items.max()}; the catalogue has 0 to "
                                 f"{self.items.num_embeddings - 1}")
            lengths = torch.tensor([len(cut[place]) for place in part], device=device)
            states = self(torch.from_numpy(items).to(device), lengths)
            vectors[part] = self._scored(states[lengths.cumsum(0) - 1]).float().cpu()
        self.train(training)
        return vectors

    def _scored(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.config.scoring == "cosine" else vectors

    def save(self, folder: str | Path) -> None:
        """Writes sasrec.safetensors and, last, sasrec.json; needs safetensors."""
        from ..model.storage import save_tensors, write_atomically

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.state_dict(), folder / "sasrec.safetensors")
        values = {"num_items": self.items.num_embeddings, "config": self.config.to_dict(), "facts": self.facts}
        write_atomically(folder / "sasrec.json", json.dumps(values, indent=1) + "\n")

    @staticmethod
    def load(folder: str | Path) -> SASRec:
        """What :meth:`save` wrote, ready to use; ConfigError if the folder does not hold it."""
        from safetensors.torch import load_file

        try:
            values = json.loads((Path(folder) / "sasrec.json").read_text(encoding="utf-8"))
            model = SASRec(values["num_items"], SASRecConfig.from_dict(values["config"]))
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            raise ConfigError(f"{folder}: holds no saved SASRec (sasrec.json is missing or incomplete); give a folder "
                              "that SASRec.save wrote") from None
        model.load_state_dict(load_file(Path(folder) / "sasrec.safetensors"))
        model.facts = values.get("facts", {})
        return model.eval()
