"""Ray Tune places trials on CPUs and GPUs and runs them in warm workers. Ray itself is `cluster`'s.

Tune's own record-keeping (loggers, snapshots, pickled searcher state) is off or empty: nothing is resumed from it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from hpsearch.backends import Placement
from hpsearch.backends.ray.bridge import Bridge, BridgeScheduler, BridgeSearcher, watching
from hpsearch.backends.ray.cluster import alive_nodes
from hpsearch.backends.ray.metrics import StudyMetrics
from hpsearch.backends.ray.placement import place_on
from hpsearch.backends.ray.trainable import Trainable
from hpsearch.errors import ClusterError, HpsearchError
from hpsearch.files.storage import Folder
from hpsearch.spec.study import StudySpec

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

    from hpsearch.driver.run.study_run import StudyRun


class RayTune:
    def __init__(self, spec: StudySpec, scratch: Path, *, forks_at: str | None = None) -> None:
        """`forks_at` is where workers ask for the processes of trials. They are these processes themselves if None."""
        self._forks_at = forks_at
        self.placement = place_on(spec, [node["Resources"] for node in alive_nodes()])
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
        bridge = Bridge(run, place, self._most)
        tuner = tune.Tuner(
            tune.with_resources(Trainable, partial(_resources, place)),
            tune_config=tune.TuneConfig(
                search_alg=BridgeSearcher(bridge, self._forks_at),
                scheduler=BridgeScheduler(bridge, self._scratch),
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
            with watching(bridge, self._scratch):
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
