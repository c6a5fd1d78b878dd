"""The training loop, the same for every task: settings and a task in, one Point per evaluation out.

Knows nothing of Optuna, Ray or SQL. Losses are summed and divided by the number of predicted tokens of the whole
batch, so that accumulation over micro-batches changes nothing; when memory runs out the micro-batch is halved and the
sampled batch size stays. No value is read from the device between two evaluations.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from hpsearch.settings import Objective, RunSettings
from hpsearch.tasks import architecture
from hpsearch.tasks.base import Batch, Indices, Scored, ScoredTask, Task
from hpsearch.trial import Point

CHECKPOINT = "model.safetensors"


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
    ) -> None:
        self.task = task
        self.settings = settings
        self.device = device
        self.folder = folder
        self.objective = objective
        self.best: Point | None = None
        self.micro_batch_size = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
        self.num_parameters = sum(parameter.numel() for parameter in task.model.parameters())
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

    def points(self) -> Iterator[Point]:
        """Train to the end, yielding a Point per evaluation; the best so far is on disk before it is yielded.

        Close the iterator to stop early. Raises OutOfMemoryError.
        """
        optimizer = self._optimizer()
        started = time.perf_counter()
        evaluation_steps = set(self.evaluation_steps)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        loss_count = step = evaluation = tokens = 0
        for epoch in range(self.settings.num_epochs):
            self._model.train()
            batches = self.task.epoch_batches(self._order, self.settings.batch_size)
            for step_in_epoch, indices in enumerate(batches, start=1):
                learning_rate = self._learning_rate(step)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                batch_loss, count = self._step(optimizer, indices)
                loss_sum += batch_loss
                loss_count += count
                tokens += count
                step += 1
                if step_in_epoch not in evaluation_steps:
                    continue
                evaluation += 1
                valid_loss = self._mean_loss("validation")
                takes_score = self.objective != "loss" and step_in_epoch == self.steps_per_epoch
                point = Point(
                    evaluation=evaluation,
                    epoch=epoch + step_in_epoch / self.steps_per_epoch,
                    step=step,
                    train_loss=loss_sum.item() / loss_count,
                    valid_loss=valid_loss,
                    learning_rate=learning_rate,
                    tokens=tokens,
                    valid_score=self._validation_score() if takes_score else None,
                    seconds=time.perf_counter() - started,
                )
                if self._is_better(point):
                    self._keep(point)
                yield point
                loss_sum.zero_()
                loss_count = 0
                self._model.train()

    def settle(self, last: Point) -> None:
        """Make the last point the best one if a run was stopped before its first validation score."""
        if self.best is None and self.objective != "loss" and math.isfinite(last.valid_loss):
            self._keep(replace(last, valid_score=self._validation_score()))

    def score(self) -> Scored:
        """Restore the best checkpoint and score it on the test split, once. Needs a best checkpoint."""
        assert self.best is not None
        if self._is_partial:
            self._model.load_state_dict(load_file(self.folder / CHECKPOINT, device=str(self.device)), strict=False)
        else:
            load_model(self._model, self.folder / CHECKPOINT, device=str(self.device))
        return self.task.score(self._evaluate)

    def export(self) -> None:
        """Leave the best model as a folder that transformers loads. After `score`."""
        if self._is_partial:
            architecture.merge_adapters(self.task.model)
        # What was kept may be the trained part alone; nothing of it may stand beside the whole.
        (self.folder / CHECKPOINT).unlink()
        # transformers knows which of two tied weights other heads will look for.
        self.task.model.save_pretrained(self.folder)
        self.task.save(str(self.folder))

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
        """Make these weights the best so far. Of a model that is frozen in part, only what is trained is written."""
        self.best = point
        if self._is_partial:
            trained: dict[str, Tensor] = {
                name: value for name, value in self._model.named_parameters() if value.requires_grad
            }
            self._write(lambda file: save_file(trained, file))
        else:
            self._write(lambda file: save_model(self._model, file, metadata={"format": "pt"}))

    def _write(self, save: Callable[[str], None]) -> None:
        """The old file stands until the new one is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f".{CHECKPOINT}"
        save(str(scratch))
        os.replace(scratch, self.folder / CHECKPOINT)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
