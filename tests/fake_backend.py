"""A backend without training, with a clock of its own: what a StudyRun does with a sequence of events, in milliseconds.

backend = FakeBackend(store, tmp_path, "budget: {trials: 2}")
backend.play("start", "point 0 5.0", "start", "lose 1", "end 0", "end 1", "finish")
backend.states()          # {0: "completed", 1: "completed"}
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import yaml

from hpsearch.driver.run.outbox import Outbox
from hpsearch.driver.run.study_run import StopRequestedError, StudyRun
from hpsearch.driver.run.trials import Repeat
from hpsearch.pruning.overfitting import judge
from hpsearch.records import Decision, Event, Point, Progress, Score, TrialConfig, TrialResult, TrialState
from hpsearch.search.study import Search
from hpsearch.spec.load import load_study
from hpsearch.spec.sections import OverfitRule
from hpsearch.store.leases import owner_of
from hpsearch.store.rows import NewStudy, TrialRow
from hpsearch.store.store import Store

EPOCHS = 9
BASE = {
    "task": "causal_lm",
    "data": {"corpus": "python_docs"},
    "training": {"evaluations_per_epoch": 1},
    "search": {"learning_rate": {"min": 1e-4, "max": 1e-1, "scale": "log"}, "num_epochs": EPOCHS},
    "budget": {"trials": 4},
    "sampler": "random",
    "prune": {"unpromising": "none"},
    "backend": "inline",
    "resources": {"gpus_per_trial": 0},
}
_names = itertools.count()


class FakeBackend:
    """Trials that do what they are told. Times are of `now`, which only `wait` moves."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        study: str = "",
        *,
        name: str | None = None,
        repeats: Sequence[Repeat] | None = None,
    ) -> None:
        """`study` is YAML over a small study. With the `name` of one that is there, it is resumed."""
        self.store = store
        self.now = 1000.0
        self.notes: list[str] = []
        self.name = name or f"s{next(_names)}"
        file = folder / f"{self.name}.yaml"
        if name is None:
            content = {**BASE, **(yaml.safe_load(study) or {}), "name": self.name, "store": store.url}
            file.write_text(yaml.safe_dump(content))
        self.spec = load_study(file, folder=str(folder / "runs"))
        data = folder / "data"
        data.mkdir(exist_ok=True)
        (data / "card.json").touch()
        row = store.find_study(self.name) or store.add_study(
            NewStudy(
                name=self.name, task="causal_lm", metric="perplexity", higher_is_better=False, spec=self.spec.record(),
                fingerprint=self.spec.fingerprint, overrides=[], budget_trials=self.spec.budget.trials,
                data={"fingerprint": "f"}, objective="loss", placement=self.spec.placement(),
            )
        )  # fmt: skip
        self.row = row
        self.outbox = Outbox(self.notes.append)
        self.search = Search(self.spec, store.url if name or repeats else None, write=self.outbox.put)
        self.live: dict[int, TrialConfig] = {}
        self.curves: dict[int, list[Point]] = {}
        self.leaving: set[int] = set()
        """Trials that were told to pause or stop at their last point."""
        self.answers: list[Decision] = []
        self.ended: str | None = None
        """Why the launch was ended by the driver."""
        self.run = StudyRun(
            spec=self.spec, study=row, store=store, search=self.search, outbox=self.outbox, data=data,
            owner=owner_of(store, row, 0), threads=1, listen=self._hear, repeats=repeats, now=lambda: self.now,
        )  # fmt: skip

    def play(self, *events: str) -> FakeBackend:
        """Let events happen, each a word and what it is about; see the methods of the same names."""
        for event in events:
            word, *arguments = event.split(maxsplit=2)
            getattr(self, word)(*arguments)
        return self

    def start(self, count: str = "1") -> int:
        """Ask for so many trials; each must be given. Returns the number of the last."""
        for _ in range(int(count)):
            config = self.run.next_trial()
            assert config is not None, f"nothing to start; notes: {self.notes}"
            self.live[config.number] = config
        return config.number

    def train(self, number: int, loss: float) -> None:
        """A trial reports, a little better each time, until it leaves its device or ends after its epochs."""
        while number in self.live and (reported := len(self.curves.get(number, []))) < EPOCHS:
            self.point(str(number), str(loss - 0.01 * reported))
        if number in self.live:
            self.end(str(number))

    def idle(self) -> None:
        """Ask for a trial; none may be given."""
        config = self.run.next_trial()
        assert config is None, f"trial {config.number} was started"

    def point(self, number: str, loss: str = "4.0") -> None:
        """A trial reports the end of its next epoch."""
        config = self.live[int(number)]
        curve = self.curves.setdefault(int(number), [])
        evaluation = len(curve) + 1
        value = float(loss)
        curve.append(
            Point(
                evaluation=evaluation, epoch=float(evaluation), step=10 * evaluation, train_loss=value, valid_loss=value,
                learning_rate=1e-3, tokens=100 * evaluation, seconds=10.0 * evaluation,
            )
        )  # fmt: skip
        epochs = config.training.num_epochs
        rung = next(
            (place for place, part in enumerate(config.rungs) if evaluation == max(1, round(part * epochs))), None
        )
        judgement = judge(curve, epochs, OverfitRule())
        decision = self.run.on_progress(
            int(number), Progress(point=curve[-1], judgement=judgement, stops=False, rung=rung, memory={})
        )
        self.answers.append(decision)
        if decision is Decision.PAUSE:
            del self.live[int(number)]
            self.run.on_paused(int(number))
        elif decision is Decision.STOP:
            del self.live[int(number)]
            self.run.on_stopped(int(number))

    def end(self, number: str, state: str = "completed") -> None:
        """A trial ends by itself, ranked at its best point when the state is one that ranks."""
        del self.live[int(number)]
        self.run.on_result(int(number), self._result(int(number), TrialState(state)))

    def fail(self, number: str, reason: str = "ValueError: wrong") -> None:
        del self.live[int(number)]
        self.run.on_result(int(number), TrialResult(state=TrialState.FAILED, reason=reason, seconds=1.0))

    def lose(self, number: str, error: str = "the worker died") -> None:
        """A trial's worker dies."""
        del self.live[int(number)]
        self.run.on_lost(int(number), error)

    def full(self, number: str) -> None:
        """A trial leaves because the disk is full."""
        del self.live[int(number)]
        result = TrialResult(state=TrialState.INTERRUPTED, reason="no room", needed_bytes=2**60)
        self.run.on_result(int(number), result)

    def leave(self, number: str) -> None:
        """A trial that was asked to leave does, with a checkpoint; one that scores gives its score."""
        config = self.live.pop(int(number))
        if config.scores_only:
            self.run.on_result(int(number), self._result(int(number), TrialState.INTERRUPTED))
            return
        self.run.on_result(int(number), TrialResult(state=TrialState.INTERRUPTED, reason="asked to stop", seconds=1.0))

    def ask(self, reason: str = "stopped by SIGTERM") -> None:
        """The launch is asked to stop."""
        self.run.request_stop(reason)

    def wait(self, seconds: str) -> None:
        self.now += float(seconds)
        self.look()

    def look(self) -> None:
        """The backend's loop comes by."""
        try:
            self.run.check_stop()
        except StopRequestedError as stopped:
            self.ended = str(stopped)

    def finish(self) -> None:
        """The launch ends: what still runs is put back into the queue, and everything is written."""
        self.run.interrupt_live()
        self.live.clear()
        self.flush()

    def flush(self) -> None:
        self.outbox.flush()
        self.run.settle()

    def close(self) -> None:
        self.outbox.close()
        self.search.close()

    def rows(self) -> list[TrialRow]:
        self.flush()
        return self.store.trials(self.row.id)

    def states(self) -> dict[int, str]:
        """Of the trials in the store."""
        return {row.number: row.state for row in self.rows()}

    def _result(self, number: int, state: TrialState) -> TrialResult:
        curve = self.curves.get(number, [])
        best = min(curve, key=lambda point: point.valid_loss, default=None)
        if best is None or state in (TrialState.DIVERGED, TrialState.INFEASIBLE):
            return TrialResult(state=state, reason=f"ended as {state}", seconds=1.0)
        score = Score(metric="perplexity", value=best.valid_loss, low=0.0, high=9.0, n=10, contract={})
        return TrialResult(
            state=state, reason=f"ended as {state}", best_evaluation=best.evaluation, best_epoch=best.epoch,
            best_valid_loss=best.valid_loss, seconds=curve[-1].seconds, scores=(score,),
        )  # fmt: skip

    def _hear(self, event: Event) -> None:
        if event.kind == "note":
            self.notes.append(event.text)
