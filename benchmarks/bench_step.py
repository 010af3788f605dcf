"""A training step of a tiny random language model, ours and the usual libraries': ``pytest --benchmark``.

It shows the cost around the language model, which in a step of this size is most of it. ``python -m benchmarks.step``
takes steps of real sizes, looks at memory too, and is what reported figures come from.
"""

import functools

import pytest

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install pytest-benchmark")
for host in ("transformers", "peft", "accelerate"):
    pytest.importorskip(host, reason=f"needs {host}: pip install karma-fast[train]")

import torch  # noqa: E402

from benchmarks.step.build import make_inputs, make_side, trainer_of  # noqa: E402
from benchmarks.step.cases import Case, ours, usual  # noqa: E402
from benchmarks.step.training import errors_of, loss_of, run_steps  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [Case("tiny", 32, "all", 1.0), Case("tiny", 32, "all", 0.25), Case("tiny", 32, "last", 1.0)]


@functools.lru_cache(maxsize=1)  # the sides of a case come one after the other
def prepared(case, folder):
    return make_inputs(case, DEVICE, folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("random-model")


@pytest.mark.parametrize("side", [usual(), ours(), ours(8)], ids=lambda side: side.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark, case, side, folder, tmp_path):
    inputs = prepared(case, folder)
    model, collate = make_side(inputs, side)
    errors = errors_of(loss_of(model, collate(inputs.checked)), inputs.expected)
    if max(errors.values()) > 0.1:
        pytest.fail(f"wrong result, relative errors {errors}")
    trainer = trainer_of(inputs, side, model, collate, inputs.windows, str(tmp_path))
    run_steps(trainer, 1)  # makes the optimiser
    batch = trainer.data_collator(inputs.windows)

    def step() -> None:
        trainer.training_step(model, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group, benchmark.name = case.name, side.name
    benchmark.pedantic(step, rounds=10, warmup_rounds=1)
