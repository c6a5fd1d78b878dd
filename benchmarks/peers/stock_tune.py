"""Ray Tune with OptunaSearch and a SQL storage, as their documentation has a competent user write it.

A checkpoint each epoch, two kept; `max_failures=2`; the study resumed by `Tuner.restore` where there is something to
restore. The trainable is a toy that only counts epochs, so that a fault costs it no time of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray leaves a file with one in the home folder

import optuna
import ray
from ray import tune
from ray.tune.search.optuna import OptunaSearch

SETTINGS: dict[str, Any] = json.loads(sys.argv[1])


def train(config: dict[str, Any]) -> None:
    settings = config["settings"]
    epoch = 0
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            epoch = json.loads((Path(folder) / "state.json").read_text())["epoch"]
    number = tune.get_context().get_trial_id()
    while epoch < settings["epochs"]:
        time.sleep(settings["pace"])
        epoch += 1
        with open(settings["log"], "a") as log:
            log.write(json.dumps({"pid": os.getpid(), "trial": number, "attempt": 0, "evaluation": epoch}) + "\n")
        fault, victim = settings.get("break"), config["layers"] == settings.get("trial_layers", -1)
        loss = 1.0 / epoch + config["lr"]
        if fault == "nan" and victim and epoch >= 2:
            loss = float("nan")
        if fault == "hang" and victim and epoch == 2 and not Path(settings["log"] + ".hung").exists():
            Path(settings["log"] + ".hung").touch()
            time.sleep(100_000)
        if fault == "oom" and victim:
            raise MemoryError("CUDA out of memory (injected)")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "state.json").write_text(json.dumps({"epoch": epoch}))
            tune.report({"loss": loss}, checkpoint=tune.Checkpoint.from_directory(folder))


def main() -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    folder = Path(SETTINGS["folder"])
    results = folder / "results" / "suffering"
    trainable = tune.with_resources(train, {"cpu": 1})
    if tune.Tuner.can_restore(str(results)):
        tuner = tune.Tuner.restore(str(results), trainable=trainable, resume_errored=True)
    else:
        search = OptunaSearch(
            metric="loss",
            mode="min",
            storage=optuna.storages.RDBStorage(SETTINGS["store"], engine_kwargs={"pool_pre_ping": True}),
            study_name="suffering",
            seed=1,
        )
        tuner = tune.Tuner(
            trainable,
            param_space={"lr": tune.loguniform(1e-4, 1e-2), "layers": tune.randint(0, 2), "settings": SETTINGS},
            tune_config=tune.TuneConfig(
                search_alg=search, num_samples=SETTINGS["trials"], max_concurrent_trials=2, metric="loss", mode="min"
            ),
            run_config=tune.RunConfig(
                name="suffering",
                storage_path=str(folder / "results"),
                failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            ),
        )
    tuner.fit()


if __name__ == "__main__":
    main()
