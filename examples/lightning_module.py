"""Two towers as a LightningModule: the scale is brought back into its bounds after each batch."""
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from karma_fast import InfoNCELoss

L.seed_everything(0, verbose=False)  # the same data in every process
ITEMS, TRAIN, kind = 2000, 20_000, torch.randint(40, (21_000, 1))  # item i is of kind i % 40; a user likes one kind
items = torch.multinomial((torch.arange(ITEMS) % 40 == kind) / torch.arange(1, ITEMS + 1), 1)[:, 0]  # 0 is popular
users = 2 * torch.randn(40, 16)[kind[:, 0]] + torch.randn(len(kind), 16)

class TwoTowers(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32)), nn.Embedding(ITEMS, 32)
        self.loss = InfoNCELoss(scale=10.0, gather=True)  # several processes share their negatives
        self.register_buffer("log_q", (torch.bincount(items[:TRAIN], minlength=ITEMS) / TRAIN).log())

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        user, item = batch
        return self.loss(self.user(user), self.item(item), key_ids=item, log_q=self.log_q[item])

    def on_train_batch_end(self, *args) -> None:
        self.loss.clamp_()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def hit_rate(self) -> float:
        scores = self.user(users[TRAIN:].to(self.device)) @ nn.functional.normalize(self.item.weight).T
        return (scores.topk(10).indices.cpu() == items[TRAIN:, None]).any(1).float().mean().item()

model, clicks = TwoTowers(), DataLoader(TensorDataset(users[:TRAIN], items[:TRAIN]), batch_size=500, shuffle=True)
before = model.hit_rate()
trainer = L.Trainer(max_epochs=5, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(model, clicks)
print(f"hit rate@10 on 1000 held-out users: {before:.3f} before, {model.hit_rate():.3f} after")
