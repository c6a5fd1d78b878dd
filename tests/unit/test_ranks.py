"""One trial in several processes: the same losses and scores as in one, stopped, resumed and lost together."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hpsearch.data.prepare import prepare
from hpsearch.files.layout import STOP_FILE
from hpsearch.records import Progress, TrialConfig, TrialResult, TrialState
from hpsearch.spec.sections import DataSpec, OverfitRule, TokenizerSpec
from hpsearch.spec.settings import ModelSettings, RunSettings
from hpsearch.spec.study import StudySpec
from hpsearch.tasks.causal_lm.training import CausalLM
from hpsearch.training.steps import MICRO_BATCH
from hpsearch.training.trainer import Trainer
from hpsearch.worker.reasons import first_cause
from hpsearch.worker.run import run_trial
from hpsearch.worker.team import ProcessLostError, follow
from tests.commands import FORKS
from tests.conftest import drain
from tests.unit.test_trainer import OVERFITTING, WIDER

# A process that waits for another one does so in C++, where no signal ends it: a test that hangs ends its worker.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300, method="thread")]
SIZE = 3
RUN = RunSettings(
    learning_rate=3e-3, batch_size=16, num_epochs=2, evaluations_per_epoch=2, optimizer="muon", weight_average=0.1
)
MODELS = {
    "causal_lm": ModelSettings(architecture="gpt2", hidden_size=32, num_heads=2, num_layers=1, context_length=32),
    "translation": ModelSettings(architecture="marian", hidden_size=32, num_heads=2, num_layers=1, context_length=32),
    "classification": ModelSettings(architecture="bert", hidden_size=32, num_heads=2, num_layers=1, context_length=32),
    "instruction": ModelSettings(architecture="llama", hidden_size=32, num_heads=2, num_layers=1, context_length=128),
}
FRACTIONS = {"causal_lm": 0.05, "translation": 0.1, "classification": 0.3, "instruction": 0.1}
CORPORA: dict[str, Any] = {
    "causal_lm": "python_docs",
    "translation": "ui_messages",
    "classification": "python_areas",
    "instruction": "python_functions",
}


class Pool:
    """Processes that wait for work. They are forked from one that knows torch: a pool that was killed is soon up again."""

    def __init__(self) -> None:
        self._executor: ProcessPoolExecutor | None = None

    def submit(self, entry: Callable[..., str], *arguments: Any, **more: Any) -> Future[str]:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(SIZE - 1, mp_context=FORKS)
        return self._executor.submit(entry, *arguments, **more)

    def kill(self) -> None:
        if self._executor is not None:
            for process in list(self._executor._processes.values()):
                process.kill()
            self._executor.shutdown()
        self._executor = None


class Processes:
    """See `worker.team.Team`."""

    size = SIZE
    host = "127.0.0.1"

    def __init__(self, pool: Pool, entry: Callable[..., str] = follow) -> None:
        self._pool = pool
        self._entry = entry
        self._answers: list[Future[str]] = []
        self.is_done: bool | None = None

    def start(self, config: TrialConfig, address: str) -> None:
        place = {"size": self.size, "host": self.host}
        self._answers = [
            self._pool.submit(self._entry, config, address, rank=rank, **place) for rank in range(1, self.size)
        ]

    def lost(self, wait_s: float = 0.0) -> str | None:
        if not wait(self._answers, timeout=wait_s, return_when=FIRST_COMPLETED).done:
            return None
        done = wait(self._answers, timeout=wait_s / 5).done
        return first_cause([str(answer.exception() or answer.result()) for answer in done])

    def end(self, *, is_done: bool) -> None:
        self.is_done = is_done
        if not is_done:
            self._pool.kill()
        for answer in self._answers if is_done else ():
            assert answer.result(timeout=60) == ""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("data")

    def made(task: str) -> Path:
        corpus = DataSpec(corpus=CORPORA[task], fraction=FRACTIONS[task])
        spec: Any = {"name": "s", "task": task, "data": corpus, "tokenizer": TokenizerSpec(vocab_size=300)}
        return prepare(StudySpec(**spec, folder=str(folder)))[0]

    return made


@pytest.fixture
def configure(data: Callable[[str], Path], tmp_path: Path) -> Callable[..., TrialConfig]:
    def made(task: str = "causal_lm", name: str = "trial", **training: Any) -> TrialConfig:
        return TrialConfig(
            study="s", number=0, task=task, seed=0, params={}, model=MODELS[task],
            training=RUN.model_copy(update=training), rule=None,
            data=str(data(task)), folder=str(tmp_path / name), threads=1,
        )  # fmt: skip

    return made


def assert_equal(
    one: tuple[list[Progress], TrialResult], other: tuple[list[Progress], TrialResult], *, within: float = 1e-4
) -> None:
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert ours.point.valid_loss == pytest.approx(theirs.point.valid_loss, abs=within)
        assert ours.point.train_loss == pytest.approx(theirs.point.train_loss, abs=within)
        assert (ours.point.tokens, ours.point.step) == (theirs.point.tokens, theirs.point.step)
    assert [score.metric for score in one[1].scores] == [score.metric for score in other[1].scores]
    for ours, theirs in zip(one[1].scores, other[1].scores, strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=within)
        assert ours.n == theirs.n


@pytest.mark.parametrize(
    "task",
    [*(name for name in MODELS if name != "instruction"), pytest.param("instruction", marks=pytest.mark.nightly)],
)
def test_three_processes_learn_what_one_learns(configure: Callable[..., TrialConfig], pool: Pool, task: str) -> None:
    # Muon's products in bfloat16 let differences of rounding grow until an example changes its class.
    alone = drain(run_trial(configure(task, "alone", optimizer="adamw")))
    team = Processes(pool)
    together = drain(run_trial(configure(task, "together", optimizer="adamw"), team=team))
    assert together[1].state is TrialState.COMPLETED, together[1].error
    assert together[1].provenance["processes"] == SIZE
    assert_equal(alone, together)
    assert team.is_done


def test_accumulation_and_batches_smaller_than_the_team_change_nothing(
    configure: Callable[..., TrialConfig], pool: Pool
) -> None:
    """With two examples a batch, one of three processes has none."""
    for batch, micro in ((2, None), (16, 2)):
        alone = drain(run_trial(configure(name=f"alone-{batch}", batch_size=batch, num_epochs=1)))
        settings = {"batch_size": batch, "micro_batch_size": micro, "num_epochs": 1}
        assert_equal(alone, drain(run_trial(configure(name=f"team-{batch}", **settings), team=Processes(pool))))


def test_processes_drop_out_differently(configure: Callable[..., TrialConfig], pool: Pool) -> None:
    config = configure()
    config = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.1})})
    alone = drain(run_trial(config.model_copy(update={"folder": config.folder + "-alone"})))
    together = drain(run_trial(config, team=Processes(pool)))
    assert together[1].state is TrialState.COMPLETED
    assert together[0][-1].point.valid_loss == pytest.approx(alone[0][-1].point.valid_loss, abs=0.1)
    with pytest.raises(AssertionError):
        assert_equal(alone, together)


def test_a_decision_stops_all_processes(configure: Callable[..., TrialConfig], pool: Pool) -> None:
    team = Processes(pool)
    trial = run_trial(configure(), team=team)
    next(trial)
    trial.close()  # what a backend does when the other trials show this one to be unpromising
    assert team.is_done, "each of the others ended by itself"
    update = {"rule": OverfitRule(), "model": WIDER, "training": OVERFITTING}
    heard, result = drain(run_trial(configure(name="turns").model_copy(update=update), team=Processes(pool)))
    assert heard[-1].stops, "stopped by its own verdict"
    assert result.state in (TrialState.OVERFIT, TrialState.PLATEAU)
    assert result.scores, "and scored by all of them"


def test_a_preempted_trial_goes_on_with_all_its_processes(configure: Callable[..., TrialConfig], pool: Pool) -> None:
    config = configure()
    config = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.1})})
    whole = drain(run_trial(config.model_copy(update={"folder": config.folder + "-whole"}), team=Processes(pool)))
    trial = run_trial(config, team=Processes(pool))
    first = next(trial)
    (Path(config.folder) / STOP_FILE).touch()
    rest, result = drain(trial)
    assert result.state is TrialState.INTERRUPTED
    again = config.model_copy(
        update={"folder": config.folder + "-2", "earlier": (config.folder,), "recorded": 1 + len(rest), "attempt": 2}
    )
    heard, result = drain(run_trial(again, team=Processes(pool)))
    assert [replace(step.point, seconds=0.0) for step in [first, *rest, *heard]] == [
        replace(step.point, seconds=0.0) for step in whole[0]
    ], "to the bit, dropout in every process included"
    assert [score.value for score in result.scores] == [score.value for score in whole[1].scores]


def dies(config: TrialConfig, address: str, **place: Any) -> str:
    """A process that is killed in the middle of the run."""
    evaluate = Trainer._evaluate_now

    def evaluate_and_die(trainer: Trainer) -> Any:
        if place["rank"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(trainer)

    with mock.patch.object(Trainer, "_evaluate_now", evaluate_and_die):
        return follow(config, address, **place)


def test_a_lost_process_is_named(configure: Callable[..., TrialConfig], pool: Pool) -> None:
    team = Processes(pool, dies)
    with pytest.raises(ProcessLostError, match="terminated abruptly"):
        drain(run_trial(configure(), team=team))
    assert team.is_done is False


def has_little_memory(config: TrialConfig, address: str, **place: Any) -> str:
    """A process on a device where two examples are too many."""
    return lacks_memory_after(0, config, address, **place)


def comes_to_lack_memory(config: TrialConfig, address: str, **place: Any) -> str:
    """The same, but its first attempt comes to a checkpoint before."""
    return lacks_memory_after(10 if config.attempt == 1 else 0, config, address, **place)


def lacks_memory_after(steps: int, config: TrialConfig, address: str, **place: Any) -> str:
    losses, done = CausalLM.losses, 0

    def limited(task: CausalLM, batch: Any) -> Any:
        nonlocal done
        if task.model.training and place["rank"] == 1:
            done += 1
            if done > steps and len(batch.tensors[0]) > 2:
                raise MemoryError("out of memory")
        return losses(task, batch)

    with mock.patch.object(CausalLM, "losses", limited):
        return follow(config, address, **place)


@pytest.mark.parametrize("process", [has_little_memory, comes_to_lack_memory])
def test_memory_trouble_of_one_process_makes_all_begin_again_smaller(
    configure: Callable[..., TrialConfig], pool: Pool, process: Callable[..., str]
) -> None:
    alone = drain(run_trial(configure(name="alone", num_epochs=1)))
    config = configure(num_epochs=1)
    sizes, said, seen = [], [], []
    for attempt in range(1, 4):
        trial = run_trial(config, team=Processes(pool, process))
        try:
            while True:
                seen.append(next(trial))
        except StopIteration as end:
            result = end.value
            break
        except ProcessLostError as error:
            said.append(str(error))
        sizes.append(int((Path(config.folder) / MICRO_BATCH).read_text()))
        update = {"folder": f"{config.folder}-{attempt}", "earlier": (config.folder, *config.earlier)}
        config = config.model_copy(update={**update, "attempt": attempt + 1, "recorded": len(seen)})
    assert sizes == [3, 1], "a part of 16 examples is 6, then half of it, and half again"
    for words in said:
        assert words.startswith("preempted: out of memory in one of 3 processes; continues in ")
    assert result.micro_batch_size == 1
    assert_equal(alone, (seen, result))


def test_what_fits_on_no_device_is_infeasible(configure: Callable[..., TrialConfig], pool: Pool) -> None:
    config = configure(name="second")
    first = configure(name="first")
    Path(first.folder).mkdir()
    (Path(first.folder) / MICRO_BATCH).write_text("0")
    _, result = drain(run_trial(config.model_copy(update={"earlier": (first.folder,)}), team=Processes(pool)))
    assert result.state is TrialState.INFEASIBLE
