"""Trials that report and end, under one orchestrator; prints what they cost as JSON. See `benchmarks/orchestration.py`.

python benchmarks/peers/noop.py METHOD '{"trials": N, "reports": N, "folder": ...}'
"""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = json.loads(sys.argv[2])
FOLDER = Path(SETTINGS["folder"])
STORE = f"sqlite:///{FOLDER}/store.db"
STATEMENTS = 0
FIRST = math.inf
LAST = 0.0


def count_statements() -> None:
    import sqlalchemy as sa

    @sa.event.listens_for(sa.Engine, "before_cursor_execute")
    def _count(*_: Any) -> None:
        global STATEMENTS
        STATEMENTS += 1


def heard() -> None:
    """A report or an end has come to the driver."""
    global FIRST, LAST
    LAST = time.time()
    FIRST = min(FIRST, LAST)


def loss(rate: float, epoch: int) -> float:
    return 1.0 / epoch + abs(math.log10(rate) + 3) + 0.01 * random.random()


def hpsearch_() -> None:
    import hpsearch

    count_statements()
    hpsearch.launch(
        FOLDER / "study.yaml", trials=SETTINGS["trials"], store=STORE, folder=str(FOLDER / "runs"),
        listen=lambda event: heard() if event.kind in ("point", "trial_ended") else None,
    )  # fmt: skip


def tune_(*, tuned: bool) -> None:
    import os
    import secrets

    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray leaves a file with one in the home folder
    if tuned:
        os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": "86400"}
    import optuna
    import ray
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    count_statements()
    reports = SETTINGS["reports"]

    class Stock(tune.Callback):
        def on_trial_result(self, *_: Any, **__: Any) -> None:
            heard()

        def on_trial_complete(self, *_: Any, **__: Any) -> None:
            heard()

    def function(config: dict[str, Any]) -> None:
        for epoch in range(1, reports + 1):
            tune.report({"loss": loss(config["learning_rate"], epoch)})

    class Actor(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.rate, self.epoch = config["learning_rate"], 0

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            self.epoch += 1
            return {"loss": loss(self.rate, self.epoch), "done": self.epoch >= reports}

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    search = OptunaSearch(
        metric="loss", mode="min", storage=optuna.storages.RDBStorage(STORE), study_name="noop", seed=1
    )
    space = {
        "learning_rate": tune.loguniform(1e-5, 1e-1),
        "batch_size": tune.choice([8, 16, 32]),
        "num_layers": tune.randint(1, 5),
    }
    tune.Tuner(
        tune.with_resources(Actor if tuned else function, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search, num_samples=SETTINGS["trials"], max_concurrent_trials=2, metric="loss", mode="min",
            reuse_actors=tuned,
        ),
        run_config=tune.RunConfig(name="noop", storage_path=str(FOLDER / "results"), verbose=0, callbacks=[Stock()]),
    ).fit()  # fmt: skip
    ray.shutdown()


def _optuna_process(trials: int, began: Any, statements: Any) -> None:
    import optuna

    count_statements()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(study_name="noop", storage=STORE, load_if_exists=True)

    def objective(trial: Any) -> float:
        rate = trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)
        trial.suggest_categorical("batch_size", [8, 16, 32])
        trial.suggest_int("num_layers", 1, 4)
        for epoch in range(1, SETTINGS["reports"] + 1):
            trial.report(value := loss(rate, epoch), epoch)
            trial.should_prune()
            with began.get_lock():
                began.value = began.value or time.time()
        return value

    study.optimize(objective, n_trials=trials)
    with statements.get_lock():
        statements.value += STATEMENTS


def optuna_() -> None:
    global STATEMENTS, FIRST, LAST
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.create_study(study_name="noop", storage=STORE, load_if_exists=True)
    context = multiprocessing.get_context("spawn")
    began, statements = context.Value("d", 0.0), context.Value("l", 0)
    processes = [
        context.Process(target=_optuna_process, args=(SETTINGS["trials"] // 2, began, statements)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    FIRST, LAST, STATEMENTS = began.value, time.time(), statements.value


METHODS = {
    "hpsearch": hpsearch_,
    "Tuner + OptunaSearch, stock": lambda: tune_(tuned=False),
    "Tuner + OptunaSearch, tuned": lambda: tune_(tuned=True),
    "Optuna, 2 processes": optuna_,
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    METHODS[sys.argv[1]]()
    (FOLDER / "said.json").write_text(
        json.dumps(
            {
                "wall_s": LAST - FIRST,
                "driver_cpu_s": time.process_time(),
                "statements": STATEMENTS,
            }
        )
    )
