"""The training loop, the same for every task: settings and a task in, one Point per evaluation out.

Knows nothing of Optuna, Ray or SQL. Losses are summed and divided by the number of predicted tokens of the whole
batch, so that accumulation over micro-batches changes nothing; when memory runs out the micro-batch is halved and the
sampled batch size stays. No value is read from the device between two evaluations. A run resumes from its last
checkpoint with weights, optimizer, schedule, random states and data order as they were: on a CPU its curve is equal to
the bit.

On several devices each process (see `ranks`) trains its part of every batch and judges its part of every split. The
first one is asked and answers; the others make the same steps and then `follow`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpsearch.errors import DiskFullError, LeaseLostError
from hpsearch.files import storage
from hpsearch.files.storage import Folder
from hpsearch.files.trial_log import LOGGER
from hpsearch.models import architecture
from hpsearch.records import Point
from hpsearch.spec.settings import RunSettings
from hpsearch.tasks.base import Indices, Scored, ScoredTask, Task
from hpsearch.training import checkpoints, random_states
from hpsearch.training.evaluation import Evaluator
from hpsearch.training.optimizing.averaging import WeightAverage
from hpsearch.training.optimizing.schedule import Schedule
from hpsearch.training.ranks import Ranks
from hpsearch.training.states import BestWeights, Found, RunStates
from hpsearch.training.steps import Steps, begin_smaller


class Order(IntEnum):
    """What the outside asks of a run between two steps; of several processes the largest counts."""

    CONTINUE = 0
    TIME_UP = 1
    """End here, with what has been learnt."""
    PREEMPT = 2
    """Write a checkpoint and leave."""


class PreemptedError(Exception):
    """The run was asked to leave; it can be resumed from where it was."""


@dataclass
class _Position:
    """Where a run is: all that is needed to resume it, beside tensors."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    evaluation: int = 0
    tokens: int = 0
    loss_count: int = 0
    seconds: float = 0.0


class Trainer:
    """One run. `points()` trains it; `score()` then judges its best checkpoint on the test split."""

    def __init__(
        self,
        task: Task,
        settings: RunSettings,
        *,
        seed: int,
        device: torch.device,
        folder: Folder,
        objective: str = "loss",
        earlier: Sequence[Folder] = (),
        origin: str = "",
        rungs: Sequence[float] = (),
        pulse: Callable[[], Order] = lambda: Order.CONTINUE,
        time_left: Callable[[], float] | None = None,
        ranks: Ranks | None = None,
        validation_part: float = 1.0,
    ) -> None:
        """`earlier` are folders of interrupted attempts at this run, resumed from if they hold a state of its `origin`.

        At `rungs`, parts of the run, its state is written before the point is handed out.

        A run that would take longer than `time_left` (seconds) has its learning rate brought down to its end by then.

        `validation_part` of the validation split is looked at for each point. `pulse` is called after every step and
        every evaluation batch; its answer counts between two steps. Of several
        `ranks` each has a Trainer of its own, with the same settings, seed and folder.
        """
        self.task = task
        self.settings = settings
        self.device = device
        self.folder = folder
        storage.make(folder)
        self.objective = objective
        self.best: Point | None = None
        self.curve: list[Point] = []
        self.resumed_evaluations = 0
        """Points of the curve that come from the state that the run was resumed from."""
        self.confirmed_loss: float | None = None
        """Of the best checkpoint on all of the validation split, once it is scored; None where each point is of all."""
        self._ranks = ranks or Ranks()
        self.num_parameters = sum(parameter.numel() for parameter in task.model.parameters())
        self._pulse = pulse
        self._rung_places = tuple(rungs)
        self._best_weights = BestWeights()
        self._position = _Position()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._began = time.perf_counter()
        self._is_partial = any(not parameter.requires_grad for parameter in task.model.parameters())
        self._order = np.random.default_rng(seed)
        self._model: nn.Module = task.model.to(device)
        self._trained = {name: value for name, value in self._model.named_parameters() if value.requires_grad}
        self.average = WeightAverage(self._trained, settings.weight_average or 0.0)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if settings.compile:
            self._model.compile()
        trained = sum(value.numel() for value in self._trained.values())
        self._states = RunStates(folder, earlier, origin=origin, ranks=self._ranks, trained=trained)
        # None of these refers back to the trainer: it must be gone as soon as a run has failed, and its connections
        # with it, or the other processes wait for this one.
        self._steps = Steps(task, settings, self._trained, device=device, folder=folder, ranks=self._ranks)
        self.schedule = Schedule(
            settings,
            self.total_steps,
            time_left=time_left,
            agree=partial(_agree, self._ranks),
        )
        self.evaluator = Evaluator(
            task,
            self._model,
            device=device,
            ranks=self._ranks,
            is_half=self._steps.is_half,
            pulse=pulse,
            on_full_memory=partial(begin_smaller, folder, self._ranks, 0),
            part=validation_part,
        )

    @property
    def precision(self) -> dict[str, str]:
        """Number formats; see `steps.precision`."""
        return self._steps.precision

    @property
    def micro_batch_size(self) -> int:
        """Examples in memory at once."""
        return self._steps.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.task.num_examples["train"] / self.settings.batch_size)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.settings.num_epochs

    @property
    def evaluation_steps(self) -> list[int]:
        """Steps within an epoch after which validation loss is taken; the last is the end of the epoch."""
        wanted = self.settings.evaluations_per_epoch or 1
        return sorted({max(1, round(part * self.steps_per_epoch / wanted)) for part in range(1, wanted + 1)})

    @property
    def total_evaluations(self) -> int:
        return len(self.evaluation_steps) * self.settings.num_epochs

    @cached_property
    def rungs(self) -> dict[int, int]:
        """The rung of each evaluation that is the first at or after one; of those that fall together the highest."""
        epochs = [
            epoch + step / self.steps_per_epoch
            for epoch in range(self.settings.num_epochs)
            for step in self.evaluation_steps
        ]
        found: dict[int, int] = {}
        for rung, part in enumerate(self._rung_places):
            for evaluation, epoch in enumerate(epochs[:-1], start=1):
                # Within an epoch there is no score to compare.
                if epoch >= part * self.settings.num_epochs and (self.objective == "loss" or epoch == int(epoch)):
                    found[evaluation] = rung
                    break
        return found

    @property
    def seconds(self) -> float:
        """Device-seconds of the run so far, those before it was resumed included."""
        return self._position.seconds + self._ranks.size * (time.perf_counter() - self._began)

    def points(self) -> Generator[Point]:
        """Train to the end, yielding a Point per evaluation; those of a resumed run's past come first.

        Close it to stop early. Raises OutOfMemoryError, SmallerMicroBatchError, PreemptedError, DiskFullError.
        """
        try:
            yield from self._train()
        finally:
            self._steps.forget()

    def _train(self) -> Generator[Point]:
        position = self._resume()
        for point in list(self.curve):
            if (yield from self._hand_out(point)):
                return
        evaluation_steps = set(self.evaluation_steps)
        while position.epoch < self.settings.num_epochs:
            self._model.train()
            order = self._order.bit_generator.state
            batches = self.task.epoch_batches(self._order, self.settings.batch_size)
            while position.step_in_epoch < len(batches):
                asked = Order(self._ranks.largest(self._pulse()))
                if asked is Order.PREEMPT:
                    self._checkpoint(order)
                    raise PreemptedError
                if asked is Order.TIME_UP:
                    if position.loss_count and (self.best is None or self.schedule.is_shortened):
                        yield from self._hand_out(self._evaluate_now())
                    return
                self._steps.set_learning_rate(self.schedule.advance(position.step))
                batch_loss, count = self._step(batches[position.step_in_epoch])
                self._loss_sum += batch_loss
                position.loss_count += count
                position.tokens += count
                position.step += 1
                position.step_in_epoch += 1
                self.average.update(position.step)
                if position.step_in_epoch not in evaluation_steps:
                    continue
                point = self._evaluate_now()
                if point.evaluation in self.rungs or self._states.is_due():
                    self._checkpoint(order)
                if (yield from self._hand_out(point)):
                    return
                self._model.train()
            position.epoch += 1
            position.step_in_epoch = 0

    def _hand_out(self, point: Point) -> Generator[Point, None, bool]:
        """Yield a point; returns whether the run was stopped at it, which all processes learn from the first."""
        was_closed = True
        try:
            yield point
            was_closed = False
        finally:
            is_stopped = bool(self._ranks.largest(was_closed and not self._ranks.rank))
        return is_stopped

    def _evaluate_now(self) -> Point:
        """A point of the curve at this step."""
        position = self._position
        position.evaluation += 1
        takes_score = self.objective != "loss" and position.step_in_epoch == self.steps_per_epoch
        with self.average.in_place():
            point = Point(
                evaluation=position.evaluation,
                epoch=position.epoch + position.step_in_epoch / self.steps_per_epoch,
                step=position.step,
                train_loss=self._ranks.add(self._loss_sum).item() / position.loss_count,
                valid_loss=self.evaluator.mean_loss(),
                learning_rate=self.schedule.learning_rate(max(0, position.step - 1)),
                tokens=position.tokens,
                valid_score=self._validation_score() if takes_score else None,
                seconds=self.seconds,
            )
            self.curve.append(point)
            if self._is_better(point):
                self._keep(point)
        self._loss_sum.zero_()
        position.loss_count = 0
        return point

    def settle(self, last: Point) -> None:
        """Make the last point the best one if a run was stopped before its first validation score."""
        if self.best is None and self.objective != "loss" and math.isfinite(last.valid_loss):
            self._ranks.tell(b"judge")
            with self.average.in_place():
                self._keep(replace(last, valid_score=self._validation_score()))

    def recover_best(self) -> bool:
        """Take the best checkpoint from the newest state of the run, to be scored or exported; whether there is one."""
        self._resume()
        self._steps.forget()
        return self.best is not None

    def score(self) -> Scored:
        """Restore the best checkpoint and score it on the test split, once. Needs a best checkpoint."""
        assert self.best is not None
        self._ranks.tell(b"score")
        self.restore_best()
        return self._score()

    def restore_best(self) -> None:
        """Make the weights of the best checkpoint the model's."""
        self._restore(self._best_weights.tensors)

    def follow(self) -> None:
        """What all processes but the first do after `points`: their part of its `settle` and `score`."""
        while command := self._ranks.tell():
            if command == b"score":
                self._score()
            else:
                with self.average.in_place():
                    self._validation_score()

    def dismiss(self) -> None:
        """Tell the others, who `follow`, that the run is over."""
        self._ranks.tell(b"")

    def _score(self) -> Scored:
        self._ranks.spread(self._weights().values())
        self.confirmed_loss = self.evaluator.whole_loss()
        return self.task.score(self.evaluator.evaluate)

    def export(self) -> None:
        """Leave the best model in the run's folder, as `write_model` does. After `score`.

        Raises DiskFullError, and LeaseLostError when the folder has been removed.
        """
        if not storage.names(self.folder):
            raise LeaseLostError(f"{self.folder} was removed: another launch has taken its trial over")
        try:
            with storage.filled(self.folder) as place:
                self.write_model(place)
        except Exception as error:
            # safetensors has errors of its own, in words.
            if "No space left on device" not in str(error):
                raise
            needed = sum(value.numel() * value.element_size() for value in self.task.model.parameters())
            raise DiskFullError(self.folder, needed) from error

    def write_model(self, place: Path) -> None:
        """Write the model as it stands, adapters merged, as a folder that transformers loads."""
        if self._is_partial:
            architecture.merge_adapters(self.task.model)
        # transformers knows which of two tied weights other heads will look for.
        self.task.model.save_pretrained(place)
        self.task.save(str(place))

    def _validation_score(self) -> float:
        assert isinstance(self.task, ScoredTask)
        return self.task.validation_score(self.evaluator.evaluate)

    def _is_better(self, point: Point) -> bool:
        if not math.isfinite(point.valid_loss):
            return False
        if self.objective == "loss":
            return self.best is None or point.valid_loss < self.best.valid_loss
        if point.valid_score is None:
            return False
        return self.best is None or point.valid_score > (self.best.valid_score or 0.0)

    def _step(self, indices: Indices) -> tuple[Tensor, int]:
        """One optimizer step over a whole batch; returns its summed loss (on the device) and predicted tokens."""
        return self._steps.step(indices)

    def _keep(self, point: Point) -> None:
        """Make these weights the best so far, in memory; `_checkpoint` brings them to the disk."""
        self.best = point
        if self._ranks.rank:
            return
        self._best_weights.keep(self._weights(), is_gpu=self.device.type == "cuda")

    def _weights(self) -> dict[str, Tensor]:
        """What training changes, each shared tensor once; of a model that is frozen in part, only the rest."""
        return {**self._trained, **dict(self._model.named_buffers())}

    @torch.no_grad()
    def _restore(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in self._weights().items():
            value.copy_(weights[name])

    # Checkpoints

    def _checkpoint(self, order: Mapping[str, Any]) -> None:
        """Write the state of the run. `order` is that of the data at the beginning of this epoch."""
        began = time.perf_counter()
        loss_sum = self._ranks.add(self._loss_sum.clone()).item()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the best weights may be on their way
        torch_states = random_states.torch_states(self.device, self._ranks.gather)
        if self._ranks.rank:
            return
        tensors = {f"model.{name}": value for name, value in self._weights().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.tensors.items()}
        facts = {
            "position": {**asdict(self._position), "seconds": self.seconds},
            "loss_sum": loss_sum,
            "micro_batch_size": self.micro_batch_size,
            "best_point": asdict(self.best) if self.best else None,
            "curve": [asdict(point) for point in self.curve],
            "order": order,
            **random_states.python_states(),
        }
        tensors = {**tensors, **self._steps.state(), **torch_states}
        best_step = self.best.step if self.best else None
        self._states.write(self._position.step, tensors, facts, self._best_weights, best_step=best_step, began=began)

    def _resume(self) -> _Position:
        """Resume from the newest whole state of this run, if there is one; returns where the run is then."""
        self._began = time.perf_counter()
        found = self._states.find()
        if found is not None:
            self._restore_state(found)
        if found is not None and not self._ranks.rank:
            LOGGER.info("resumes from step %d, evaluation %d", self._position.step, self.resumed_evaluations)
        self._steps.shrink(self._states.earlier)
        self.schedule.begin_at(self._position.step)
        return self._position

    def _restore_state(self, found: Found) -> None:
        tensors, facts = found.tensors, found.facts
        self._restore(checkpoints.below(tensors, "model."))
        self.average.restore(checkpoints.below(tensors, "average."))
        self._steps.restore(tensors)
        self._steps.micro_batch_size = facts["micro_batch_size"]
        self._position = _Position(**facts["position"])
        self._loss_sum.fill_(0.0 if self._ranks.rank else facts["loss_sum"])
        self.curve = [Point(**point) for point in facts["curve"]]
        self.resumed_evaluations = len(self.curve)
        self.best = Point(**facts["best_point"]) if facts["best_point"] else None
        self._best_weights.tensors = found.best
        self._order.bit_generator.state = facts["order"]
        random_states.restore(tensors, facts, rank=self._ranks.rank, device=self.device)


def _agree(ranks: Ranks, value: int) -> int:
    """The number of the first process, in all of them."""
    return ranks.largest(0 if ranks.rank else value)
