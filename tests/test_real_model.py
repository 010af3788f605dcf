"""The real small LLM, once: fetched, converted, loaded in 4 bits, trained for two steps, decoded."""

import dataclasses

import bitsandbytes
import numpy as np
import pytest
import torch

from karma_fast.config import KarmaConfig
from karma_fast.data import training_windows
from karma_fast.data.batches import log_sampling_probability
from karma_fast.model.backbone import causal_lm, resolve_backbone
from karma_fast.model.karma import KarmaModel

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def model(tiny_data, tmp_path_factory):
    config = KarmaConfig(lora_rank=4, lora_targets="q_proj,v_proj", embedding_dim=32, max_history=6, id_dim=8,
                         max_text_tokens=12)
    assert config.quantization == "4bit" and config.backbone == "smollm2-135m-instruct"
    return KarmaModel.build(config, tiny_data.items, tiny_data.sequences, tiny_data.split,
                            cache=tmp_path_factory.mktemp("cache"), device="cpu")


def test_it_is_4_bit_and_still_knows_language(model):
    lm = causal_lm(model.backbone)
    four_bit = [m for m in lm.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(four_bit) == 210  # 30 layers of 7 products
    ids = model.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        # the adapters start at zero, so the tuned model still is the original one
        assert model.tokenizer.decode(lm(input_ids=ids).logits[0, -1].argmax()).strip() == "Paris"


def test_item_texts_of_one_kind_lie_together(model):
    text = torch.nn.functional.normalize(model.features.text, dim=-1)
    kind = np.array([t.split(" | ")[1] for t in model.items.texts])
    same = torch.from_numpy(kind[:, None] == kind[None])
    cosines = text @ text.T
    off_diagonal = ~torch.eye(len(kind), dtype=torch.bool)
    assert cosines[same & off_diagonal].mean() > cosines[~same].mean() + 0.1


def test_two_steps_lower_the_loss_of_their_batch_and_u_decodes(model, tiny_data):
    starts, ends = training_windows(tiny_data.sequences, tiny_data.split, 6, "all")
    log_q = log_sampling_probability(tiny_data.sequences, tiny_data.split, len(tiny_data.items))
    batch = model.collator(tiny_data.sequences, log_q)([(int(starts[w]), int(ends[w])) for w in range(4)])
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    losses = []
    model.train()
    for _ in range(3):
        output = model(batch)
        losses.append(output.loss.item())
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
    assert losses[2] < losses[1] < losses[0]
    texts = model.decode(output.u[:2].detach(), max_new_tokens=4)
    assert len(texts) == 2 and all(isinstance(t, str) for t in texts)


def test_the_converted_folder_is_used_again(model, monkeypatch):
    monkeypatch.setattr("karma_fast.model.backbone.convert_gguf", lambda *a: pytest.fail("converted again"))
    assert resolve_backbone("smollm2-135m-instruct") == resolve_backbone("SmolLM2-135M-Instruct")


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["4bit", "none"])
def test_a_step_on_the_gpu_gives_the_loss_of_the_cpu(model, tiny_data, tmp_path, quantization):
    config = dataclasses.replace(model.config, quantization=quantization)
    starts, ends = training_windows(tiny_data.sequences, tiny_data.split, 6, "all")
    losses, weights = {}, None
    for device in ("cpu", "cuda"):
        m = KarmaModel.build(config, tiny_data.items, tiny_data.sequences, tiny_data.split, cache=tmp_path,
                             device=device)
        if weights is not None:  # one starting point, as each device fits its own by regression
            m.load_state_dict(weights, strict=False)
        weights = {n: v for n, v in m.state_dict().items() if n in m.trained_names()}
        batch = m.collator(tiny_data.sequences)([(int(starts[w]), int(ends[w])) for w in range(4)]).to(device)
        output = m.train()(batch)
        output.loss.backward()
        losses[device] = {n: v.item() for n, v in output.parts.present().items()}
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)
