"""On PYTHONPATH of what the fault suite starts: slows trials down, logs each epoch, and breaks what FAULTS names.

FAULTS (JSON in the environment): `log` file of epochs; `pace` seconds per evaluation, from trial `pace_from` on; `hold`
a file while which no evaluation is made; `only_first` attempt breaks;
`trial` that breaks, at `step`, by `break`: nan, hang, oom (micro-batches above `fits`); `full` while that file exists
the disk is full for checkpoints; `gpus` that a local Ray of 4 CPUs believes to have, of `gpu_bytes`, of which a trial takes
`example_bytes` for each example of its batch.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from typing import Any

FAULTS: dict[str, Any] = json.loads(os.environ.get("HPSEARCH_TEST_FAULTS", "{}"))


def patch_trainer(module: Any) -> None:
    import torch

    trainer = module.Trainer
    evaluate, step = trainer._evaluate_now, trainer._step

    def identity(self: Any) -> tuple[int, int]:
        _, number, *attempt = self.folder.name.split("-")
        return int(number), int(attempt[1]) if attempt else 1

    def breaks(self: Any, how: str) -> bool:
        number, attempt = identity(self)
        hit = FAULTS.get("break") == how and FAULTS.get("trial", number) == number
        return hit and (attempt == 1 or not FAULTS.get("only_first"))

    def logged(self: Any) -> Any:
        number, attempt = identity(self)
        time.sleep(FAULTS.get("pace", 0.0) if number >= FAULTS.get("pace_from", 0) else 0.0)
        while os.path.exists(FAULTS.get("hold", "")):
            time.sleep(0.1)
        point = evaluate(self)
        line = {"pid": os.getpid(), "trial": number, "attempt": attempt, "evaluation": point.evaluation}
        with open(FAULTS["log"], "a") as log:
            log.write(json.dumps(line) + "\n")
        return point

    def broken(self: Any, indices: Any) -> Any:
        if self._position.step == FAULTS.get("step", 0):
            if breaks(self, "nan"):
                with torch.no_grad():
                    next(iter(self.task.model.parameters())).fill_(float("nan"))
            if breaks(self, "hang"):
                time.sleep(100_000)
        if breaks(self, "oom") and min(self.micro_batch_size, len(indices)) > FAULTS["fits"]:
            losses = self.task.losses
            try:
                self.task.losses = lambda batch: (
                    (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory (injected)"))
                    if len(batch.tensors[0]) > FAULTS["fits"]
                    else losses(batch)
                )
                return step(self, indices)
            finally:
                self.task.losses = losses
        return step(self, indices)

    trainer._evaluate_now, trainer._step = logged, broken
    if "gpu_bytes" in FAULTS:
        start = trainer.__init__

        def measured(self: Any, task: Any, settings: Any, **more: Any) -> None:
            start(self, task, settings, **more)
            peak = FAULTS["example_bytes"] * settings.batch_size
            found = {"peak_memory_bytes": peak, "device_memory_bytes": FAULTS["gpu_bytes"]}
            vars(sys.modules["hpsearch.worker.run"])["peak_memory"] = lambda device: found

        trainer.__init__ = measured


def patch_ray(module: Any) -> None:
    if "gpus" in FAULTS:
        init = module.ray.init
        module.ray.init = lambda **options: init(**options, num_gpus=FAULTS["gpus"], num_cpus=4)


def patch_checkpoints(module: Any) -> None:
    import errno

    write = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.exists(FAULTS["full"]):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor)

    if "full" in FAULTS:
        os.fsync = fsync  # type: ignore[assignment]


PATCHES = {
    "hpsearch.training.trainer": patch_trainer,
    "hpsearch.training.checkpoints": patch_checkpoints,
    "hpsearch.backends.ray.cluster": patch_ray,
}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if FAULTS:
    sys.meta_path.insert(0, Finder())
