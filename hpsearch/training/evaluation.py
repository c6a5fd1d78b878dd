"""Losses and scores of a split, in parts that fit in memory, shared by the processes of a run."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpsearch.tasks.base import Batch, Indices, Task
from hpsearch.training.ranks import Ranks


class OutOfMemoryError(Exception):
    """The run does not fit in memory, not even one example at a time."""


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class Evaluator:
    """Evaluates a model that is being trained."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        *,
        device: torch.device,
        ranks: Ranks,
        is_half: bool,
        pulse: Callable[[], Any],
        on_full_memory: Callable[[BaseException], Exception],
        part: float = 1.0,
    ) -> None:
        """`pulse` is called after every batch; `on_full_memory` makes the error of one of several processes. `part` of
        the validation split is looked at while the model trains.
        """
        self._task = task
        self.part = part
        self._model = model
        self._device = device
        self._ranks = ranks
        self._is_half = is_half
        self._pulse = pulse
        self._on_full_memory = on_full_memory

    def mean_loss(self) -> float:
        """Of the part of the validation split that is looked at: nats per predicted token (or text)."""
        return self._mean_loss(_spread(self._task.evaluation_batches("validation"), self.part))

    def whole_loss(self) -> float | None:
        """Of all of the validation split; None when `mean_loss` is of all of it."""
        if self.part == 1.0:
            return None
        return self._mean_loss(self._task.evaluation_batches("validation"))

    def _mean_loss(self, batches: Sequence[Indices]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in self._own(batches):
            for _, loss in self._compute("validation", batch, self._summed_loss):
                total += loss
        return self._ranks.add(total).item() / sum(self._task.predicted("validation", batch) for batch in batches)

    def evaluate(self, split: str, compute: Callable[[Batch], Tensor]) -> Iterator[tuple[Indices, Tensor]]:
        """What `compute` gives for each evaluation batch of a split, in order. See `tasks.base.Evaluate`."""
        batches = self._task.evaluation_batches(split)
        if self._ranks.size == 1:
            for batch in batches:
                yield from self._compute(split, batch, compute)
            return
        answers = [list(self._compute(split, batch, compute)) for batch in self._own(batches)]
        by_rank = [_unpacked(content) for content in self._ranks.gather(_packed(answers))]
        for number in range(len(batches)):
            yield from by_rank[number % self._ranks.size][number // self._ranks.size]

    def _summed_loss(self, batch: Batch) -> Tensor:
        return self._task.losses(batch).sum(dtype=torch.float64)

    def _own(self, batches: Sequence[Indices]) -> Sequence[Indices]:
        """The batches that this process evaluates."""
        return batches[self._ranks.rank :: self._ranks.size]

    @torch.no_grad()
    def _compute(
        self, split: str, batch: Indices, compute: Callable[[Batch], Tensor]
    ) -> Iterator[tuple[Indices, Tensor]]:
        """Without dropout, in as many parts as fit in memory."""
        self._model.eval()
        waiting = [batch]
        while waiting:
            indices = waiting.pop()
            try:
                there = self._task.batch(split, indices).to(self._device)
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_half):
                    answer = compute(there)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(indices) == 1 and self._ranks.size > 1:
                    raise self._on_full_memory(error) from error
                if len(indices) == 1:
                    raise OutOfMemoryError(str(error).splitlines()[0]) from error
                half = math.ceil(len(indices) / 2)
                waiting += [indices[half:], indices[:half]]
                continue
            self._pulse()
            yield indices, answer


def _spread(batches: Sequence[Indices], part: float) -> Sequence[Indices]:
    """A part of the indices, from everywhere among them.

    Those of neighbouring batches are joined up to the size of the last of them, which fits into memory at its longest.
    """
    if part == 1.0:
        return batches
    total = sum(map(len, batches))
    count = max(1, round(part * total))
    places = np.arange(count) * total // count
    found: list[Indices] = []
    start = 0
    for batch in batches:
        inside = places[(places >= start) & (places < start + len(batch))] - start
        start += len(batch)
        if not len(inside):
            continue
        if found and len(found[-1]) + len(inside) <= len(batch):
            found[-1] = np.concatenate([found[-1], batch[inside]])
        else:
            found.append(batch[inside])
    return found


Answers = list[list[tuple[Indices, Tensor]]]
"""What a process found for each of its evaluation batches, in parts."""


def _packed(answers: Answers) -> bytes:
    arrays: dict[str, Any] = {}
    for number, parts in enumerate(answers):
        for part, (indices, answer) in enumerate(parts):
            arrays[f"{number}.{part}.indices"] = indices
            arrays[f"{number}.{part}.answer"] = answer.cpu().numpy()
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def _unpacked(content: bytes) -> Answers:
    answers: Answers = []
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for name in arrays.files:
            number, _, kind = name.split(".")
            if kind == "indices":
                indices = arrays[name]
                continue
            while len(answers) <= int(number):
                answers.append([])
            answers[int(number)].append((indices, torch.from_numpy(arrays[name])))
    return answers
