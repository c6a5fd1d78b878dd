"""The resumable states of a run on disk, and the best weights that they name."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpsearch.files import storage
from hpsearch.files.storage import Folder, locate
from hpsearch.files.trial_log import LOGGER
from hpsearch.training import checkpoints
from hpsearch.training.ranks import Ranks

CHECKPOINT_SHARE = 0.05
"""Part of a run's time that resumable states may take: where one takes long to write, fewer are written."""
STATE_BYTES = 20
"""Of a state for each weight that is trained: itself, two moments, its average, and that at its best."""
DISK_SPEED = 500e6
"""Bytes a second that a disk is taken to write until it has been seen to."""


class BestWeights:
    """The best weights of a run so far: in memory, and on disk from the next state on."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.file: str | None = None
        """Their checkpoint file, once it is written."""

    def keep(self, weights: Mapping[str, Tensor], *, is_gpu: bool) -> None:
        """Copy these weights, in place of the best before."""
        for name, value in weights.items():
            there = self.tensors.get(name)
            if there is None or not is_gpu or not there.is_pinned():
                there = torch.empty_like(value, device="cpu", pin_memory=is_gpu)
            # From a GPU in the order of its stream, before the next step changes the weights.
            self.tensors[name] = there.copy_(value.detach(), non_blocking=True)
        self.file = None


@dataclass(frozen=True)
class Found:
    """A state that a run resumes from."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    best: dict[str, Tensor]
    """The best weights; empty in all processes of a run but the first."""


class RunStates:
    """Writes the states of a run, keeps the last two, and finds the one to resume from.

    Of several processes the first writes and finds; all must ask.
    """

    def __init__(self, folder: Folder, earlier: Sequence[Folder], *, origin: str, ranks: Ranks, trained: int) -> None:
        """`earlier` are folders of interrupted attempts; a state of another `origin` is left alone.

        `trained` weights say how long the first state will take to write.
        """
        self._folder = folder
        self.earlier = list(earlier)
        self._origin = origin
        self._ranks = ranks
        self._saved = time.perf_counter()
        self._save_seconds = STATE_BYTES * trained / DISK_SPEED
        self._best_of: dict[str, str | None] = {}

    def is_due(self) -> bool:
        """Whether enough time has passed since the last state."""
        is_due = CHECKPOINT_SHARE * (time.perf_counter() - self._saved) >= self._save_seconds
        return bool(self._ranks.largest(is_due and not self._ranks.rank))

    def write(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        best: BestWeights,
        *,
        best_step: int | None,
        began: float,
    ) -> None:
        """Write a state, and the best weights that it names; keep it and the one before. `began` is when it was begun.

        Called by the first process alone. Raises DiskFullError, RunFolderError, LeaseLostError.
        """
        if best_step is not None and best.file is None:
            best.file = checkpoints.write(self._folder, "best", best_step, best.tensors, {})
        facts = {**facts, "origin": self._origin, "best_file": best.file}
        last = checkpoints.names(self._folder, "resume")[-1:]
        name = checkpoints.write(self._folder, "resume", step, tensors, facts)
        self._forget_others([*last, name], best.file)
        if last:
            # Two states of this attempt stand: those of earlier ones have done their service.
            for folder in self.earlier:
                storage.remove(folder)
            self.earlier = []
        self._saved = time.perf_counter()
        self._save_seconds = self._saved - began

    def find(self) -> Found | None:
        """The newest whole state of this run in its earlier attempts."""
        self._saved = time.perf_counter()
        return self._as_told() if self._ranks.rank else self._newest()

    def _newest(self) -> Found | None:
        for file, (tensors, facts) in checkpoints.newest(self.earlier):
            if facts.get("origin", self._origin) != self._origin:
                LOGGER.warning("checkpoint %s belongs to another run; it is left alone", file)
                continue
            best = checkpoints.read(file.parent / facts["best_file"]) if facts["best_file"] else None
            if facts["best_file"] and best is None:
                continue  # the state before this one may still have its best weights
            self._ranks.tell(str(file).encode())
            return Found(tensors, facts, best[0] if best else {})
        self._ranks.tell(b"")
        return None

    def _as_told(self) -> Found | None:
        """The state that the first process resumes from, if it does; it alone keeps the best weights."""
        file = self._ranks.tell().decode()
        if not file:
            return None
        state = checkpoints.read(locate(file))
        if state is None:
            raise RuntimeError(f"process {self._ranks.rank} cannot read {file}, which the first one can")
        return Found(*state, {})

    def _forget_others(self, states: Sequence[str], best_file: str | None) -> None:
        """Remove all checkpoint files but these states and the best weights that they name."""
        self._best_of = {name: self._best_of.get(name, best_file) for name in states}
        bests = [best for best in self._best_of.values() if best is not None]
        checkpoints.forget(self._folder, keep=[*states, *bests])
