"""What Ray runs on the nodes: a warm worker for trials, and the other processes of trials on several devices."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hpsearch.backends.fork_server import Fork, import_worker
from hpsearch.records import PREEMPTED, TrialConfig

DISMISSED_S = 60.0
"""What the other processes of a trial get to end, once they are told that it is over."""


class Trainable(tune.Trainable):  # type: ignore[misc]
    """A warm worker: it keeps its process, and so its imports, from trial to trial."""

    _fork: Fork | None = None
    _team: _Team | None = None

    def setup(self, config: dict[str, Any]) -> None:
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            progress = next(self._trial)
        except StopIteration as end:
            if end.value.reason.startswith(PREEMPTED):
                ray.actor.exit_actor()
            return {"done": True, "result": end.value.to_json()}
        return {"progress": progress.to_json(), "node": ray.get_runtime_context().get_node_id()}

    def cleanup(self) -> None:
        self._trial.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the worker writes its own checkpoints."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the worker reads its own checkpoints."""

    def _begin(self, config: dict[str, Any]) -> None:
        trial = _read(config["trial"])
        if config["forks_at"] and self._fork is None and "hpsearch.worker.run" not in sys.modules:
            with suppress(OSError):
                self._fork = Fork(config["forks_at"], os.environ)
        if self._fork is not None:
            self._trial = self._fork.run_trial(trial)
            return
        if config["processes"] > 1 and self._team is None:
            self._team = _Team(config["processes"], is_spread=config["across_nodes"])
        self._trial = import_worker().run_trial(trial, own_process=True, team=self._team)


def _read(content: str) -> TrialConfig:
    """The trial, with the environment that torch should find."""
    trial = TrialConfig.model_validate_json(content)
    os.environ["OMP_NUM_THREADS"] = str(trial.threads)
    return trial


class _Follower:
    """An actor that holds one of the other processes of a trial, from trial to trial."""

    def follow(self, trial: str, address: str, *, rank: int, size: int, host: str) -> str:
        config, host = _read(trial), host or ray.util.get_node_ip_address()
        import_worker()
        from hpsearch.worker.team import follow

        return follow(config, address, rank=rank, size=size, host=host)


class _Team:
    """The followers of this worker, each in its own bundle of the trial's resources. See `worker.team.Team`."""

    def __init__(self, size: int, *, is_spread: bool) -> None:
        self.size = size
        self.host = ray.util.get_node_ip_address() if is_spread else "127.0.0.1"
        self._there = "" if is_spread else self.host
        self._followers: list[Any] = []
        self._answers: list[Any] = []

    def start(self, config: TrialConfig, address: str) -> None:
        group = ray.util.get_current_placement_group()
        for rank in range(1 + len(self._followers), self.size):
            bundle = group.bundle_specs[rank]
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": place}
            self._followers.append(ray.remote(_Follower).options(**options).remote())
        trial = config.model_dump_json()
        self._answers = [
            follower.follow.remote(trial, address, rank=rank, size=self.size, host=self._there)
            for rank, follower in enumerate(self._followers, start=1)
        ]

    def lost(self, wait_s: float = 0.0) -> str | None:
        from hpsearch.worker.reasons import first_cause

        done, _ = ray.wait(self._answers, num_returns=1, timeout=wait_s)
        if not done:
            return None
        done, _ = ray.wait(self._answers, num_returns=len(self._answers), timeout=wait_s / 5)
        return first_cause([self._said(answer) for answer in done])

    def end(self, *, is_done: bool) -> None:
        if is_done:
            done, _ = ray.wait(self._answers, num_returns=len(self._answers), timeout=DISMISSED_S)
            is_done = len(done) == len(self._answers)
        if not is_done:
            for follower in self._followers:
                ray.kill(follower)
            self._followers = []

    def _said(self, answer: Any) -> str:
        try:
            return str(ray.get(answer))
        except Exception as error:
            lines = str(error).strip().splitlines()
            why = lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]
            return f"process {1 + self._answers.index(answer)} of {self.size} ended: {why}"
