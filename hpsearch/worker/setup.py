"""From what a trial is asked to run to its trainer, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hpsearch.data.shards import read_card
from hpsearch.files import storage
from hpsearch.files.storage import locate
from hpsearch.records import TrialConfig
from hpsearch.spec.task import task_named
from hpsearch.training.devices import pick_device, use_memory
from hpsearch.training.random_states import seed_everything
from hpsearch.training.ranks import Ranks
from hpsearch.training.trainer import Order, Trainer
from hpsearch.training.validation import part_of_validation


def build_trainer(
    config: TrialConfig, ranks: Ranks, pulse: Callable[[], Order], time_left: Callable[[], float] | None = None
) -> Trainer:
    torch.set_num_threads(config.threads)
    seed_everything(config.seed)
    device = pick_device(config.device)
    use_memory(device, config.device_share)
    here = config.model_copy(update={"data": str(storage.cached(locate(config.data)))})
    task = task_named(config.task).build(here)
    if ranks.rank:
        torch.manual_seed(config.seed + ranks.rank)  # equal weights, but not equal dropout
    return Trainer(
        task,
        config.training,
        seed=config.seed,
        device=device,
        folder=locate(config.folder),
        objective=config.objective,
        earlier=[locate(place) for place in config.earlier],
        origin=config.origin,
        rungs=config.rungs,
        pulse=pulse,
        time_left=time_left,
        ranks=ranks,
        validation_part=part_of_validation(
            read_card(Path(here.data)),
            share=config.training.evaluation_share,
            evaluations_per_epoch=config.training.evaluations_per_epoch or 1,
        ),
    )
