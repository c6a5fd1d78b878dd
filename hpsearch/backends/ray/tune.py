"""Ray Tune places trials on CPUs and GPUs and runs them in warm workers. Owns Tune; Ray itself is `ray_cluster`'s.

A thin Searcher and a thin TrialScheduler translate Tune's callbacks into the events of a StudyRun and take no decision.
Tune's own record-keeping (loggers, snapshots, pickled searcher state) is off or empty: nothing is resumed from it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpsearch.backends import Placement
from hpsearch.backends.ray.cluster import alive_nodes  # before Tune, for what it puts into the environment

# isort: split
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from hpsearch.backends.fork_server import Fork, import_worker
from hpsearch.backends.ray.metrics import StudyMetrics
from hpsearch.backends.ray.ray_internals import dead_processes, end_processes
from hpsearch.errors import ClusterError, HpsearchError
from hpsearch.files.layout import LAST_WORDS, PULSE_FILE
from hpsearch.files.storage import Folder, locate
from hpsearch.records import PREEMPTED, Decision, Progress, TrialConfig, TrialResult
from hpsearch.spec.study import StudySpec
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
DISMISSED_S = 60.0
"""What the other processes of a trial get to end, once they are told that it is over."""


class RayTune:
    def __init__(self, spec: StudySpec, scratch: Path, *, forks_at: str | None = None) -> None:
        """`forks_at` is where workers ask for the processes of trials. They are these processes themselves if None."""
        self._forks_at = forks_at
        self.placement = _place(spec, [node["Resources"] for node in alive_nodes()])
        self.results: Folder = scratch / "results"
        self._scratch = scratch
        self._has_joined = spec.address != "local"
        self._most = math.inf if spec.resources.parallel == "auto" else spec.resources.parallel

    def run(self, run: StudyRun) -> None:
        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if self._has_joined:
            run.add_listener(StudyMetrics(run.spec.name))
        place = self.placement
        bridge = _Bridge(run, place, self._most)
        tuner = tune.Tuner(
            tune.with_resources(_Trainable, partial(_resources, place)),
            tune_config=tune.TuneConfig(
                search_alg=_BridgeSearcher(bridge, self._forks_at),
                scheduler=_BridgeScheduler(bridge, self._scratch),
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                **_tune_storage(self.results),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        try:
            with _watching(bridge, self._scratch):
                tuner.fit()
        except Exception as error:
            if bridge.error is not None:
                raise bridge.error from None
            ours = _cause(error)
            if ours is not None:
                raise ours from None
            raise ClusterError(f"Ray Tune ended: {error}") from error


def _resources(place: Placement, config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
    """What Tune asks of Ray for a trial."""
    if config["share"] is not None:
        return tune.PlacementGroupFactory([{**place.bundles[0], "GPU": config["share"]}])
    return tune.PlacementGroupFactory(place.bundles, strategy="PACK" if place.across_nodes else "STRICT_PACK")


def _place(spec: StudySpec, nodes: Sequence[Mapping[str, float]]) -> Placement:
    """What a trial takes and how many fit on nodes with these resources. Raises ClusterError when none does."""
    wanted = spec.resources
    gpus = sum(node.get("GPU", 0) for node in nodes)
    is_given = not isinstance(wanted.gpus_per_trial, str)
    gpus_per_trial = float(wanted.gpus_per_trial) if is_given else (1.0 if gpus else 0.0)
    processes = wanted.processes
    cpus = max(1, wanted.cpus_per_trial // processes)
    needs = {"gpus_per_trial": ("GPU", gpus_per_trial), "cpus_per_trial": ("CPU", float(processes * cpus))}
    if wanted.memory_gb_per_trial:
        needs["memory_gb_per_trial"] = ("memory", 1e9 * wanted.memory_gb_per_trial)
    each = {name: amount / processes for name, amount in needs.values() if amount}
    if wanted.accelerator_type:
        # Ray gives a node one of it, and asks for a crumb: what counts is that it is there.
        needs["accelerator_type"] = (f"accelerator_type:{wanted.accelerator_type}", 0.001)
        each[f"accelerator_type:{wanted.accelerator_type}"] = 0.001
    needs |= {f"custom_per_trial.{name}": (name, amount) for name, amount in wanted.custom_per_trial.items()}
    is_spread = wanted.across_nodes and processes > 1
    for setting, (name, amount) in needs.items():
        there = [node.get(name, 0.0) for node in nodes]
        most = sum(there) if is_spread else max(there, default=0.0)
        if amount > most:
            given = wanted.accelerator_type if setting == "accelerator_type" else f"{amount:g}"
            has = "all nodes of Ray have no more than" if is_spread else "no node of Ray has more than"
            raise ClusterError(
                f"resources.{setting} is {given}, but {has} {most:g} {name}" + _advice(setting, spec, gpus)
            )
    bundles = [{**each, **wanted.custom_per_trial}, *[each] * (processes - 1)]
    fit = _fit(bundles, nodes, across_nodes=is_spread)
    if not fit:
        raise ClusterError(f"no node of Ray has all at once that a trial asks for: {_total(bundles)}")
    parallel = fit if wanted.parallel == "auto" else min(wanted.parallel, fit)
    is_packed = wanted.gpus_per_trial == "packed" and gpus > 0
    share = f"{processes * cpus} CPU" + (f" and {gpus_per_trial:g} GPU" if gpus_per_trial else "")
    where = "on this machine" if len(nodes) == 1 else f"on {len(nodes)} nodes"
    total = sum(node.get("CPU", 0) for node in nodes)
    return Placement(
        parallel=parallel,
        cpus_per_process=cpus,
        gpus_per_trial=gpus_per_trial,
        bundles=bundles,
        across_nodes=is_spread,
        is_packed=is_packed,
        where=f"Ray {where} ({total:g} CPUs, {gpus:g} GPUs), {parallel} at a time, {share} each"
        + (f" in {processes} processes" if processes > 1 else "")
        + (", and more once their memory is known" if is_packed else ""),
    )


def _capacity(place: Placement, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials could run at once; of those that are packed, if none took more than a crumb of a GPU."""
    bundles = [{**place.bundles[0], "GPU": SMALLEST_SHARE}] if place.is_packed else place.bundles
    return _fit(bundles, nodes, across_nodes=place.across_nodes)


def _advice(setting: str, spec: StudySpec, gpus: float) -> str:
    if setting == "gpus_per_trial" and 1 < spec.resources.processes <= gpus:
        return "; resources.across_nodes: true lets a trial use those of several"
    return ""


def _total(bundles: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _fit(bundles: Sequence[Mapping[str, float]], nodes: Iterable[Mapping[str, float]], *, across_nodes: bool) -> int:
    """How many trials with these bundles fit on the nodes, none of them on two unless they may."""

    def count(resources: Mapping[str, float], node: Mapping[str, float]) -> int:
        return min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in resources.items())

    if across_nodes:
        # What only the first process takes is left to Ray to place.
        return sum(count(bundles[-1], node) for node in nodes) // len(bundles)
    return sum(count(_total(bundles), node) for node in nodes)


class _Bridge:
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
            self._capacity = int(min(self._most, _capacity(self.place, nodes)))
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
def _watching(bridge: _Bridge, scratch: Path) -> Iterator[None]:
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


class _BridgeSearcher(Searcher):  # type: ignore[misc]
    def __init__(self, bridge: _Bridge, forks_at: str | None) -> None:
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


class _BridgeScheduler(FIFOScheduler):  # type: ignore[misc]
    """Passes reports on, and looks around between Tune's steps.

    A callback of Tune's could do the latter, but for one Tune imports mlflow and wandb where they are installed.
    """

    def __init__(self, bridge: _Bridge, scratch: Path) -> None:
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


class _Trainable(tune.Trainable):  # type: ignore[misc]
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


def _tune_storage(folder: Folder) -> dict[str, Any]:
    """Where Tune keeps its own files."""
    if isinstance(folder, Path):
        return {"storage_path": str(folder)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": folder.path, "storage_filesystem": PyFileSystem(FSSpecHandler(folder.fs))}


def _trial_name(trial: Trial) -> str:
    return str(trial.trial_id)


def _cause(error: BaseException | None) -> HpsearchError | None:
    """The error of ours that Tune has wrapped, if it is one."""
    while error is not None and not isinstance(error, HpsearchError):
        error = error.__cause__ or error.__context__
    return error
