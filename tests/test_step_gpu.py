"""The step on a GPU: no wait for the card, the memory of one chunk, the gradients of the whole batch."""

import dataclasses

import pytest
import torch
from test_model import wake, with_images

from karma_fast.data import training_windows
from karma_fast.data.batches import log_sampling_probability
from karma_fast.model.karma import KarmaModel
from karma_fast.step import backward

pytestmark = pytest.mark.gpu


def build(config, data, cache, **changes) -> KarmaModel:
    model = KarmaModel.build(dataclasses.replace(config, **changes), with_images(data.items), data.sequences,
                             data.split, cache=cache, device="cuda")
    wake(model)
    return model.train()


def batch_of(model, data, chunk_size=None):
    starts, ends = training_windows(data.sequences, data.split, model.config.max_history, model.config.positions)
    collate = model.collator(data.sequences, log_sampling_probability(data.sequences, data.split, len(data.items)),
                             chunk_size=chunk_size)
    return collate(list(zip(starts.tolist(), ends.tolist(), strict=True))).pin_memory().to("cuda")


@pytest.mark.parametrize("quantization", ["none", "4bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_never_waits_for_the_card(tiny_config, tiny_data, tmp_path, quantization, checkpointing):
    if quantization == "4bit":
        pytest.importorskip("bitsandbytes")
    model = build(tiny_config.model, tiny_data, tmp_path, quantization=quantization,
                  gradient_checkpointing=checkpointing)
    batch = batch_of(model, tiny_data, 4)
    backward(model, batch)  # compiles, and asks the card what it is
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_chunks_give_the_gradient_of_the_whole(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config.model, tiny_data, tmp_path, decode_weight=1.0)

    def gradients(chunk_size):
        backward(model, batch_of(model, tiny_data, chunk_size))
        found = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    whole, chunks = gradients(None), gradients(4)
    assert set(whole) == set(chunks)
    for name, grad in whole.items():  # bfloat16
        assert (chunks[name] - grad).norm() <= 0.05 * grad.norm() + 1e-6, name


def test_memory_is_that_of_a_chunk(tiny_config, tiny_data, tmp_path):
    model = build(tiny_config.model, tiny_data, tmp_path)
    peaks = []
    for chunk_size in (None, 2):
        batch = batch_of(model, tiny_data, chunk_size)
        backward(model, batch)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        backward(model, batch)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.5 * peaks[0]
