"""A random language model, a small data set and a configuration, tiny enough for tests.

tiny_backbone: folder with a 2-layer Llama of width 64 and a byte-level tokenizer. tiny_dataset: `DataConfig` of CSV
files with 40 items of 4 kinds and 30 users who each like one kind; tiny_searches: the same with queries.
tiny_config: a `RunConfig` of backbone and tiny_dataset.
"""

import csv
import random

import pytest

from karma_fast.config import DataConfig, KarmaConfig, RunConfig

KINDS = {"space": ["Rocket", "Orbit", "Comet", "Moon", "Alien"], "kitchen": ["Pan", "Knife", "Oven", "Bowl", "Spoon"],
         "garden": ["Rose", "Spade", "Fern", "Hedge", "Seed"], "music": ["Drum", "Flute", "Choir", "Opera", "Violin"]}
COLOURS = ("Red", "Blue")


def tiny_items() -> list[tuple[str, str, str]]:
    """(id, title, kind) of the 40 items: i0 "Red Rocket" space, i1 "Red Orbit" space, ..."""
    rows = [(f"{colour} {noun}", kind) for kind, nouns in KINDS.items() for colour in COLOURS for noun in nouns]
    return [(f"i{n}", title, kind) for n, (title, kind) in enumerate(rows)]


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [" | ".join(row[1:]) for row in tiny_items()] + [KarmaConfig.instruction]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=0,
        pad_token_id=0, initializer_range=0.15)).save_pretrained(folder)  # strong enough for every layer to matter
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("tiny-data")
    rng, items = random.Random(0), tiny_items()
    with open(folder / "items.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("item_id", "title", "kind"), *items])
    with open(folder / "clicks.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("user_id", "item_id", "timestamp"))
        for user in range(30):
            liked = [n for n, item in enumerate(items) if item[2] == list(KINDS)[user % 4]]
            others = [n for n in range(len(items)) if n not in liked]
            chosen = rng.sample(liked, rng.randint(5, 8)) + rng.sample(others, 2)
            rng.shuffle(chosen)
            writer.writerows((f"u{user}", items[n][0], 1000 * user + at) for at, n in enumerate(chosen))
    return DataConfig(interactions=str(folder / "clicks.csv"), items=str(folder / "items.csv"), name="tiny")


@pytest.fixture(scope="session")
def tiny_searches(tiny_dataset, tmp_path_factory) -> DataConfig:
    """`tiny_dataset` in which every click but the first of a user was found by its item's title, in lower case."""
    titles = {item: title.lower() for item, title, _ in tiny_items()}
    folder = tmp_path_factory.mktemp("tiny-searches")
    with open(tiny_dataset.interactions, newline="", encoding="utf-8") as clicks:
        rows = list(csv.DictReader(clicks))
    with open(folder / "clicks.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "query"])
        writer.writeheader()
        writer.writerows(row | {"query": titles[row["item_id"]] if int(row["timestamp"]) % 1000 else ""}
                         for row in rows)
    return DataConfig(interactions=str(folder / "clicks.csv"), items=tiny_dataset.items, name="tiny searches")


@pytest.fixture(scope="session")
def tiny_data(tiny_dataset):
    """`tiny_dataset` read: a `Dataset`. Not to be changed by a test."""
    from karma_fast.data import load_dataset

    return load_dataset(tiny_dataset)


@pytest.fixture
def tiny_config(tiny_backbone, tiny_dataset, tmp_path) -> RunConfig:
    """Fresh for each test; writes to ``tmp_path / "run"``."""
    model = KarmaConfig(backbone=str(tiny_backbone), quantization="none", lora_rank=4, embedding_dim=16, max_history=6,
                        max_text_tokens=12, id_dim=8, num_soft_tokens=2)
    training = {"output_dir": str(tmp_path / "run"), "max_steps": 3, "per_device_train_batch_size": 4,
                "logging_steps": 1, "save_steps": 2, "warmup_steps": 1, "disable_tqdm": True}
    return RunConfig.from_dict({"data": tiny_dataset.to_dict(), "model": model.to_dict(), "training": training})
