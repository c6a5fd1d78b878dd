"""Ray Tune + OptunaSearch + ASHA + HF Trainer, as their documentation has a competent user write it.

    python benchmarks/peers/hf_tune.py '{"case": ..., "folder": ..., "trials": N, "space": ..., "seed": N, ...}'

The trainable reports the validation loss at each evaluation through a callback; OptunaSearch has a storage in SQLite,
ASHA its defaults with the epochs of the longest run; two trials run at once, one CPU each. It ends after `trials`, or
after `seconds` of Tune's own clock where they are given. A trial writes a line for
each of its reports: seconds since the start, trial, epoch, validation loss. (A callback of Tune's would write them with
a second more to start, where mlflow and wandb are installed: Tune imports both to count it.)
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
SETTINGS: dict[str, Any] = json.loads(sys.argv[1])


def train(config: dict[str, Any]) -> None:
    sys.path.insert(0, config["benchmarks"])
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import transformers
    from ray import tune
    from trainer import Case

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()

    class Report(transformers.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            if "eval_loss" not in metrics:
                return
            line = {"at": time.time() - settings["began"], "trial": tune.get_context().get_trial_id(),
                    "epoch": state.epoch, "loss": metrics["eval_loss"]}  # fmt: skip
            with (Path(settings["folder"]) / "reports.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            tune.report({"loss": metrics["eval_loss"], "epoch": state.epoch})

    chosen = {name: value for name, value in config.items() if name not in ("settings", "benchmarks")}
    settings = config["settings"]
    case = Case(
        settings["case"], Path(settings["folder"]) / str(os.getpid()), epochs=chosen.pop("num_epochs"), device="cpu",
        data=settings["data"], changes=chosen, dropout=settings["dropout"], evaluations=settings["evaluations"],
    )  # fmt: skip
    case.theirs(settings["seed"], callbacks=[Report()])


def main() -> None:
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray leaves a file with one in the home folder
    import optuna
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    folder = Path(SETTINGS["folder"])
    space: dict[str, Any] = {}
    for name, values in SETTINGS["space"].items():
        if isinstance(values, list):
            space[name] = tune.choice(values)
        elif values.get("scale") == "log":
            space[name] = tune.loguniform(values["min"], values["max"])
        else:
            space[name] = tune.randint(values["min"], values["max"] + 1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder}/optuna.db")
    tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space={**space, "settings": SETTINGS, "benchmarks": str(Path(__file__).parent.parent)},
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(metric="loss", mode="min", storage=storage, study_name="s", seed=SETTINGS["seed"]),
            scheduler=ASHAScheduler(time_attr="training_iteration", max_t=SETTINGS["most_evaluations"]),
            num_samples=SETTINGS["trials"], max_concurrent_trials=2, metric="loss", mode="min",
            time_budget_s=SETTINGS.get("seconds"),
        ),
        run_config=tune.RunConfig(name="s", storage_path=str(folder / "results"), verbose=0),
    ).fit()  # fmt: skip
    ray.shutdown()


if __name__ == "__main__":
    main()
