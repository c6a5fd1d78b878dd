"""What a launch would do, found out without touching anything, and data and models made ready for one."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hpsearch
from hpsearch.data import pretrained
from hpsearch.driver.compatibility import existing_trials, with_its_defaults
from hpsearch.driver.starts import starts_of
from hpsearch.files.storage import Folder, cached
from hpsearch.records import DataProgress, Listener
from hpsearch.spec.study import StudySpec
from hpsearch.store.store import Store

if TYPE_CHECKING:
    from hpsearch.data.prepare import TooLong
    from hpsearch.data.shards import DataCard
    from hpsearch.data.stages import Report

_TOLD_EVERY_S = 1.0


def check(
    spec: StudySpec, *, extend: bool = False, moves: bool = False, contacts_store: bool = True, full: bool = False
) -> dict[str, Any]:
    """What a launch would do, touching nothing: space, first settings, data, store, devices, tokens to train.

    Of a large corpus that is not prepared yet the counts are estimated from a part, unless `full` is set.

    With `contacts_store` false nothing is asked of the store, which a file from elsewhere may name. Raises the error
    that the launch would raise.
    """
    from hpsearch.data.prepare import measure, notes
    from hpsearch.search.study import first_suggestions

    store_state = Store.preflight(spec.store) if contacts_store else None
    spec = with_its_defaults(spec) if contacts_store else spec
    existing = existing_trials(spec, extend=extend, moves=moves) if contacts_store else None
    spec.definition.check_score(spec.options)
    if (model := pretrained.of(spec.model)) and spec.definition.is_pair:
        pretrained.load_translator(model, spec.data.source_language, spec.data.target_language)
    has_hub = any(source.hub for source in spec.data.sources)
    card, long = (None, None) if has_hub else measure(spec, whole=full)
    if card:
        spec = fitted(spec, card)
        for settings in _corner_models(spec):
            spec.definition.check_model(settings, spec.options, card)
    suggestions = first_suggestions(spec, 3, starts_of(spec))
    return {
        "schema_version": 1,
        "study": spec.model_dump(mode="json", exclude={"store"}),
        "fixed": {
            name: value
            for settings in spec.settings_for({})
            for name, value in settings.model_dump().items()
            if name not in spec.space.dimensions
        },
        "space_size": spec.space.size if spec.space.size != float("inf") else None,
        "dimensions": list(spec.space.dimensions),
        "evaluations_per_epoch": spec.evaluations_per_epoch,
        "first_settings": suggestions,
        "store": store_state,
        "resumes": existing,
        "devices": _devices(),
        "computing": _computing(spec),
        "data": card.__dict__ if card else None,
        "notes": notes(spec, card) if card else [],
        "truncated": long.cut if long else {},
        "left_out": long.left_out if long else {},
        "too_long": str(long) if long else "",
        "estimated_tokens": _estimated_tokens(spec, card) if card else None,
    }


def _estimated_tokens(spec: StudySpec, card: DataCard) -> int:
    """Tokens that the whole budget would train on without any pruning, from the mean epochs of 64 random settings."""
    from hpsearch.search.study import first_suggestions
    from hpsearch.spec.sections import SamplerSpec

    random = spec.model_copy(update={"sampler": SamplerSpec(name="random")})
    epochs = [spec.settings_for(params)[1].num_epochs for params in first_suggestions(random, 64)]
    return int(sum(epochs) / len(epochs) * spec.budget.trials * card.tokens["train"])


def _corner_models(spec: StudySpec) -> Iterator[Any]:
    """Model settings with each searched architecture, so that a misfit is found before any trial starts."""
    from hpsearch.spec.space import Choice

    first = {
        name: dimension.values[0] if isinstance(dimension, Choice) else _whole(dimension.high, dimension.integer)
        for name, dimension in spec.space.dimensions.items()
        if not dimension.when
    }
    architectures = spec.space.dimensions.get("architecture")
    for name in architectures.values if isinstance(architectures, Choice) else (None,):
        yield spec.settings_for({**first, **({"architecture": name} if name else {})})[0]


def _whole(value: float, integer: bool) -> float:
    return int(value) if integer else value


def prepare_data(spec: StudySpec, report: Report | None = None) -> tuple[Folder, DataCard, TooLong]:
    from hpsearch.data.prepare import prepare, too_long
    from hpsearch.data.stages import unheard

    spec.definition.check_score(spec.options)
    folder, card = prepare(spec, report or unheard)
    _check_models(spec, card, cached(folder))
    return folder, card, too_long(spec, cached(folder))


def fitted(spec: StudySpec, card: DataCard) -> StudySpec:
    """The study with as many evaluations of an epoch as its data is long enough for, where its file does not say."""
    from hpsearch.training.validation import fitting_evaluations

    training = spec.training
    if training.evaluations_per_epoch is not None:
        return spec
    count = fitting_evaluations(card, share=training.evaluation_share, wanted=spec.evaluations_per_epoch)
    return spec.model_copy(update={"training": training.model_copy(update={"evaluations_per_epoch": count})})


def data_reports(listen: Listener, stopped: threading.Event | None = None) -> Report:
    """Tells a listener how far the data is, a second after it was last told; nothing of what takes no time.

    Once `stopped` is set, the preparation ends by KeyboardInterrupt, and the next launch continues it.
    """
    told = began = time.monotonic()
    current = ""

    def report(stage: str, done: int, total: int) -> None:
        nonlocal told, began, current
        now = time.monotonic()
        if stage != current:
            began, current = now, stage
        if stopped is not None and stopped.is_set():
            raise KeyboardInterrupt
        if now - told >= _TOLD_EVERY_S or not (done or total):
            told = now
            listen(DataProgress(stage=stage, done=done, total=total, seconds=now - began))

    return report


def _check_models(spec: StudySpec, card: DataCard, folder: Path) -> None:
    """Raise UsageError for models that cannot be built; what could be is noted beside the data, and not tried again.

    Trying takes seconds: torch and transformers are imported for it.
    """
    note = folder / "models-checked.txt"
    known = set(note.read_text().splitlines()) if note.is_file() else set()
    versions = f"{hpsearch.__version__} {version('transformers')}"
    for settings in _corner_models(spec):
        options = spec.options.model_dump_json()
        key = sha256(f"{versions} {spec.task} {options} {settings.model_dump_json()}".encode()).hexdigest()
        # A pretrained model lies in a folder that may change.
        if key in known and settings.pretrained is None:
            continue
        spec.definition.check_model(settings, spec.options, card)
        with suppress(OSError), note.open("a") as file:
            file.write(f"{key}\n")


def _computing(spec: StudySpec) -> dict[str, Any]:
    """What trials on this machine would compute in, by what its devices can do, and what is slow about it."""
    from hpsearch.training.devices import describe_cpu, has_bfloat16, pick_device
    from hpsearch.training.steps import precision

    device = pick_device("cpu" if spec.resources.gpus_per_trial == 0 else "auto")
    formats = precision(spec.training, device)
    warnings = []
    if formats["model"] == "bfloat16" and not has_bfloat16(device):
        warnings.append("training.precision is bfloat16, which this device only emulates: many times slower")
    if spec.training.compile and device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        warnings.append("training.compile needs a C++ compiler, and this machine has none")
    return {"device": device.type, **formats, **describe_cpu(), "warnings": warnings}


def _devices() -> list[str]:
    from hpsearch.training.devices import gpu_names

    return [*gpu_names(), f"{os.cpu_count()} CPUs"]
