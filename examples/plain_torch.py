"""Two towers in plain PyTorch: users and items meet in one space, the other items of the batch are the negatives."""

import torch
from torch import nn

from karma_fast import InfoNCELoss

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
ITEMS, KINDS = 2000, 40  # item i is of kind i % 40, and the low numbers of each kind are the popular ones
popularity, looks = 1 / torch.arange(1, ITEMS + 1), 2 * torch.randn(KINDS, 16)


def clicks(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Users, who like one kind each, and the item each of them clicked: often the same popular ones."""
    kind = torch.randint(KINDS, (count, 1))
    items = torch.multinomial(popularity * (torch.arange(ITEMS) % KINDS == kind), 1).squeeze(1)
    return (looks[kind.squeeze(1)] + torch.randn(count, 16)).to(device), items.to(device)


def hit_rate() -> float:
    best = (user_tower(test_users) @ nn.functional.normalize(item_tower.weight).T).topk(10).indices
    return (best == test_items[:, None]).any(1).float().mean().item()


(users, items), (test_users, test_items) = clicks(20_000), clicks(1000)
log_q = (torch.bincount(items, minlength=ITEMS) / len(items)).log()  # how likely an item is to be in a batch
user_tower = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32)).to(device)
item_tower, loss_fn = nn.Embedding(ITEMS, 32).to(device), InfoNCELoss(scale=10.0).to(device)
optimizer = torch.optim.AdamW([*user_tower.parameters(), *item_tower.parameters(), *loss_fn.parameters()], lr=0.01)
before = hit_rate()
for _ in range(5):
    for rows in torch.randperm(len(items), device=device).split(500):
        picked = items[rows]  # as ids, they keep a second click on the same item from being a negative
        loss_fn(user_tower(users[rows]), item_tower(picked), key_ids=picked, log_q=log_q[picked]).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_fn.clamp_()
print(f"hit rate@10 on {len(test_items)} held-out users: {before:.3f} before, {hit_rate():.3f} after")
