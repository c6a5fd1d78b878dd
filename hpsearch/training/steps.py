"""Optimizer steps over whole batches, whatever fits into memory at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hpsearch.files import storage
from hpsearch.files.storage import Folder
from hpsearch.files.trial_log import LOGGER
from hpsearch.models import architecture
from hpsearch.models.kernels import CheapDropout
from hpsearch.spec.settings import RunSettings
from hpsearch.tasks.base import Batch, Indices, Task
from hpsearch.training import checkpoints, torch_internals
from hpsearch.training.devices import has_bfloat16
from hpsearch.training.evaluation import OutOfMemoryError, is_out_of_memory
from hpsearch.training.optimizing.optimizers import Optimizers, make_optimizers
from hpsearch.training.ranks import Ranks

MICRO_BATCH = "micro-batch.txt"
"""File in the folder of an attempt that ran out of memory on one of several devices: what the next one begins with."""


class SmallerMicroBatchError(Exception):
    """One of several processes ran out of memory: the run must start again, which it does in smaller micro-batches."""


def precision(settings: RunSettings, device: torch.device) -> dict[str, str]:
    """The number format of the `model`'s products, and of those of `muon`, on this device.

    By itself that is bfloat16 on GPUs that have it natively, and float32 elsewhere: on a CPU with the instructions Muon
    would take a fifth less time for them, a fiftieth of a step, and runs would differ from machine to machine.
    """
    fast = "bfloat16" if device.type == "cuda" and has_bfloat16(device) else "float32"
    return {"model": fast if settings.precision == "auto" else settings.precision, "muon": fast}


class _Loss(nn.Module):
    """The summed loss of a batch as a module, so that it can be replicated."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(self, batch: Batch) -> Tensor:
        return self._task.losses(batch).sum()


class Steps:
    """Makes the steps of a run on one of its `ranks`: forward, backward, clipping, optimizers.

    Losses are summed and divided by what is predicted in the whole batch, so that micro-batches change nothing.
    """

    def __init__(
        self,
        task: Task,
        settings: RunSettings,
        trained: Mapping[str, nn.Parameter],
        *,
        device: torch.device,
        folder: Folder,
        ranks: Ranks,
    ) -> None:
        self._task = task
        self._settings = settings
        self._device = device
        self._folder = folder
        self._ranks = ranks
        share = math.ceil(settings.batch_size / ranks.size)
        self.micro_batch_size = min(settings.micro_batch_size or share, share)
        """Examples in memory at once; halved when it runs out."""
        self.precision = precision(settings, device)
        self.is_half = self.precision["model"] == "bfloat16"
        dtype = getattr(torch, self.precision["muon"])
        self._optimizers: Optimizers = make_optimizers(task.model, trained.values(), settings, muon_dtype=dtype)
        self._loss = ranks.replicate(_Loss(task))
        has_dropout = device.type == "cpu" and not settings.compile and architecture.has_dropout(task.model)
        self._dropout: AbstractContextManager[Any] = CheapDropout() if has_dropout else nullcontext()

    def set_learning_rate(self, learning_rate: float) -> None:
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

    def step(self, indices: Indices) -> tuple[Tensor, int]:
        """One optimizer step over a whole batch; returns its summed loss (on the device) and predicted tokens.

        Raises OutOfMemoryError, SmallerMicroBatchError.
        """
        while True:
            for optimizer in self._optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            try:
                return self._accumulate_and_step(indices)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self._ranks.size > 1:
                    # The others wait within their step for gradients that do not come.
                    raise begin_smaller(self._folder, self._ranks, self.micro_batch_size // 2, error) from error
                if self.micro_batch_size == 1:
                    raise OutOfMemoryError(str(error).splitlines()[0]) from error
            self.micro_batch_size = math.ceil(self.micro_batch_size / 2)
            LOGGER.warning("out of memory; continues in micro-batches of %d", self.micro_batch_size)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def shrink(self, earlier: list[Folder]) -> None:
        """Heed what earlier attempts have learnt about memory. Raises OutOfMemoryError when it is that nothing fits."""
        learnt = [int(said) for place in earlier if (said := storage.read(place / MICRO_BATCH))]
        self.micro_batch_size = min([self.micro_batch_size, *learnt])
        if not self.micro_batch_size:
            raise OutOfMemoryError(f"on each of {self._ranks.size} devices")

    def forget(self) -> None:
        """Free the optimizers' states: no step is made any more."""
        self._optimizers = {}

    def state(self) -> dict[str, Tensor]:
        """Of the optimizers, by `OPTIMIZER.NUMBER.NAME`."""
        return {
            f"{kind}.{number}.{name}": value
            for kind, optimizer in self._optimizers.items()
            for number, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the optimizers' states out of the tensors of a checkpoint."""
        for kind, optimizer in self._optimizers.items():
            parts: dict[int, dict[str, Tensor]] = {}
            for name, value in checkpoints.below(tensors, f"{kind}.").items():
                number, _, part = name.partition(".")
                parts.setdefault(int(number), {})[part] = value
            optimizer.load_state_dict({"state": parts, "param_groups": optimizer.state_dict()["param_groups"]})

    def _accumulate_and_step(self, indices: Indices) -> tuple[Tensor, int]:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        count = self._task.predicted("train", indices)
        own = indices[self._ranks.rank :: self._ranks.size]
        counts = bool(len(own))
        if not counts:
            own = indices[:1]  # the others wait for gradients, if only for zeros
        for start in range(0, len(own), self.micro_batch_size):
            batch = self._task.batch("train", own[start : start + self.micro_batch_size]).to(self._device)
            is_last = start + self.micro_batch_size >= len(own)
            with nullcontext() if is_last else self._ranks.without_sync(self._loss):
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self.is_half), self._dropout:
                    loss = self._loss(batch) if counts else 0.0 * self._loss(batch)
                loss.backward()
            total += loss.detach()
        parameters = list(self._task.model.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch_internals.div_(gradients, count / self._ranks.size)
        if self._settings.gradient_clip:
            nn.utils.clip_grad_norm_(parameters, self._settings.gradient_clip)
        for optimizer in self._optimizers.values():
            optimizer.step()
        return total, count


def begin_smaller(folder: Folder, ranks: Ranks, size: int, error: BaseException) -> SmallerMicroBatchError:
    """Note what the next attempt begins with; returns the error that ends this one."""
    checkpoints.write_whole(folder / MICRO_BATCH, str(size).encode())
    remedy = f"continues in micro-batches of {size}" if size else "not even one example fits"
    said = str(error).splitlines()[0]
    return SmallerMicroBatchError(f"out of memory in one of {ranks.size} processes; {remedy} ({said})")
