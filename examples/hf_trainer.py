"""Two towers in the Trainer of transformers: forward returns {"loss": ...}, a callback keeps the scale in bounds."""
import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from karma_fast import InfoNCELoss

torch.manual_seed(0)  # the same data in every process
ITEMS, TRAIN, kind = 2000, 20_000, torch.randint(40, (21_000, 1))  # item i is of kind i % 40; a user likes one kind
items = torch.multinomial((torch.arange(ITEMS) % 40 == kind) / torch.arange(1, ITEMS + 1), 1)[:, 0]  # 0 is popular
users = 2 * torch.randn(40, 16)[kind[:, 0]] + torch.randn(len(kind), 16)
clicks = [{"user": user, "item": item} for user, item in zip(users[:TRAIN], items[:TRAIN], strict=True)]

class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32)), nn.Embedding(ITEMS, 32)
        self.loss = InfoNCELoss(scale=10.0, gather=True)  # several processes share their negatives
        self.register_buffer("log_q", (torch.bincount(items[:TRAIN], minlength=ITEMS) / TRAIN).log())

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.loss(self.user(user), self.item(item), key_ids=item, log_q=self.log_q[item])}

    def hit_rate(self) -> float:
        scores = self.user(users[TRAIN:].to(self.log_q.device)) @ nn.functional.normalize(self.item.weight).T
        return (scores.topk(10).indices.cpu() == items[TRAIN:, None]).any(1).float().mean().item()

class Clamp(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.loss.clamp_()

args = TrainingArguments(tempfile.mkdtemp(), per_device_train_batch_size=500, num_train_epochs=5, learning_rate=0.01,
                         save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False)
trainer = Trainer(TwoTowers(), args, train_dataset=clicks, callbacks=[Clamp()])
before = trainer.model.hit_rate()
trainer.train()
print(f"hit rate@10 on 1000 held-out users: {before:.3f} before, {trainer.model.hit_rate():.3f} after")
