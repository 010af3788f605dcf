"""Predicted memory: against measured steps, against the shapes of known models, and what is proposed from it."""

import dataclasses
import gc
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import held_bytes
from karma_fast.commands.plan import gpu_memory, main, step_settings
from karma_fast.config import ConfigError, KarmaConfig, RunConfig
from karma_fast.data import Dataset, Items, Sequences, Split, training_windows
from karma_fast.model.backbone import load_backbone
from karma_fast.model.features import ItemFeatures
from karma_fast.model.karma import KarmaModel
from karma_fast.planning import Planner, plan_memory, propose
from karma_fast.planning.opaque import info_nce_workspace
from karma_fast.planning.optimiser import state_bytes
from karma_fast.planning.propose import changes
from karma_fast.planning.simulated import Simulation
from karma_fast.planning.workload import Tokens, Workload
from karma_fast.run_setup import training_arguments
from karma_fast.step import backward

WEIGHTS = ("frozen weights", "trained weights", "item features")
STEP = ("gradients", "activations", "temporaries")
# changes of the settings, windows of a batch, windows at once
CASES = {
    "plain": ({}, 8, None),
    "chunks": ({}, 16, 4),
    "many-chunks": ({"max_history": 30}, 12, 2),
    "checkpointing": ({"gradient_checkpointing": True}, 16, 8),
    "4bit": ({"quantization": "4bit"}, 16, 4),
    "4bit-checkpointing": ({"quantization": "4bit", "gradient_checkpointing": True, "lora_rank": 32}, 8, 4),
    "rank": ({"lora_rank": 64}, 8, 4),
    "long": ({"max_history": 60}, 4, 2),
    "last": ({"positions": "last", "max_history": 40}, 8, 4),
    "query-words": ({"positions": "last", "text_vectors": "words", "word_dim": 200}, 8, 4),
    "no-texts": ({"decode_weight": 0.0}, 16, 4),
    "no-rec": ({"rec_weight": 0.0}, 8, None),
    "many-negatives": ({"max_history": 50, "decode_weight": 0.0}, 20, 2),
    "symmetric": ({"symmetric": True, "log_q": False}, 16, 4),
    "full": ({"tuning": "full"}, 8, 4),
}
FAST = ("checkpointing", "4bit", "last", "query-words", "many-negatives", "full")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, tiny_backbone):
    """Six layers, of which the simulation looks at three."""
    folder = tmp_path_factory.mktemp("six-layers")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=1024, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=512)).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(folder)
    return str(folder)


def settings(backbone, **changes) -> KarmaConfig:
    return KarmaConfig(**{"backbone": backbone, "quantization": "none", "id_dim": 32, "embedding_dim": 64} | changes)


@pytest.fixture(autouse=True)
def few_items(monkeypatch):
    monkeypatch.setattr("karma_fast.planning.workload.ASSUMED_ITEMS", 2000)


def real_model(planner: Planner, device: str) -> KarmaModel:
    """The planner's model with weights."""
    load, rng = planner.workload, np.random.default_rng(0)
    features = {kind: rng.standard_normal((load.items, width), dtype=np.float32)
                for kind, width in load.widths.items()}
    backbone, _ = load_backbone(planner.config, device)
    words = None
    if load.query_words:
        words = ["x"], rng.standard_normal((load.query_words, load.widths["words"]), np.float32)
    return KarmaModel(load.applied(planner.config), backbone, Tokens(), load.catalogue(planner.batch_size),
                      ItemFeatures(features, query_words=words)).train()


def bytes_of_weights(model: KarmaModel) -> int:
    """Also of the scales of 4-bit weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
            tensors += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def most_on_a_cpu(call) -> int:
    """Bytes that torch held at most during a call, by the allocations and releases that its profiler saw."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return max(held_bytes(profile))


@pytest.mark.parametrize("name", FAST)
def test_a_step_takes_what_was_predicted(backbone, name):
    changes, batch_size, chunk_size = CASES[name]
    planner = Planner(settings(backbone, **changes), batch_size=batch_size, device_type="cpu")
    plan = planner.plan(chunk_size)
    model = real_model(planner, "cpu")
    assert sum(plan.parts[part] for part in WEIGHTS) == bytes_of_weights(model)
    batch = planner.workload.batch(model, batch_size, chunk_size)
    measured = most_on_a_cpu(lambda: backward(model, batch))
    assert sum(plan.parts[part] for part in STEP) == pytest.approx(measured, rel=0.1)


# families whose layers differ, or whose attention is not torch's: changes of their configuration, adapters
FAMILIES = {
    "deepseek_v2": ({"num_hidden_layers": 5, "first_k_dense_replace": 1, "n_routed_experts": 16,
                     "moe_intermediate_size": 128, "kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16,
                     "qk_nope_head_dim": 32, "v_head_dim": 32, "num_experts_per_tok": 2, "n_shared_experts": 1,
                     "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}, "all-linear"),
    "granitemoehybrid": ({"num_hidden_layers": 5, "layer_types": [*4 * ["mamba"], "attention"], "mamba_n_heads": 8,
                          "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 64,
                          "mamba_d_head": 32, "mamba_d_state": 16}, "q_proj,v_proj"),
    "mamba": ({"num_hidden_layers": 4, "state_size": 8}, "in_proj"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_that_differ_are_all_counted(name, tiny_backbone, tmp_path):
    changes, targets = FAMILIES[name]
    shape = AutoConfig.for_model(name, **{
        "hidden_size": 128, "intermediate_size": 256, "vocab_size": 1024, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0} | changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).to(torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(tmp_path)
    config = settings(str(tmp_path), lora_targets=targets, max_history=10)
    planner = Planner(config, batch_size=8, device_type="cpu")
    plan, model = planner.plan(4), real_model(planner, "cpu")
    assert sum(plan.parts[part] for part in WEIGHTS) == bytes_of_weights(model)
    batch = planner.workload.batch(model, 8, 4)
    measured = most_on_a_cpu(lambda: backward(model, batch))
    assert sum(plan.parts[part] for part in STEP) == pytest.approx(measured, rel=0.1)


def test_adapters_of_a_layer_that_was_left_out(backbone):
    one, all_of_them = (Planner(settings(backbone, lora_targets=targets), batch_size=4, device_type="cpu").plan(2)
                        for targets in ("layers.5.self_attn.q_proj", "q_proj"))
    assert all_of_them.parts["trained weights"] - one.parts["trained weights"] == 5 * 4 * 16 * (192 + 192)
    with pytest.raises(ConfigError, match=r"model\.lora_targets.*'nothing'") as found:
        plan_memory(settings(backbone, lora_targets="nothing"), batch_size=4)
    assert found.type is ConfigError


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_what_was_predicted_on_a_gpu(backbone, name):
    changes, batch_size, chunk_size = CASES[name]
    planner = Planner(settings(backbone, **changes), batch_size=8 * batch_size, device_type="cuda",
                      capability=torch.cuda.get_device_capability())
    chunk_size = chunk_size and 8 * chunk_size
    plan = planner.plan(chunk_size)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = real_model(planner, "cuda")
    weights = torch.cuda.memory_allocated() - before
    assert sum(plan.parts[part] for part in WEIGHTS) == pytest.approx(weights, rel=0.02)
    batch = planner.workload.batch(model, planner.batch_size, chunk_size)
    backward(model, batch.to("cuda"))  # libraries take their workspaces at the first call
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    backward(model, batch.to("cuda"))
    measured = torch.cuda.max_memory_allocated() - before
    assert sum(plan.parts[part] for part in STEP) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("device", "changes"), [
    ("cuda", {}), ("cuda", {"gradient_checkpointing": True}), ("cpu", {"tuning": "full", "decode_weight": 0.0})],
    ids=["plain", "checkpointing", "full"])
def test_three_layers_stand_for_all(backbone, device, changes):
    config = settings(backbone, **changes)
    whole = Planner(config, batch_size=12, device_type=device, layers=6)
    short = Planner(config, batch_size=12, device_type=device, layers=3)
    assert short.extra_layers == 3 and whole.extra_layers == 0
    a, b = whole.plan(), short.plan()
    for part in (*WEIGHTS, "optimiser"):
        assert a.parts[part] == b.parts[part]
    assert sum(b.parts[part] for part in STEP) == pytest.approx(sum(a.parts[part] for part in STEP), rel=0.01)


@pytest.mark.parametrize(("name", "weights", "tied"), [
    ("smollm2-135m-instruct", 134_515_008, True), ("qwen2.5-0.5b", 494_032_768, True),
    ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, True), ("qwen2.5-3b", 3_085_938_688, True),
    ("qwen2.5-7b", 7_615_616_512, False)])
def test_known_names_have_the_published_numbers_of_weights(name, weights, tied):
    config = KarmaConfig(backbone=name, quantization="none", decode_weight=0.0)
    planner = Planner(config, batch_size=1, device_type="cuda")
    assert planner.shape.tie_word_embeddings == tied
    frozen = planner.weights()["frozen weights"]
    # buffers aside, and rounding of each to 512 bytes
    assert 2 * weights <= frozen <= 2 * weights * 1.0001 + 200 * 512


def test_four_bit_weights_take_half_a_byte_and_their_scales():
    planner = Planner(KarmaConfig(backbone="qwen2.5-7b", decode_weight=0.0), batch_size=1)
    embeddings = 2 * 152_064 * 3584
    linear = 28 * (2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 3584 * 18_944)
    expected = 2 * embeddings + linear / 2 + linear / 64 + linear / 64 / 256 * 4
    assert planner.weights()["frozen weights"] == pytest.approx(expected, rel=1e-3)


def test_optimiser_states():
    assert state_bytes([1000, 5000], "adamw_torch_fused") == 2 * 4 * 6000 + 2 * 4
    assert state_bytes([1000, 5120], "adamw_8bit") == 2 * 4 * 1000 + 2 * (5120 + 4 * 20)
    assert state_bytes([1000], "adamw_torch_fused", 512) == 2 * 4096 + 512
    assert state_bytes([1000], "sgd") == 0 and state_bytes([1000], "adagrad") == 4 * 1000
    assert state_bytes([1000], "ademamix") == 3 * 4 * 1000
    assert state_bytes([5120], "paged_ademamix_8bit") == 3 * (5120 + 4 * 20)


@pytest.mark.parametrize(("name", "bits"), [("ademamix", 32), ("ademamix_8bit", 8)])
def test_optimiser_states_of_bitsandbytes(name, bits):
    optim = pytest.importorskip("bitsandbytes.optim")
    weight = torch.nn.Parameter(torch.zeros(5120))
    weight.grad = torch.ones_like(weight)
    optimiser = optim.AdEMAMix([weight], optim_bits=bits)
    optimiser.init_state(optimiser.param_groups[0], weight, 0, 0)
    state = optimiser.state[weight]
    held = sum(state[key].nbytes for key in ("state1", "state2", "absmax1", "absmax2") if key in state)
    assert state_bytes([5120], name) == held


def test_larger_chunks_and_fewer_savings_take_more(backbone):
    plain = Planner(settings(backbone, decode_weight=0.0), batch_size=16)
    few, many = plain.plan(2), plain.plan(16)
    assert 6 * few.parts["activations"] < many.parts["activations"] < 10 * few.parts["activations"]
    saving = Planner(settings(backbone, decode_weight=0.0, gradient_checkpointing=True), batch_size=16).plan(16)
    assert many.parts["activations"] > 3 * saving.parts["activations"]


def test_the_proposed_chunk_fits_and_the_next_does_not(backbone):
    config = settings(backbone, decode_weight=0.0)
    planner = Planner(config, batch_size=8)
    smaller, larger = planner.plan(4), planner.plan(8)
    found = propose(config, larger.peak - 1, 8)
    assert found.fits(larger.peak - 1) and found.chunk_size == 4 and not found.gradient_checkpointing
    assert found.peak == smaller.peak and found.negatives == 7 * 20 and not found.changes

    found = propose(config, smaller.peak - 1, 8)  # 3 windows at once without checkpointing, which are few
    assert found.gradient_checkpointing and found.fits(smaller.peak - 1) and found.chunk_size > 3


def test_older_gpus_compute_in_float32(backbone):
    config = settings(backbone, decode_weight=0.0)
    new, old = (Planner(config, batch_size=8, capability=card).plan(4) for card in ((8, 0), (7, 5)))
    assert old.parts["frozen weights"] == pytest.approx(2 * new.parts["frozen weights"], rel=0.01)
    assert old.parts["activations"] > 1.5 * new.parts["activations"]
    assert "capability 8.0" in new.assumed[-1] and "float32" in old.assumed[-1] and "7.5" in old.assumed[-1]


def test_if_nothing_fits_the_changes_are_ranked(backbone):
    found = propose(settings(backbone, tuning="frozen"), 10**6, 2)
    assert not found.fits(10**6) and found.chunk_size == 1 and found.gradient_checkpointing
    peaks = [change["peak_bytes"] for change in found.changes]
    assert len(peaks) >= 5 and peaks == sorted(peaks)
    assert {"model.quantization", "model.max_history", "training.optim"} <= {c["setting"] for c in found.changes}


def test_narrower_features_are_offered_where_they_are_a_large_part(backbone):
    config = settings(backbone, tuning="frozen", word_dim=64)  # instead of 192
    found = propose(config, 10**6, 2, device_type="cpu")
    (change,) = (change for change in found.changes if change["setting"] == "model.text_vectors")
    assert change["value"] == "words" and found.peak - change["peak_bytes"] > found.parts["item features"] / 2
    planner = Planner(dataclasses.replace(config, word_dim=256), batch_size=2, device_type="cpu")
    assert "model.text_vectors" not in {change["setting"] for change in changes(planner, found, {})}


def test_data_are_counted_once_for_all_changes(backbone, tiny_data, monkeypatch):
    sequences = dataclasses.replace(tiny_data.sequences, query_texts=["red"],
                                    queries=np.zeros(len(tiny_data.sequences.items), np.int32))
    data, counted = dataclasses.replace(tiny_data, sequences=sequences), []
    monkeypatch.setattr("karma_fast.planning.workload.vocabulary",
                        lambda texts: counted.append(len(texts)) or ["red", "pan"])
    found = propose(settings(backbone, positions="last", text_vectors="both", max_history=12), 10**6, 2, data=data)
    assert len(found.changes) >= 5 and counted == [40]
    assert "model.text_vectors" not in {change["setting"] for change in found.changes}  # of 40 items


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("lengths", [[1, 7, 3], [2, 0], [1], []])
def test_the_longest_history_is_that_of_the_windows(lengths, positions):
    ends = np.cumsum([0, *lengths])
    sequences = Sequences(np.arange(len(lengths)).astype(object), ends, np.zeros(ends[-1], np.int32))
    split = Split(ends[1:], np.array([], int), np.array([], int), "")
    data = Dataset(Items(np.array(["a"], object), ["x"], [""]), sequences, split)
    for max_history in (1, 3, 6, 9):
        starts, stops = training_windows(sequences, split, max_history, positions)
        config = KarmaConfig(max_history=max_history, positions=positions)
        assert Workload.of(config, 8, data).history == (stops - starts).max(initial=2) - 1


def test_data_set_the_numbers(tiny_data, tiny_backbone):
    config = KarmaConfig(backbone=str(tiny_backbone), max_history=6, max_text_tokens=12, id_dim=8)
    load = Workload.of(config, 64, tiny_data)
    assert (load.items, load.history, load.query_tokens, load.hard_negatives) == (40, 6, 0, 0)
    assert load.widths == {"text": 64, "id": 8} and load.text_tokens == 12
    assert Workload.of(KarmaConfig(positions="last"), 64).query_tokens == 32
    plan = plan_memory(config, batch_size=4, data=tiny_data)
    assert plan.parts["item features"] < 100_000


def test_a_simulation_changes_nothing_outside(backbone):
    before = torch.random.get_rng_state()
    plan_memory(settings(backbone), batch_size=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.is_autocast_enabled("cpu") and torch.zeros(3).add(1).tolist() == [1, 1, 1]
    assert torch.get_default_device().type == "cpu" and math.isclose(float(torch.ones(4).sum()), 4)


def test_memory_is_recorded_by_storage():
    with Simulation("cuda").entered() as simulation:
        x = torch.zeros(1000, device="cuda")
        view = x.view(10, 100)[2:]
        del x
        assert view.device.type == "cuda" and simulation.blocks[0].died is None
        del view
    assert [block.bytes for block in simulation.blocks if block.bytes] == [4096]
    assert simulation.blocks[0].died is not None


class Silent:
    """Kernels whose launches do nothing."""

    def __getattr__(self, name):
        return self

    def __getitem__(self, grid):
        return lambda *args, **options: None


def most_of(simulation: Simulation) -> int:
    """Bytes in use at most since the start of the record."""
    change = np.zeros(simulation.events + 1, dtype=np.int64)
    for block in simulation.blocks:
        change[block.born] += block.bytes
        if block.died is not None:
            change[block.died] -= block.bytes
    return int(change.cumsum().max())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,keys,width", [(8192, 8192, 256), (4096, 40_000, 64), (4000, 4000, 100),
                                             (2000, 2000, 1024)])
def test_the_loss_takes_what_is_counted_for_it(rows, keys, width, dtype, symmetric, monkeypatch):
    """The launch code on tensors without values, with kernels that do nothing."""
    pytest.importorskip("triton")
    from karma_kernels.info_nce import fused, launch, library, op, staged
    from karma_kernels.info_nce.problem import Wanted
    from karma_kernels.info_nce.routing import library_tile

    for module in (fused, launch, staged):
        monkeypatch.setattr(module, "kernels", Silent())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=108))

    def predicted(outputs: int, gradients: int) -> int:
        return outputs + info_nce_workspace(query, key, symmetric, gradients, 64 << 20)

    with Simulation("cuda").entered() as simulation:
        query, key = (torch.empty(n, width, dtype=dtype, device="cuda") for n in (rows, keys))
        ids = [torch.zeros(n, dtype=torch.int64, device="cuda") for n in (rows, keys)]
        x = op.problem(query, key, torch.arange(rows, device="cuda"), torch.ones((), device="cuda"), *ids,
                       torch.zeros(keys, device="cuda"), symmetric, False, 64 << 20)
        saved, weights = torch.empty(6 if symmetric else 3, rows, device="cuda"), torch.empty(rows, device="cuda")
        simulation.forget()
        library.backward(x, saved, weights, Wanted(True, True, True, True))
        found, expected = most_of(simulation), predicted(query.nbytes + key.nbytes, 15)
        assert found <= 1.01 * expected < 1.1 * found
        simulation.forget()
        library.forward(x, Wanted(False, False, False, False))
        found, expected = most_of(simulation), predicted(0, 0)
        assert found <= 1.01 * expected < 1.1 * found
        if library_tile(rows, keys, dtype.itemsize, symmetric, 64 << 20)[2]:  # gradients in float32
            simulation.forget()
            library.forward(x, Wanted(True, True, True, True))
            assert most_of(simulation) <= 1.01 * predicted(4 * (query.numel() + key.numel()), 15)
        if dtype == torch.bfloat16:
            simulation.forget()
            fused.backward(x, saved, weights, Wanted(True, True, True, True))
            assert most_of(simulation) <= 1.05 * predicted(query.nbytes + key.nbytes, 15)


def simulated_loss(rows: int, keys: int, width: int, dtype: torch.dtype, multiprocessors: int, workspace_bytes: int,
                   monkeypatch) -> tuple:
    """Modules, a problem and what its backward needs, within a simulation, with kernels that do nothing."""
    from karma_kernels.info_nce import fused, launch, op, staged

    for module in (fused, launch, staged):
        monkeypatch.setattr(module, "kernels", Silent())
    card = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    query, key = (torch.empty(n, width, dtype=dtype, device="cuda") for n in (rows, keys))
    x = op.problem(query, key, torch.arange(rows, device="cuda"), torch.ones((), device="cuda"), None, None, None,
                   False, False, workspace_bytes)
    return x, torch.empty(3, rows, device="cuda"), torch.empty(rows, device="cuda")


def test_the_parts_of_one_side_alone_fill_the_workspace(monkeypatch):
    """Many parts of few rows: those of the queries are gone before those of the keys come."""
    pytest.importorskip("triton")
    from karma_kernels.info_nce import fused
    from karma_kernels.info_nce.problem import Wanted

    rows, width, workspace_bytes = 4096, 128, 8 << 20
    with Simulation("cuda", (9, 0)).entered() as simulation:
        x = simulated_loss(rows, rows, width, torch.bfloat16, 132, workspace_bytes, monkeypatch)
        simulation.forget()
        fused.backward(*x, Wanted(True, True, True, False))
        assert 0.9 * workspace_bytes < most_of(simulation) <= workspace_bytes + 2 * 2 * rows * width + 200 * rows


def test_the_loss_converts_narrow_numbers_within_its_workspace(monkeypatch):
    """Where torch would add the products of float16 in float16: whole rows of scores fit, keys in float32 do not."""
    pytest.importorskip("triton")
    from karma_kernels.info_nce import library
    from karma_kernels.info_nce.problem import Wanted

    rows, keys, width, workspace_bytes = 10, 1_000_000, 768, 64 << 20
    both = rows + keys
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        with Simulation("cuda", (9, 0)).entered() as simulation:
            x = simulated_loss(rows, keys, width, torch.float16, 132, workspace_bytes, monkeypatch)
            simulation.forget()
            library.forward(x[0], Wanted(False, False, False, False))
            assert most_of(simulation) <= workspace_bytes + 40 * both
            simulation.forget()
            library.backward(*x, Wanted(True, True, True, False))
            assert most_of(simulation) <= workspace_bytes + (2 + 4) * both * width + 40 * both
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False


def test_what_an_operator_takes_and_its_outputs_are_in_use_together():
    def peak(device: str, places: int) -> int:
        with Simulation(device).entered() as simulation:
            table = torch.zeros(700, 512, device=device, requires_grad=True)
            index = torch.zeros(places, dtype=torch.int64, device=device)
            out, grad = torch.nn.functional.embedding(index, table), torch.zeros(places, 512, device=device)
            simulation.forget()
            out.backward(grad)
            return most_of(simulation)

    sums = 4096 // 10 + 700  # of torch's backward on a GPU
    assert peak("cpu", 4096) == peak("cuda", 3072) == 4 * 700 * 512
    assert 0 <= peak("cuda", 4096) - 4 * (700 + sums) * 512 < 0.1 * 4 * sums * 512


def test_values_of_whole_numbers_are_known_and_others_are_not():
    with Simulation("cuda").entered():
        places = torch.arange(6, device="cuda")
        x = torch.randn(6, 1000, device="cuda")
        assert x[places > 3].shape == (2, 1000) and places.tolist() == [0, 1, 2, 3, 4, 5]
        with pytest.raises((NotImplementedError, RuntimeError)):
            (x > 0).nonzero()


# ---- the command ---------------------------------------------------------------------------------------------------


def arguments(**changes):
    from argparse import Namespace

    return Namespace(**{"config": None, "overrides": {}, "model": None, "gpu_memory": None, "batch_size": None,
                        "chunk_size": None, "json": True} | changes)


def test_command(backbone, capsys):
    known = {"overrides": {"quantization": "none", "decode_weight": "0"}, "model": backbone,
             "batch_size": 40}  # pairs, of windows of 20
    assert main(arguments(gpu_memory="4GB", **known)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["chunk_size"] == 2 and found["peak_bytes"] == sum(found["parts"].values())
    assert main(arguments(gpu_memory="1MB", chunk_size=1, **known)) == 1
    assert json.loads(capsys.readouterr().out)["chunk_size"] == 1
    assert main(arguments(gpu_memory="1MB", json=False, **known)) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text and "model.max_history" in text and "assumed" in text


def test_command_counts_windows_as_training_does(backbone, tiny_dataset, tiny_data, tmp_path, capsys):
    import yaml

    from karma_fast import KarmaTrainingArguments
    from karma_fast.data import training_windows
    from karma_fast.trainer import windows_of_a_step

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"data": tiny_dataset.to_dict()}), encoding="utf-8")
    overrides = {"quantization": "none", "max_history": "4"}
    assert main(arguments(config=str(path), overrides=overrides, model=backbone, batch_size=40, gpu_memory="4GB")) == 0
    windows = training_windows(tiny_data.sequences, tiny_data.split, 4, "all")
    training = KarmaTrainingArguments(batch_size=40, use_cpu=True)
    assert json.loads(capsys.readouterr().out)["batch_size"] == windows_of_a_step(training, "all", *windows) > 40 / 4
    with pytest.raises(ConfigError, match="karma alone"):
        main(arguments(overrides={"recipe": "ra_rec"}))


def test_command_knows_the_card_that_is_here(backbone, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=4 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    known = {"overrides": {"quantization": "none"}, "model": backbone, "batch_size": 40, "chunk_size": 1}
    for memory, capability in ((None, "7.5"), ("4GB", "8.0")):
        main(arguments(gpu_memory=memory, **known))
        found = json.loads(capsys.readouterr().out)
        assert found["budget_bytes"] == 4 * 10**9 and capability in found["assumed"][-1]


def test_command_takes_the_settings_of_training_on_a_gpu(backbone, tmp_path, monkeypatch, capsys):
    config = RunConfig()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config.training = {"use_cpu": True}  # which no default asks
    args = training_arguments(config, tmp_path)
    assert step_settings(RunConfig(), None) == (args.train_batch_size, "auto", args.optim.value)
    assert args.chunk_size == "auto" and args.optim.value == "paged_adamw_8bit"
    monkeypatch.undo()
    main(arguments(overrides={"quantization": "none", "training.chunk_size": "none"}, model=backbone, batch_size=40,
                   gpu_memory="1MB"))
    assert json.loads(capsys.readouterr().out)["chunk_size"] == 2  # all of the step, whether it fits or not


def test_command_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(ConfigError, match="12GB"):
        gpu_memory("a lot")
    with pytest.raises(ConfigError, match=r"model\.backbone.*qwen2\.5-1\.5b"):
        plan_memory(KarmaConfig(backbone=str(tmp_path / "nothing")))


def test_no_other_process_is_asked(backbone, monkeypatch):
    config = settings(backbone)
    alone = plan_memory(config, batch_size=8, device_type="cuda").parts
    for module in ("losses.info_nce", "planning.plan"):  # of a group that was never made
        monkeypatch.setattr(f"karma_fast.{module}.several", lambda: True)
    beside = plan_memory(config, batch_size=8, device_type="cuda").parts
    differ = {part for part, size in alone.items() if beside[part] != size}
    assert differ == {"gradients", "runtime"}  # DistributedDataParallel's copy, and its share of the fragments
    assert beside["gradients"] - alone["gradients"] == pytest.approx(alone["trained weights"], rel=0.02)  # all float32
