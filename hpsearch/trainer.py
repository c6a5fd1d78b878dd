"""The training loop, the same for every task: settings and a task in, one Point per evaluation out.

Knows nothing of Optuna, Ray or SQL. Losses are summed and divided by the number of predicted tokens of the whole
batch, so that accumulation over micro-batches changes nothing; when memory runs out the micro-batch is halved and the
sampled batch size stays. No value is read from the device between two evaluations. A run resumes from its last
checkpoint with weights, optimizer, schedule, random states and data order as they were: on a CPU its curve is equal to
the bit.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpsearch import checkpoints
from hpsearch.errors import DiskFullError, LeaseLostError
from hpsearch.settings import Objective, RunSettings
from hpsearch.tasks import architecture
from hpsearch.tasks.base import Batch, Indices, Scored, ScoredTask, Task
from hpsearch.trial import Point
from hpsearch.trial_log import LOGGER

CHECKPOINT_SHARE = 0.05
"""Part of a run's time that resumable states may take: where one takes long to write, fewer are written."""


class Order(Enum):
    """What the outside asks of a run between two steps."""

    GO_ON = "go on"
    PREEMPT = "preempt"
    """Write a checkpoint and leave."""
    TIME_UP = "time up"
    """End here, with what has been learnt."""


class PreemptedError(Exception):
    """The run was asked to leave; it can be resumed from where it was."""


@dataclass
class _Position:
    """Where a run is: all that is needed to go on, beside tensors."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    evaluation: int = 0
    tokens: int = 0
    loss_count: int = 0
    seconds: float = 0.0


class OutOfMemoryError(Exception):
    """The run does not fit in memory, not even one example at a time."""


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU that this process was given, if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpu_names() -> list[str]:
    """The GPUs that this process sees."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


class Trainer:
    """One run. `points()` trains it; `score()` then judges its best checkpoint on the test split."""

    def __init__(
        self,
        task: Task,
        settings: RunSettings,
        *,
        seed: int,
        device: torch.device,
        folder: Path,
        objective: Objective = "loss",
        earlier: Sequence[Path] = (),
        pulse: Callable[[], Order] = lambda: Order.GO_ON,
    ) -> None:
        """`earlier` are folders of interrupted attempts at this run, resumed from if they hold a state.

        `pulse` is called after every step and every evaluation batch; its answer counts between two steps.
        """
        self.task = task
        self.settings = settings
        self.device = device
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.objective = objective
        self.best: Point | None = None
        self.curve: list[Point] = []
        self.resumed_evaluations = 0
        """Points of the curve that come from the state that the run was resumed from."""
        self.micro_batch_size = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
        self.num_parameters = sum(parameter.numel() for parameter in task.model.parameters())
        self._pulse = pulse
        self._earlier = list(earlier)
        self._best_weights: dict[str, Tensor] = {}
        self._best_file: str | None = None
        self._best_of: dict[str, str | None] = {}
        self._position = _Position()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._began = self._saved = time.perf_counter()
        self._save_seconds = 0.0
        self._is_partial = any(not parameter.requires_grad for parameter in task.model.parameters())
        self._order = np.random.default_rng(seed)
        self._model: nn.Module = task.model.to(device)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self._half = settings.precision == "bfloat16" or (
            settings.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        if settings.compile:
            self._model.compile()

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

    @property
    def seconds(self) -> float:
        """Device-seconds of the run so far, those before it was resumed included."""
        return self._position.seconds + time.perf_counter() - self._began

    def points(self) -> Iterator[Point]:
        """Train to the end, yielding a Point per evaluation; those of a resumed run's past come first.

        Close the iterator to stop early. Raises OutOfMemoryError, PreemptedError, DiskFullError.
        """
        optimizer = self._optimizer()
        position = self._resume(optimizer)
        yield from list(self.curve)
        evaluation_steps = set(self.evaluation_steps)
        while position.epoch < self.settings.num_epochs:
            self._model.train()
            order = self._order.bit_generator.state
            batches = self.task.epoch_batches(self._order, self.settings.batch_size)
            while position.step_in_epoch < len(batches):
                asked = self._pulse()
                if asked is Order.PREEMPT:
                    self._checkpoint(optimizer, order)
                    raise PreemptedError
                if asked is Order.TIME_UP:
                    if self.best is None and position.loss_count:
                        yield self._evaluate_now()
                    return
                for group in optimizer.param_groups:
                    group["lr"] = self._learning_rate(position.step)
                batch_loss, count = self._step(optimizer, batches[position.step_in_epoch])
                self._loss_sum += batch_loss
                position.loss_count += count
                position.tokens += count
                position.step += 1
                position.step_in_epoch += 1
                if position.step_in_epoch not in evaluation_steps:
                    continue
                point = self._evaluate_now()
                if self._checkpoint_is_due():
                    self._checkpoint(optimizer, order)
                yield point
                self._model.train()
            position.epoch += 1
            position.step_in_epoch = 0

    def _evaluate_now(self) -> Point:
        """A point of the curve at this step."""
        position = self._position
        position.evaluation += 1
        valid_loss = self._mean_loss("validation")
        takes_score = self.objective != "loss" and position.step_in_epoch == self.steps_per_epoch
        point = Point(
            evaluation=position.evaluation,
            epoch=position.epoch + position.step_in_epoch / self.steps_per_epoch,
            step=position.step,
            train_loss=self._loss_sum.item() / position.loss_count,
            valid_loss=valid_loss,
            learning_rate=self._learning_rate(max(0, position.step - 1)),
            tokens=position.tokens,
            valid_score=self._validation_score() if takes_score else None,
            seconds=self.seconds,
        )
        self.curve.append(point)
        self._loss_sum.zero_()
        position.loss_count = 0
        if self._is_better(point):
            self._keep(point)
        return point

    def settle(self, last: Point) -> None:
        """Make the last point the best one if a run was stopped before its first validation score."""
        if self.best is None and self.objective != "loss" and math.isfinite(last.valid_loss):
            self._keep(replace(last, valid_score=self._validation_score()))

    def score(self) -> Scored:
        """Restore the best checkpoint and score it on the test split, once. Needs a best checkpoint."""
        assert self.best is not None
        self._restore(self._best_weights)
        return self.task.score(self._evaluate)

    def export(self) -> None:
        """Leave the best model as a folder that transformers loads. After `score`.

        Raises DiskFullError, and LeaseLostError when the folder has been removed.
        """
        if self._is_partial:
            architecture.merge_adapters(self.task.model)
        if not self.folder.is_dir():
            raise LeaseLostError(f"{self.folder} was removed: another launch has taken its trial over")
        try:
            # transformers knows which of two tied weights other heads will look for.
            self.task.model.save_pretrained(self.folder)
            self.task.save(str(self.folder))
        except Exception as error:
            # safetensors has errors of its own, in words.
            if "No space left on device" not in str(error):
                raise
            needed = sum(value.numel() * value.element_size() for value in self.task.model.parameters())
            raise DiskFullError(self.folder, needed) from error

    def _validation_score(self) -> float:
        assert isinstance(self.task, ScoredTask)
        return self.task.validation_score(self._evaluate)

    def _is_better(self, point: Point) -> bool:
        if not math.isfinite(point.valid_loss):
            return False
        if self.objective == "loss":
            return self.best is None or point.valid_loss < self.best.valid_loss
        if point.valid_score is None:
            return False
        return self.best is None or point.valid_score > (self.best.valid_score or 0.0)

    def _step(self, optimizer: torch.optim.Optimizer, indices: Indices) -> tuple[Tensor, int]:
        """One optimizer step over a whole batch; returns its summed loss (on the device) and predicted tokens."""
        while True:
            optimizer.zero_grad(set_to_none=True)
            try:
                return self._accumulate_and_step(optimizer, indices)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                if self.micro_batch_size == 1:
                    raise OutOfMemoryError(str(error).splitlines()[0]) from error
            self.micro_batch_size = math.ceil(self.micro_batch_size / 2)
            LOGGER.warning("out of memory; goes on in micro-batches of %d", self.micro_batch_size)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _accumulate_and_step(self, optimizer: torch.optim.Optimizer, indices: Indices) -> tuple[Tensor, int]:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for start in range(0, len(indices), self.micro_batch_size):
            batch = self.task.batch("train", indices[start : start + self.micro_batch_size]).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
                loss = self.task.losses(batch).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            count += batch.predicted
        parameters = list(self._model.parameters())
        torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], float(count))
        if self.settings.gradient_clip:
            nn.utils.clip_grad_norm_(parameters, self.settings.gradient_clip)
        optimizer.step()
        return total, count

    def _mean_loss(self, split: str) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for _, (loss, predicted) in self._evaluate(
            split, lambda batch: (self.task.losses(batch).sum(dtype=torch.float64), batch.predicted)
        ):
            total += loss
            count += predicted
        return total.item() / count

    @torch.no_grad()
    def _evaluate(self, split: str, compute: Callable[[Batch], Any]) -> Iterator[tuple[Indices, Any]]:
        """What `compute` gives for each evaluation batch of a split, without dropout. See `tasks.base.Evaluate`."""
        self._model.eval()
        waiting = self.task.evaluation_batches(split)[::-1]
        while waiting:
            indices = waiting.pop()
            try:
                batch = self.task.batch(split, indices).to(self.device)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
                    answer = compute(batch)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                if len(indices) == 1:
                    raise OutOfMemoryError(str(error).splitlines()[0]) from error
                half = math.ceil(len(indices) / 2)
                waiting += [indices[half:], indices[:half]]
                continue
            self._pulse()
            yield indices, answer

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW (Loshchilov & Hutter, 2019); biases, gains and other vectors are not decayed."""
        settings = self.settings
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            fused=True,
        )

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up to the peak, then the schedule down to `final_lr_fraction` of it at the last step."""
        settings = self.settings
        warmup = round(settings.warmup_fraction * self.total_steps)
        if step < warmup:
            return settings.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.total_steps - 1 - warmup)
        decay = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[settings.schedule]
        floor = settings.final_lr_fraction if settings.schedule != "constant" else 1.0
        return settings.learning_rate * (floor + (1.0 - floor) * decay)

    def _keep(self, point: Point) -> None:
        """Make these weights the best so far, in memory; `_checkpoint` brings them to the disk."""
        self.best = point
        self._best_weights = {name: value.detach().to("cpu", copy=True) for name, value in self._weights().items()}
        self._best_file = None

    def _weights(self) -> dict[str, Tensor]:
        """What training changes, each shared tensor once; of a model that is frozen in part, only the rest."""
        trained = {name: value for name, value in self._model.named_parameters() if value.requires_grad}
        return {**trained, **dict(self._model.named_buffers())}

    @torch.no_grad()
    def _restore(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in self._weights().items():
            value.copy_(weights[name])

    # Checkpoints

    def _checkpoint_is_due(self) -> bool:
        return CHECKPOINT_SHARE * (time.perf_counter() - self._saved) >= self._save_seconds

    def _checkpoint(self, optimizer: torch.optim.Optimizer, order: Mapping[str, Any]) -> None:
        """Write the state of the run, and the best weights that it names; keep it and the state before it."""
        began = time.perf_counter()
        step = self._position.step
        if self.best is not None and self._best_file is None:
            self._best_file = checkpoints.write(self.folder, "best", self.best.step, self._best_weights, {})
        numpy_state = np.random.get_state(legacy=False)
        words = numpy_state["state"]
        tensors = {f"model.{name}": value for name, value in self._weights().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        tensors["random.torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        facts = {
            "position": {**asdict(self._position), "seconds": self.seconds},
            "loss_sum": self._loss_sum.item(),
            "micro_batch_size": self.micro_batch_size,
            "best_point": asdict(self.best) if self.best else None,
            "best_file": self._best_file,
            "curve": [asdict(point) for point in self.curve],
            "order": order,
            "random_python": random.getstate(),
            "random_numpy": {**numpy_state, "state": {**words, "key": words["key"].tolist()}},
        }
        last = checkpoints.names(self.folder, "resume")[-1:]
        name = checkpoints.write(self.folder, "resume", step, tensors, facts)
        self._forget_others([*last, name])
        if last:
            # Two states of this attempt stand: those of earlier ones have done their service.
            for folder in self._earlier:
                shutil.rmtree(folder, ignore_errors=True)
            self._earlier = []
        self._saved = time.perf_counter()
        self._save_seconds = self._saved - began

    def _forget_others(self, states: Sequence[str]) -> None:
        """Remove all checkpoint files but these states and the best weights that they name."""
        self._best_of = {name: self._best_of.get(name, self._best_file) for name in states}
        bests = [best for best in self._best_of.values() if best is not None]
        checkpoints.forget(self.folder, keep=[*states, *bests])

    def _resume(self, optimizer: torch.optim.Optimizer) -> _Position:
        """Take up the newest whole state of this run, if there is one; returns where the run is then."""
        self._began = self._saved = time.perf_counter()
        for folder, (tensors, facts) in checkpoints.newest(self._earlier):
            best = checkpoints.read(folder / facts["best_file"]) if facts["best_file"] else None
            if facts["best_file"] and best is None:
                continue  # the state before this one may still have its best weights
            self._take_up(optimizer, tensors, facts, best[0] if best else {})
            LOGGER.info("goes on from step %d, evaluation %d", self._position.step, self.resumed_evaluations)
            break
        return self._position

    def _take_up(
        self,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        best: dict[str, Tensor],
    ) -> None:
        self._restore(_below(tensors, "model."))
        parts: dict[int, dict[str, Tensor]] = {}
        for name, value in _below(tensors, "optimizer.").items():
            number, _, part = name.partition(".")
            parts.setdefault(int(number), {})[part] = value
        optimizer.load_state_dict({"state": parts, "param_groups": optimizer.state_dict()["param_groups"]})
        self._position = _Position(**facts["position"])
        self._loss_sum.fill_(facts["loss_sum"])
        self.micro_batch_size = facts["micro_batch_size"]
        self.curve = [Point(**point) for point in facts["curve"]]
        self.resumed_evaluations = len(self.curve)
        self.best = Point(**facts["best_point"]) if facts["best_point"] else None
        self._best_weights = best
        self._order.bit_generator.state = facts["order"]
        torch.set_rng_state(tensors["random.torch"])
        if "random.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        version, internal, gauss = facts["random_python"]
        random.setstate((version, tuple(internal), gauss))
        numpy_state = facts["random_numpy"]
        key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
        np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
