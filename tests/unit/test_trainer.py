"""The loop: exact losses, schedules, memory trouble, checkpoints. On a real tiny transformer and real text."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hpsearch.data.prepare import prepare
from hpsearch.data.shards import load_split
from hpsearch.errors import UsageError
from hpsearch.files.layout import STOP_FILE
from hpsearch.metrics import intervals
from hpsearch.models.configuration import build_config
from hpsearch.records import WHOLE, Point, Progress, TrialConfig, TrialResult, TrialState
from hpsearch.spec.sections import DataSpec, FileSplits, OverfitRule, TokenizerSpec
from hpsearch.spec.settings import ModelSettings, RunSettings
from hpsearch.spec.study import StudySpec
from hpsearch.tasks.causal_lm.training import CausalLM
from hpsearch.training import checkpoints
from hpsearch.training.evaluation import OutOfMemoryError
from hpsearch.training.optimizing.optimizers import make_optimizers
from hpsearch.training.random_states import seed_everything
from hpsearch.training.trainer import Order, PreemptedError, Trainer
from hpsearch.worker.run import run_trial
from tests.conftest import drain

MODEL = ModelSettings(architecture="gpt2", hidden_size=32, num_heads=2, num_layers=1, context_length=32, init_std=0.08)
RUN = RunSettings(
    learning_rate=1e-2, batch_size=16, num_epochs=2, evaluations_per_epoch=2, optimizer="muon", weight_average=0.1
)
WIDER = MODEL.model_copy(update={"hidden_size": 64})
OVERFITTING = RUN.model_copy(update={"num_epochs": 30, "batch_size": 8, "schedule": "constant"})
"""With the wider model, validation loss turns within ten epochs."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    corpus = DataSpec(corpus="python_docs", fraction=0.04)
    return prepare(
        StudySpec(name="s", task="causal_lm", data=corpus, tokenizer=TokenizerSpec(vocab_size=300), folder=str(folder))
    )[0]


@pytest.fixture
def make(data: Path, tmp_path: Path) -> Callable[..., Trainer]:
    def trainer(run: RunSettings = RUN, model: ModelSettings = MODEL, seed: int = 0, **more: Any) -> Trainer:
        seed_everything(seed)
        return Trainer(CausalLM(data, model), run, seed=seed, device=CPU, folder=tmp_path / "trial", **more)

    return trainer


@pytest.fixture
def config(data: Path, tmp_path: Path) -> TrialConfig:
    return TrialConfig(
        study="s", number=3, task="causal_lm", seed=0, params={}, model=MODEL, training=RUN, rule=OverfitRule(),
        data=str(data), folder=str(tmp_path / "trial"), threads=1,
    )  # fmt: skip


def finish(config: TrialConfig) -> tuple[list[Progress], TrialResult]:
    return drain(run_trial(config))


def losses(points: Iterator[Point]) -> list[tuple[float, float]]:
    return [(point.train_loss, point.valid_loss) for point in points]


def test_training_lowers_both_losses(make: Callable[..., Trainer]) -> None:
    points = list(make().points())
    assert points[-1].valid_loss < points[0].valid_loss < math.log(300) + 1
    assert [point.epoch for point in points] == pytest.approx([0.5, 1.0, 1.5, 2.0], abs=0.1)
    assert [point.evaluation for point in points] == [1, 2, 3, 4]
    assert points[1].ends_epoch
    assert not points[0].ends_epoch


def test_an_epoch_sees_every_token_once_in_windows_that_begin_elsewhere_in_the_next(
    make: Callable[..., Trainer], data: Path
) -> None:
    trainer = make(RUN.model_copy(update={"num_epochs": 2}))
    stream = load_split(data, "train").tokens
    batch = trainer.task.batch
    windows: list[tuple[int, list[int]]] = []

    def noted(split: str, indices: Any) -> Any:
        made = batch(split, indices)
        if split == "train":
            whole = torch.cat([made.tensors[0], made.tensors[1][:, -1:]], dim=1)
            windows.extend(zip(indices.tolist(), whole.tolist(), strict=True))
        return made

    trainer.task.batch = noted
    points = list(trainer.points())
    count = trainer.task.num_examples["train"]
    assert count * 32 <= len(stream) - 1 < (count + 1) * 32
    assert points[-1].tokens == 2 * count * 32
    # The stream runs on from its end, which is end-of-text as its beginning is.
    around = np.concatenate([stream, stream[1:33]])
    assert all(window == around[start : start + 33].tolist() for start, window in windows)
    epochs = [[start for start, _ in windows[part * count :][:count]] for part in range(2)]
    for starts in epochs:
        seen = {(start + step) % (len(stream) - 1) for start in starts for step in range(32)}
        assert len(seen) == count * 32, "none twice"
        assert starts != sorted(starts)
    assert set(epochs[0]) != set(epochs[1])


def test_a_stream_that_is_shorter_than_a_window_is_predicted_once(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("\n\n".join(f"text {number}" for number in range(40)))
    corpus = DataSpec(files=FileSplits(train=[str(file)]), validation_fraction=0.3, test_fraction=0.3)
    tokenizer = TokenizerSpec(vocab_size=300)
    spec = StudySpec(name="s", task="causal_lm", data=corpus, tokenizer=tokenizer, folder=str(tmp_path))
    short = Path(str(prepare(spec)[0]))
    task = CausalLM(short, MODEL.model_copy(update={"context_length": 512}))
    (indices,) = task.epoch_batches(np.random.default_rng(0), 4)
    labels = task.batch("train", indices).tensors[1]
    stream = load_split(short, "train").tokens
    assert int((labels != -100).sum()) == task.predicted("train", indices) == len(stream) - 1
    assert sorted(labels[labels != -100].tolist()) == sorted(stream[1:].tolist())


def test_the_optimizers_are_gone_once_a_run_is_trained(make: Callable[..., Trainer]) -> None:
    """What they keep of each weight would stand in the way of scoring."""
    trainer = make()
    points = trainer.points()
    next(points)
    assert trainer._steps.state()
    points.close()
    assert not trainer._steps.state()


def test_the_same_seed_gives_the_same_curve_to_the_bit(make: Callable[..., Trainer]) -> None:
    once = losses(make().points())
    assert losses(make().points()) == once
    assert losses(make(seed=1).points()) != once


def test_micro_batches_change_nothing_but_memory(make: Callable[..., Trainer]) -> None:
    whole = losses(make().points())
    parts = losses(make(RUN.model_copy(update={"micro_batch_size": 5})).points())
    assert np.array(parts) == pytest.approx(np.array(whole), rel=1e-4)


def test_memory_trouble_halves_the_micro_batch_and_keeps_the_batch(make: Callable[..., Trainer]) -> None:
    trainer, expected = make(), losses(make().points())
    compute = trainer.task.losses

    def limited(batch: Any) -> Any:
        # No GPU here: the allocator's own exception, raised where it would be.
        if torch.is_grad_enabled() and len(batch.tensors[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(batch)

    trainer.task.losses = limited  # type: ignore[method-assign]
    assert np.array(losses(trainer.points())) == pytest.approx(np.array(expected), rel=1e-4)
    assert trainer.micro_batch_size == 4


def test_what_never_fits_is_said(make: Callable[..., Trainer]) -> None:
    trainer = make()

    def full(batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.task.losses = full  # type: ignore[method-assign]
    with pytest.raises(OutOfMemoryError, match="CUDA out of memory"):
        list(trainer.points())


def test_other_errors_are_not_taken_for_memory_trouble(make: Callable[..., Trainer]) -> None:
    trainer = make()

    def broken(batch: Any) -> Any:
        raise RuntimeError("shapes do not match")

    trainer.task.losses = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(trainer.points())


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_and_follows_its_schedule(make: Callable[..., Trainer], schedule: str) -> None:
    run = RUN.model_copy(
        update={"schedule": schedule, "warmup_fraction": 0.25, "final_lr_fraction": 0.2, "num_epochs": 4}
    )
    trainer = make(run)
    rates = [trainer.schedule.learning_rate(step) for step in range(trainer.total_steps)]
    warmup = round(0.25 * len(rates))
    assert max(rates) == pytest.approx(1e-2)
    assert all(later > earlier for earlier, later in pairwise(rates[:warmup]))
    assert all(later <= earlier for earlier, later in pairwise(rates[warmup:]))
    assert rates[-1] == pytest.approx(1e-2 if schedule == "constant" else 2e-3)
    left = [trainer.schedule.decay_to_come(step) for step in range(trainer.total_steps + 1)]
    if schedule == "constant":
        assert set(left) == {0.0}
        return
    assert [left[0], left[-2], left[-1]] == pytest.approx([1.0, 0.0, 0.0])
    assert all(later <= earlier for earlier, later in pairwise(left))
    assert [1e-2 * (0.2 + 0.8 * part) for part in left[-4:-1]] == pytest.approx(rates[-3:])


def test_only_matrices_are_decayed(data: Path) -> None:
    task = CausalLM(data, MODEL)
    run = RUN.model_copy(update={"weight_decay": 0.1})
    optimizers = make_optimizers(task.model, task.model.parameters(), run, muon_dtype=torch.float32)
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    assert {(parameter.dim(), group["weight_decay"]) for group in groups for parameter in group["params"]} == {
        (2, 0.1),
        (1, 0.0),
    }


def test_muon_turns_the_matrices_of_the_blocks_and_adamw_all_other_weights(make: Callable[..., Trainer]) -> None:
    one_step = RUN.model_copy(
        update={"batch_size": 10_000, "num_epochs": 1, "weight_decay": 0.0, "warmup_fraction": 0.0}
    )
    moved: dict[str, dict[str, torch.Tensor]] = {}
    for optimizer in ("muon", "adamw"):
        trainer = make(one_step.model_copy(update={"optimizer": optimizer, "evaluations_per_epoch": 1}))
        before = {name: value.clone() for name, value in trainer._weights().items()}
        list(trainer.points())
        moved[optimizer] = {name: value.detach() - before[name].detach() for name, value in trainer._weights().items()}
    for name, change in moved["muon"].items():
        matters = ".h." in name and change.dim() == 2
        assert torch.equal(change, moved["adamw"][name]) is not matters, name
        if matters:
            stretch = torch.linalg.svdvals(change)
            length = 0.2 * max(change.shape) ** 0.5 * one_step.learning_rate
            assert stretch.median() == pytest.approx(length, rel=0.3)
            assert stretch[0] < 1.3 * length, "in no direction much farther than in others"
            adamw = torch.linalg.svdvals(moved["adamw"][name])
            assert adamw[0] > 3 * adamw.median(), "as AdamW does"


def test_what_is_judged_and_kept_is_the_average_of_the_weights(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(RUN.model_copy(update={"weight_average": 0.25}))
    weights: list[list[torch.Tensor]] = []
    update = trainer.average.update

    def note_and_update(step: int) -> None:
        weights.append([value.detach().clone() for value in trainer._trained.values()])
        update(step)

    monkeypatch.setattr(trainer.average, "update", note_and_update)
    last = list(trainer.points())[-1]
    # The share of each step's weights is the power law's, whose deviation is a quarter of the steps.
    count = len(weights)
    edges = (np.arange(count + 1) / count) ** (0.71982395800071 + 1)
    shares = np.diff(edges)
    centre = (shares * np.arange(1, count + 1)).sum()
    deviation = math.sqrt((shares * (np.arange(1, count + 1) - centre) ** 2).sum())
    assert deviation == pytest.approx(0.25 * count, rel=0.05)
    for number, value in enumerate(trainer._trained.values()):
        steps = torch.stack([there[number] for there in weights]).movedim(0, -1)
        value.data.copy_(steps @ torch.tensor(shares, dtype=steps.dtype))
    assert trainer.evaluator.mean_loss() == pytest.approx(last.valid_loss, rel=1e-4)
    plain = list(make(RUN.model_copy(update={"weight_average": 0.0})).points())[-1]
    assert plain.train_loss == last.train_loss, "training itself goes on from the last weights"
    assert plain.valid_loss != last.valid_loss


@pytest.mark.slow
def test_the_best_checkpoint_is_scored_not_the_last(make: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make(OVERFITTING.model_copy(update={"num_epochs": 14}), WIDER)
    points = list(trainer.points())
    assert trainer.best is not None
    assert trainer.best.valid_loss == min(point.valid_loss for point in points)
    assert trainer.best.evaluation < len(points), "this run is made to overfit"
    trainer.score()
    assert trainer.evaluator.mean_loss() == trainer.best.valid_loss


def test_the_scores_are_transformers_own_loss_on_the_exported_folder(config: TrialConfig) -> None:
    _, result = finish(config)
    model = AutoModelForCausalLM.from_pretrained(config.folder)
    tokens = torch.from_numpy(load_split(Path(config.data), "test").tokens.astype(np.int64))
    total = count = 0.0
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start : start + 33][None]
        with torch.no_grad():
            logits = model(input_ids=window[:, :-1]).logits
        loss = model.loss_function(logits, None, vocab_size=logits.shape[-1], shift_labels=window[:, 1:])
        total += loss.item() * (window.shape[1] - 1)
        count += window.shape[1] - 1
    perplexity, bits = result.scores
    assert perplexity.value == pytest.approx(math.exp(total / count), rel=1e-5)
    sizes = load_split(Path(config.data), "test").document_bytes.sum()
    assert bits.value == pytest.approx(total / math.log(2) / sizes, rel=1e-5)
    valid = torch.from_numpy(load_split(Path(config.data), "validation").tokens.astype(np.int64))
    total = 0.0
    for start in range(0, len(valid) - 1, 32):
        window = valid[start : start + 33][None]
        with torch.no_grad():
            logits = model(input_ids=window[:, :-1]).logits
        total += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
    assert result.details[WHOLE] == pytest.approx(total / (len(valid) - 1), rel=1e-5)
    assert perplexity.low < perplexity.value < perplexity.high
    assert perplexity.contract["tokenizer"] == json.loads((Path(config.data) / "card.json").read_text())["tokenizer"]


def test_an_exported_folder_generates_text(config: TrialConfig) -> None:
    finish(config)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{config.folder}/tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(config.folder)
    prompt = tokenizer("The class", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=5, do_sample=False).shape == (1, prompt.shape[1] + 5)


@pytest.mark.slow
def test_a_run_ends_where_its_verdict_says(config: TrialConfig) -> None:
    config = config.model_copy(update={"model": WIDER, "training": OVERFITTING})
    heard, result = finish(config)
    assert result.state is TrialState.OVERFIT
    assert [progress.stops for progress in heard] == [False] * (len(heard) - 1) + [True]
    assert len(heard) < 60
    assert result.best_evaluation is not None
    assert result.best_evaluation < len(heard)
    assert "validation loss" in result.reason
    heard, result = finish(config.model_copy(update={"rule": None}))
    assert (result.state, len(heard)) == (TrialState.COMPLETED, 60)


@pytest.mark.parametrize("rule", [OverfitRule(), None])
def test_a_loss_that_is_no_number_ends_the_run_unranked(config: TrialConfig, rule: OverfitRule | None) -> None:
    wild = RUN.model_copy(update={"learning_rate": 1e30, "gradient_clip": 0.0})
    heard, result = finish(config.model_copy(update={"training": wild, "rule": rule}))
    assert result.state is TrialState.DIVERGED
    assert not result.scores
    assert len(heard) < 4
    assert not checkpoints.names(Path(config.folder), "resume")


def test_a_trial_that_raises_fails_alone_with_its_traceback(config: TrialConfig) -> None:
    _, result = finish(config.model_copy(update={"data": "/nowhere"}))
    assert result.state is TrialState.FAILED
    assert result.error is not None
    assert "Traceback" in result.error
    assert "card.json" in result.reason


def test_what_does_not_fit_is_infeasible(config: TrialConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: CausalLM, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(CausalLM, "losses", full)
    _, result = finish(config)
    assert result.state is TrialState.INFEASIBLE
    assert "micro-batch 1" in result.reason


LONG = RunSettings(
    learning_rate=1e-2, batch_size=16, num_epochs=3, evaluations_per_epoch=4, optimizer="muon", weight_average=0.1
)
DROPPING = MODEL.model_copy(update={"dropout": 0.2})


def after(steps: int) -> Callable[[], Order]:
    """A pulse that preempts after so many of its beats between steps."""
    beats = iter(range(1_000_000))
    return lambda: Order.PREEMPT if next(beats) >= steps else Order.CONTINUE


def without_times(points: Sequence[Point]) -> list[Point]:
    return [replace(point, seconds=0.0) for point in points]


@pytest.mark.parametrize("cut", [0, 1, 7, 23, 60])
def test_a_preempted_run_goes_on_to_the_bit(data: Path, tmp_path: Path, cut: int) -> None:
    def trainer(name: str, **more: Any) -> Trainer:
        seed_everything(0)
        return Trainer(CausalLM(data, DROPPING), LONG, seed=0, device=CPU, folder=tmp_path / name, **more)

    whole = trainer("whole")
    expected = list(whole.points())
    first = trainer("first", pulse=after(cut))
    with pytest.raises(PreemptedError):
        list(first.points())
    # A new process has drawn other random numbers by then.
    second = trainer("second", earlier=[tmp_path / "first"])
    torch.rand(99)
    points = list(second.points())
    assert without_times(points) == without_times(expected), "equal to the bit"
    assert second.resumed_evaluations == len(first.curve)
    assert points[-1].seconds >= sum(point.seconds for point in first.curve[-1:])
    for (name, one), other in zip(second._weights().items(), whole._weights().values(), strict=True):
        assert torch.equal(one, other), name
    assert second.best is not None
    assert second.score().scores == whole.score().scores


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="cut short"),
        pytest.param(lambda content: bytes([content[0] ^ 0xFF]) + content[1:], id="header"),
        pytest.param(lambda content: content[:-1] + bytes([content[-1] ^ 0x01]), id="one bit of a tensor"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr("hpsearch.training.states.CHECKPOINT_SHARE", math.inf)
    folder = tmp_path / "first"
    first = Trainer(CausalLM(data, MODEL), LONG, seed=0, device=CPU, folder=folder)
    points = first.points()
    expected = [next(points) for _ in range(4)]
    before, last = checkpoints.names(folder, "resume")
    assert len(checkpoints.names(folder, "best")) <= 2
    (folder / last).write_bytes(damage((folder / last).read_bytes()))
    again = Trainer(CausalLM(data, MODEL), LONG, seed=0, device=CPU, folder=tmp_path / "b", earlier=[folder]).points()
    assert without_times([next(again) for _ in range(4)]) == without_times(expected)
    (folder / before).write_bytes(damage((folder / before).read_bytes()))
    fresh = Trainer(CausalLM(data, MODEL), LONG, seed=0, device=CPU, folder=tmp_path / "c", earlier=[folder])
    next(fresh.points())
    assert fresh.resumed_evaluations == 0, "with both gone it begins again"


def test_a_checkpoint_is_data_and_runs_nothing(data: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/ran",)

    content = pickle.dumps(Evil())
    digest = hashlib.sha256(content).hexdigest()[:32]
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / f"resume-000000009-{digest}.safetensors").write_bytes(content)
    trainer = Trainer(
        CausalLM(data, MODEL), RUN, seed=0, device=CPU, folder=tmp_path / "b", earlier=[tmp_path / "first"]
    )
    next(trainer.points())
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_interrupts_the_run_and_leaves_no_half_file(
    config: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    _, result = finish(config)
    assert result.state is TrialState.INTERRUPTED
    assert "no room for" in result.reason
    assert (result.needed_bytes or 0) > 1000
    assert not [file for file in Path(config.folder).iterdir() if "safetensors" in file.name]


def test_a_trial_over_its_time_is_scored_at_its_best(config: TrialConfig) -> None:
    _, result = finish(config.model_copy(update={"training": OVERFITTING, "max_minutes": 0.01}))
    assert result.state is TrialState.COMPLETED
    assert "stopped after max_minutes (0.01) at epoch" in result.reason
    assert result.scores
    assert result.best_epoch is not None


def test_a_trial_that_was_scored_is_not_run_again(config: TrialConfig) -> None:
    heard, result = finish(config)
    again = config.model_copy(update={"folder": f"{config.folder}-attempt-2", "earlier": (config.folder,)})
    assert finish(again) == (heard, result)
    assert finish(again.model_copy(update={"recorded": 3}))[0] == heard[3:]


def test_a_stop_file_makes_a_trial_leave_with_a_checkpoint(config: TrialConfig) -> None:
    config = config.model_copy(update={"training": OVERFITTING, "rule": None})
    trial = run_trial(config)
    heard = [next(trial)]
    (Path(config.folder) / STOP_FILE).touch()
    rest, result = drain(trial)
    heard += rest
    assert result.state is TrialState.INTERRUPTED
    assert len(heard) < 60
    again = config.model_copy(
        update={"folder": f"{config.folder}-attempt-2", "earlier": (config.folder,), "recorded": len(heard)}
    )
    assert next(run_trial(again)).point.evaluation == len(heard) + 1


def test_results_and_progress_survive_the_wire(config: TrialConfig) -> None:
    heard, result = finish(config)
    assert Progress.from_json(heard[0].to_json()) == heard[0]
    assert TrialResult.from_json(result.to_json()) == result
    assert TrialConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "opt", "qwen2", "mistral", "gemma", "qwen3"])
def test_settings_reach_every_architecture_under_its_own_names(architecture: str) -> None:
    settings = ModelSettings(architecture=architecture, num_layers=3, hidden_size=64, num_heads=4, context_length=16)
    model = AutoModelForCausalLM.from_config(build_config(AutoModelForCausalLM, settings, vocab_size=300))
    assert model.config.num_hidden_layers == 3
    assert model.get_input_embeddings().weight.shape == (300, 64)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    tokens = torch.arange(16)[None]
    assert torch.isfinite(model(input_ids=tokens, labels=tokens).loss)


def test_dropout_reaches_the_model() -> None:
    config = build_config(AutoModelForCausalLM, ModelSettings(architecture="gpt2", dropout=0.3), vocab_size=300)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.3, 0.3, 0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "gtp2"}, "transformers knows no architecture 'gtp2'"),
        ({"architecture": "vit"}, "'vit' has no CausalLM model"),
        ({"config": {"n_iner": 3}}, r"model\.config\.n_iner: the configuration of 'gpt2' has no such key"),
    ],
)
def test_models_that_cannot_be_built_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_config(AutoModelForCausalLM, ModelSettings(**{"architecture": "gpt2", **settings}), vocab_size=300)


@pytest.mark.slow
def test_the_bootstrap_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        tokens = rng.integers(5, 200, 150).astype(float)
        nats = tokens * rng.normal(4.0, 0.5, 150)
        low, high = intervals.interval("perplexity", {"nats": nats, "tokens": tokens}, {})
        hits += low < math.exp(4.0) < high
    assert 0.90 <= hits / 200 <= 0.99


def test_a_run_whose_time_is_short_has_its_learning_rate_brought_down_to_its_end(make: Callable[..., Trainer]) -> None:
    """Each step takes a second of a clock that gives it 20 of its steps; the schedule alone would end much later."""
    run = RUN.model_copy(
        update={"num_epochs": 40, "schedule": "constant", "warmup_fraction": 0.0, "final_lr_fraction": 0.1}
    )
    steps = 0

    def pulse() -> Order:
        return Order.TIME_UP if steps >= 20 else Order.CONTINUE

    trainer = make(run, pulse=pulse, time_left=lambda: 20.0 - steps)
    rates = []
    step = trainer._step

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        rates.append(trainer.schedule.learning_rate(trainer._position.step))
        return step(*arguments)

    trainer._step = counted  # type: ignore[method-assign]
    points = list(trainer.points())
    assert points[-1].epoch < 40
    assert trainer.schedule.is_shortened
    peak = run.learning_rate
    assert rates[:10] == [peak] * 10
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(peak * 0.1)
    assert trainer.best is not None


def test_a_run_that_has_time_enough_keeps_its_schedule(make: Callable[..., Trainer]) -> None:
    trainer = make(time_left=lambda: 1e6)
    as_planned = losses(make().points())
    assert losses(trainer.points()) == as_planned
    assert not trainer.schedule.is_shortened


def test_a_result_that_another_study_has_left_is_not_taken_for_the_trials(tmp_path: Path) -> None:
    from hpsearch.worker.run import _read_result, _write_result

    result = TrialResult(state=TrialState.COMPLETED, reason="ran its 4 epochs")
    _write_result(tmp_path, result, [], "one/3")
    assert _read_result(tmp_path, "another/3") is None
    assert _read_result(tmp_path, "one/4") is None
    found = _read_result(tmp_path, "one/3")
    assert found is not None
    assert found[0].reason == result.reason
