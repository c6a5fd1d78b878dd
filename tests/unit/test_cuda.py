"""What only a real GPU shows: memory that runs out, precision, resuming, the share of a device, NCCL."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from hpsearch.data.prepare import prepare
from hpsearch.spec.sections import DataSpec, TokenizerSpec
from hpsearch.spec.settings import ModelSettings, RunSettings
from hpsearch.spec.study import StudySpec
from hpsearch.tasks.causal_lm.training import CausalLM
from hpsearch.training.devices import peak_memory, pick_device, use_memory
from hpsearch.training.evaluation import OutOfMemoryError
from hpsearch.training.memory import CONTEXT_BYTES, PeakMemory
from hpsearch.training.random_states import seed_everything
from hpsearch.training.ranks import lead
from hpsearch.training.trainer import Order, PreemptedError, Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

MODEL = ModelSettings(architecture="gpt2", hidden_size=128, num_layers=2, context_length=64, init_std=0.08, dropout=0.1)
RUN = RunSettings(
    learning_rate=3e-3, batch_size=32, num_epochs=2, evaluations_per_epoch=2, optimizer="muon", weight_average=0.1
)
GPU = pick_device("auto")
Make = Callable[..., Trainer]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = DataSpec(corpus="python_docs", fraction=0.3)
    folder = str(tmp_path_factory.mktemp("data"))
    return prepare(
        StudySpec(name="s", task="causal_lm", data=corpus, tokenizer=TokenizerSpec(vocab_size=1024), folder=folder)
    )[0]


@pytest.fixture
def make(data: Path, tmp_path: Path) -> Make:
    def trainer(
        run: RunSettings = RUN, model: ModelSettings = MODEL, name: str = "trial", **options: object
    ) -> Trainer:
        seed_everything(0)
        return Trainer(CausalLM(data, model), run, seed=0, device=GPU, folder=tmp_path / name, **options)  # type: ignore[arg-type]

    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [point.valid_loss for point in trainer.points()]


def test_a_gpu_learns_what_a_cpu_learns(make: Make, data: Path, tmp_path: Path) -> None:
    seed_everything(0)
    plain = MODEL.model_copy(update={"dropout": 0.0})
    on_cpu = Trainer(CausalLM(data, plain), RUN, seed=0, device=torch.device("cpu"), folder=tmp_path / "cpu")
    expected = losses(on_cpu)
    exact = losses(make(RUN.model_copy(update={"precision": "float32"}), plain, "float32"))
    half = losses(make(RUN, plain, "bfloat16"))
    assert exact == pytest.approx(expected, rel=0.02)
    assert half == pytest.approx(expected, rel=0.05)


def test_a_preempted_run_goes_on_from_its_checkpoint(make: Make, tmp_path: Path) -> None:
    whole = losses(make(name="whole"))
    steps = 0

    def after_some_steps() -> Order:
        nonlocal steps
        steps += 1
        return Order.PREEMPT if steps > 12 else Order.CONTINUE

    with pytest.raises(PreemptedError):
        losses(make(name="first", pulse=after_some_steps))
    again = make(name="second", earlier=[tmp_path / "first"])
    assert losses(again) == pytest.approx(whole, rel=0.02)
    assert again.resumed_evaluations >= 1


def test_memory_that_runs_out_halves_the_micro_batch_and_not_the_batch(make: Make) -> None:
    wide = MODEL.model_copy(update={"hidden_size": 512, "num_layers": 4})
    run = RUN.model_copy(update={"batch_size": 2048, "num_epochs": 1, "evaluations_per_epoch": 1})
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        use_memory(GPU, (CONTEXT_BYTES + 1.2e9) / total)
        trainer = make(run, wide)
        points = list(trainer.points())
        assert trainer.micro_batch_size < 2048
        assert points[-1].step == trainer.steps_per_epoch
        peak = peak_memory(GPU)
        assert peak["peak_memory_bytes"] < 1.3e9
        use_memory(GPU, (CONTEXT_BYTES + 2e7) / total)
        with pytest.raises((OutOfMemoryError, torch.OutOfMemoryError)):
            list(make(run, wide, "never").points())
    finally:
        use_memory(GPU, None)


def test_the_learned_share_of_a_device_is_enough_and_not_much_more(make: Make) -> None:
    memory = PeakMemory()
    peaks = []
    for number, (layers, width, batch) in enumerate(
        [(1, 64, 64), (2, 128, 64), (4, 128, 128), (2, 256, 64), (4, 256, 128), (6, 384, 128)]
    ):
        model = MODEL.model_copy(update={"num_layers": layers, "hidden_size": width})
        run = RUN.model_copy(update={"batch_size": batch, "num_epochs": 1, "evaluations_per_epoch": 1})
        use_memory(GPU, None)
        list(make(run, model, f"{number}").points())
        found = peak_memory(GPU)
        settings = {"model": model.model_dump(), "training": run.model_dump()}
        peaks.append(found["peak_memory_bytes"])
        if number < 5:
            memory.learn(settings, None, found)
    estimate = memory._estimate((1.0, 6 * 384**2, 384, 128 * 64 * 6 * 384, 128 * 64))
    print(f"peaks {[round(peak / 1e6) for peak in peaks]} MB, estimate of the last {estimate / 1e6:.0f} MB")
    assert peaks[-1] <= estimate <= 3 * peaks[-1]
    assert memory.share(settings) <= 0.1


def test_gradients_travel_by_nccl() -> None:
    with lead("127.0.0.1", 1, lambda address: None, timeout=timedelta(minutes=1)) as ranks:
        value = torch.ones(8, device=GPU)
        assert ranks.add(value).sum().item() == 8
        layer = torch.nn.Linear(8, 8).to(GPU)
        replica = ranks.replicate(layer)
        replica(value).sum().backward()
        assert layer.weight.grad is not None
        assert torch.distributed.get_backend_config() == "cpu:gloo,cuda:nccl"
