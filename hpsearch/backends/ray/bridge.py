"""Between Ray Tune and a StudyRun: Tune's callbacks become the run's events, and nothing is decided here."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hpsearch.backends import Placement
from hpsearch.backends.ray.cluster import alive_nodes
from hpsearch.backends.ray.placement import capacity
from hpsearch.backends.ray.ray_internals import dead_processes, end_processes
from hpsearch.errors import ClusterError
from hpsearch.files.layout import LAST_WORDS, PULSE_FILE
from hpsearch.files.storage import locate
from hpsearch.records import PREEMPTED, Decision, Progress, TrialConfig, TrialResult
from hpsearch.training.memory import SMALLEST_SHARE

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

    from hpsearch.driver.run.study_run import StudyRun

COUNT_NODES_EVERY_S = 2.0
LOOK_EVERY_S = 0.5
"""Between two looks at Ray's own processes."""
NODE_LOST = f"{PREEMPTED}: its node was lost"
NODE_NOTICED_S = 3.0
"""The death of a worker is heard a moment before that of its node."""
NODE_REMEMBERED_S = 30.0
"""So long after a node was lost, a worker that died before its first report counts as lost with it."""


class Bridge:
    """Tune's names for trials, and ours, around the one StudyRun. Pickles as nothing."""

    def __init__(self, run: StudyRun, place: Placement, most: float = math.inf) -> None:
        self.run: StudyRun | None = run
        self.place = place
        self._most = most
        self._capacity = 0
        self._gpus = 0.0
        self._counted = -math.inf
        self._alive: set[str] = set()
        self._lost_at = -math.inf
        """When a node was last seen to be gone."""
        self.shares: dict[str, float] = {}
        """Tune's trial id to the GPUs that the trial takes."""
        self.numbers: dict[str, int] = {}
        """Tune's trial id to our number, for trials that have not ended."""
        self.nodes: dict[str, str] = {}
        """Tune's trial id to the id of the node that its last report came from."""
        self.left: dict[str, Decision] = {}
        """Tune's trial id to why the trial leaves before its end."""
        self.error: Exception | None = None
        self._losing = threading.Lock()
        """Held forever by the first thread that notices that Ray is lost."""

    def __getstate__(self) -> dict[str, Any]:
        return {
            "run": None,
            "place": self.place,
            "numbers": {},
            "nodes": {},
            "shares": {},
            "left": {},
            "error": None,
        }

    def has_room(self) -> bool:
        """Whether another trial may be asked for now: nodes come and go.

        Of trials that are packed one may wait until those before it leave it as much of a GPU as it takes.
        """
        if time.monotonic() - self._counted > COUNT_NODES_EVERY_S:
            self._counted = time.monotonic()
            nodes = [node["Resources"] for node in self._look()]
            self._gpus = sum(node.get("GPU", 0.0) for node in nodes)
            self._capacity = int(min(self._most, capacity(self.place, nodes)))
        if self.place.is_packed and sum(self.shares.values()) + SMALLEST_SHARE > self._gpus:
            return False
        return len(self.numbers) < self._capacity

    def has_lost_node(self, trial_id: str) -> bool:
        """Whether the node of a trial whose worker has died went with it; waits a moment for the news.

        Before a trial's first report its node is not known: any that was lost lately is taken for it.
        """
        node = self.nodes.pop(trial_id, None)
        until = time.monotonic() + NODE_NOTICED_S
        is_alone = len(self._alive) == 1 and self._lost_at == -math.inf
        while not is_alone and time.monotonic() < until:
            self._look()
            if node is None and time.monotonic() - self._lost_at < NODE_REMEMBERED_S:
                return True
            if node is not None and node not in self._alive:
                return True
            time.sleep(0.2)
        return False

    def _look(self) -> list[dict[str, Any]]:
        nodes = alive_nodes()
        alive = {node["NodeID"] for node in nodes}
        if self._alive - alive:
            self._lost_at = time.monotonic()
        self._alive = alive
        return nodes

    def lose_cluster(self, dead: Sequence[str], scratch: Path) -> None:
        """Bring the study to safety from a Ray that has lost these processes, once; it may end this one, too."""
        if self.run is None or not self._losing.acquire(blocking=False):
            return
        self.numbers.clear()
        self.shares.clear()
        end_processes()
        shutil.rmtree(scratch.parent, ignore_errors=True)  # this process may not live to do it later
        self.run.on_cluster_lost(f"Ray's {' and '.join(dead)} died")

    @contextmanager
    def events(self) -> Iterator[StudyRun]:
        """The run, with the first error in one of its events kept: Tune wraps or swallows what callbacks raise."""
        assert self.run is not None
        try:
            yield self.run
        except Exception as error:
            self.error = self.error or error
            raise


@contextmanager
def watching(bridge: Bridge, scratch: Path) -> Iterator[None]:
    """Look after Ray's processes from a thread, too: Tune's loop waits a minute for an answer of a head that died."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_EVERY_S):
            if (dead := dead_processes()) and not done.wait(NODE_NOTICED_S):
                bridge.lose_cluster(dead, scratch)
                return

    thread = threading.Thread(target=watch, name="hpsearch-ray", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class BridgeSearcher(Searcher):  # type: ignore[misc]
    def __init__(self, bridge: Bridge, forks_at: str | None) -> None:
        super().__init__(metric=None, mode=None)
        self._bridge = bridge
        self._forks_at = forks_at

    def suggest(self, trial_id: str) -> Any:
        bridge = self._bridge
        if not bridge.has_room():
            return None
        with bridge.events() as run:
            # Tune may ask again and again without a step between.
            run.check_stop()
            config = run.next_trial()
            if config is None:
                # An interruption or a failure may still free a place in the budget while others run.
                return None if bridge.numbers or run.is_waiting else Searcher.FINISHED
            share = run.share_of_a_device(config) if bridge.place.is_packed else None
        bridge.numbers[trial_id] = config.number
        bridge.shares[trial_id] = share or 0.0
        update = {"device": "auto" if bridge.place.gpus_per_trial else "cpu", "device_share": share}
        return {
            "trial": config.model_copy(update=update).model_dump_json(),
            "processes": len(bridge.place.bundles),
            "across_nodes": bridge.place.across_nodes,
            "share": share,
            "forks_at": self._forks_at,
        }

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._bridge.numbers.pop(trial_id, None)
        self._bridge.shares.pop(trial_id, None)
        self._bridge.nodes.pop(trial_id, None)
        if number is None:
            return
        with self._bridge.events() as run:
            if (decision := self._bridge.left.pop(trial_id, None)) is not None:
                (run.on_stopped if decision is Decision.STOP else run.on_paused)(number)
            elif not error and result is not None and "result" in result:
                run.on_result(number, TrialResult.from_json(result["result"]))
            else:
                run.on_lost(number, "the worker died without a result")

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a study is resumed from its store."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a study is resumed from its store."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: a study is resumed from its store."""


class BridgeScheduler(FIFOScheduler):  # type: ignore[misc]
    """Passes reports on, and looks around between Tune's steps.

    A callback of Tune's could do the latter, but for one Tune imports mlflow and wandb where they are installed.
    """

    def __init__(self, bridge: Bridge, scratch: Path) -> None:
        super().__init__()
        self._bridge = bridge
        self._scratch = scratch
        self._next_look = 0.0

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """None, in each of Tune's steps: it starts trials in their order by itself.

        One that is chosen takes the next worker that is free, and Tune ends the one that comes up for it: where trials
        are shorter than that takes, a slot whose worker has died would stay empty.
        """
        self._look_around()

    def _look_around(self) -> None:
        """Break Tune's loop when the study is to stop, an event failed, or Ray has lost a process of its own.

        Tune itself would wait forever, and Ray would end this process after a minute.
        """
        if self._bridge.error is not None:
            raise self._bridge.error
        run = self._bridge.run
        if run is None:
            return
        run.check_stop()
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY_S
            if dead := dead_processes():
                self._bridge.lose_cluster(dead, self._scratch)
                raise ClusterError(
                    f"Ray's {' and '.join(dead)} died, and the trials on it; they resume at the next launch"
                )
            for config in run.find_silent():
                _end_silent(config)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        with self._bridge.events() as run:
            self._bridge.nodes[trial.trial_id] = result["node"]
            decision = run.on_progress(self._bridge.numbers[trial.trial_id], Progress.from_json(result["progress"]))
        if decision is Decision.CONTINUE:
            return str(TrialScheduler.CONTINUE)
        # Tune forgets a trial that pauses, too: what it needs to resume is in its folder and in the store.
        self._bridge.left[trial.trial_id] = decision
        return str(TrialScheduler.STOP)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        number = self._bridge.numbers.pop(trial.trial_id, None)
        self._bridge.shares.pop(trial.trial_id, None)
        if number is None:
            return
        file = trial.error_file
        text = Path(file).read_text(errors="replace") if file and Path(file).is_file() else ""
        text = text.replace("ChildProcessError: ", "")  # a fork says itself what it was
        if "its node has died" in text or self._bridge.has_lost_node(trial.trial_id):
            text = NODE_LOST
        with self._bridge.events() as run:
            run.on_lost(number, text)


def _end_silent(config: TrialConfig) -> None:
    """End a worker whose process does not run, wherever it is; Tune hears of its death then."""
    folder = locate(config.folder)
    (folder / LAST_WORDS).write_text(
        f"Timeout ({config.stall_minutes:g} minutes)!\nIts process did not run at all: it was ended from outside.\n"
    )
    worker = json.loads((folder / PULSE_FILE).read_text())
    for node in ray.nodes():
        if node["Alive"] and node["NodeManagerHostname"] == worker["host"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_kill).remote(worker["pid"])
            return


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
