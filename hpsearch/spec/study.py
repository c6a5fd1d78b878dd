"""A study file as one validated record: what to search, on what data, for how long."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, create_model, field_validator
from pydantic.json_schema import WithJsonSchema

from hpsearch.errors import UsageError
from hpsearch.files.storage import locate
from hpsearch.registry import TASKS
from hpsearch.spec.parsing.space import parse_space
from hpsearch.spec.parsing.wandb import WANDB_KEYS
from hpsearch.spec.sections import (
    TARGET_EVALUATIONS,
    BudgetSpec,
    DataSpec,
    LimitSpec,
    PruneSpec,
    ResourceSpec,
    SamplerSpec,
    TokenizerSpec,
)
from hpsearch.spec.settings import (
    SEARCHABLE,
    ModelSettings,
    RunSettings,
    Strict,
    split_settings,
)
from hpsearch.spec.space import Space
from hpsearch.spec.task import TaskDefinition, task_named

DEFAULT_STORE = "sqlite:///hpsearch.db"
_OBJECTIVE_SCHEMA: dict[str, Any] = {
    "anyOf": [{"enum": ["loss", "bleu", "f1", "rouge_l", "token_f1", "exact_match"]}, {"type": "string"}],
    "default": "loss",
}
_METRIC_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "object", "required": ["name"]}, {"type": "null"}],
    "default": None,
}
_TASK_SCHEMA: dict[str, Any] = {
    "anyOf": [{"enum": list(TASKS.names)}, {"type": "string", "pattern": r"^[\w.]+:\w+$"}],
}
_PLACEMENT = {"folder", "resources", "backend", "address", "limits", "enqueue", "transfer_from"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_DIMENSION_SCHEMA: dict[str, Any] = {
    "description": "A plain value is fixed, a list is choices, a mapping with min and max is a range.",
    "anyOf": [
        {"type": ["number", "string", "boolean"]},
        {"type": "array", "minItems": 1, "items": {"type": ["number", "string", "boolean"]}},
        {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "min": {"type": "number"},
                "max": {"type": "number"},
                "scale": {"enum": ["log", "linear"]},
                "log": {"type": "boolean"},
                "step": {"type": "number", "exclusiveMinimum": 0},
                "prior": {"type": ["number", "string", "boolean"]},
                "q": {"type": "number", "exclusiveMinimum": 0},
                "value": {"type": ["number", "string", "boolean"]},
                "values": {"type": "array", "minItems": 1},
                "distribution": {"type": "string"},
                "when": {"type": "object", "minProperties": 1},
            },
        },
    ],
}
_SEARCH_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        name: {**_DIMENSION_SCHEMA, "description": owner.model_fields[name].description or name}
        for name, owner in SEARCHABLE.items()
    },
    "patternProperties": {r"^config\..+": _DIMENSION_SCHEMA},
}


class StudySpec(Strict):
    """One study. `search` holds what is sampled; `model` and `training` what stays fixed.

    A study of a task that has options is of a subclass with a section for them: see `study_class`.
    """

    name: str = Field(description="Letters, digits, '.', '_' and '-'; unique in its store.")
    task: Annotated[str, WithJsonSchema(_TASK_SCHEMA)] = Field(
        description="One of these, of an installed package, or package.module:Class of your own."
    )
    data: DataSpec
    tokenizer: TokenizerSpec = Field(default_factory=TokenizerSpec)
    model: ModelSettings = Field(default_factory=ModelSettings)
    training: RunSettings = Field(default_factory=RunSettings)
    objective: Annotated[str, WithJsonSchema(_OBJECTIVE_SCHEMA)] = Field(
        "loss",
        description="What the search improves on the validation split, and what chooses a run's best checkpoint. A "
        "score (bleu, f1, rouge_l, or what else the task names) is taken at the end of each epoch; runs are still "
        "judged to overfit by their losses.",
    )
    metric: Annotated[str | None, WithJsonSchema(_METRIC_SCHEMA)] = Field(
        None,
        description="The test metric that trials are ranked by; by default the task's first. {name: ..., goal: ...}, "
        "as W&B has it, is understood.",
    )
    search: Annotated[dict[str, Any], WithJsonSchema(_SEARCH_SCHEMA)] = Field(default_factory=dict)
    enqueue: list[dict[str, Any]] = Field(
        default_factory=list,
        description="Settings to try first, each a mapping from searched settings to values; the sampler fills in what "
        "one leaves open. May grow from launch to launch.",
    )
    transfer_from: list[str] = Field(
        default_factory=list,
        description="Earlier studies of the same store and task, whose best settings are tried first, as far as this "
        "space holds them.",
    )
    budget: BudgetSpec = Field(default_factory=BudgetSpec)
    sampler: SamplerSpec = Field(default_factory=SamplerSpec, description="A sampler's name, or a mapping.")
    prune: PruneSpec = Field(default_factory=PruneSpec)
    resources: ResourceSpec = Field(default_factory=ResourceSpec)
    limits: LimitSpec = Field(default_factory=LimitSpec)
    backend: Literal["ray", "inline"] = Field("ray", description="inline runs the trials one by one in this process.")
    address: str = Field(
        "local",
        description="The Ray that runs the trials: local starts one on this machine; auto or HOST:PORT joins one that "
        "this machine belongs to.",
    )
    store: str = Field(DEFAULT_STORE, description="SQLAlchemy URL; may hold ${NAME} and ${NAME:-default}.")
    folder: str = Field(
        "hpsearch-runs",
        description="Folder of checkpoints and tokenized data, which all nodes reach: a path, or a URI such as s3://BUCKET/PATH.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Of the sampler, the split of weights and the order of data.")

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"expected letters, digits, '.', '_' and '-' (64 at most, no leading sign), got {name!r}")
        return name

    @field_validator("address")
    @classmethod
    def _ray_address(cls, address: str) -> str:
        if address.startswith("ray://"):
            raise ValueError(
                "Ray Tune does not run over Ray Client, whose driver is no part of the cluster; submit the study with "
                "`hpsearch submit STUDY --address http://HEAD:8265`, or launch it on a node with auto"
            )
        if address.startswith(("http://", "https://")):
            raise ValueError("an http address takes jobs: use `hpsearch submit STUDY --address " + address + "`")
        if address not in ("local", "auto") and not re.fullmatch(r"[\w.\-\[\]:]+:\d{1,5}", address):
            raise ValueError(f"expected local, auto or HOST:PORT, got {address!r}")
        return address

    @field_validator("sampler", mode="before")
    @classmethod
    def _sampler_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("task")
    @classmethod
    def _known_task(cls, name: str) -> str:
        if (problem := TASKS.problem(name)) is not None:
            raise ValueError(problem)
        return name

    @property
    def definition(self) -> TaskDefinition:
        return task_named(self.task)

    @property
    def ranking_metric(self) -> str:
        """The test metric that trials are ranked by."""
        return self.metric or self.definition.metric

    @property
    def options(self) -> Any:
        """Of the task."""
        given = getattr(self, self.definition.name, None)
        return self.definition.options() if given is None else given

    @cached_property
    def space(self) -> Space:
        return parse_space(self.search)[0]

    @property
    def evaluations_per_epoch(self) -> int:
        """Set, or what gives the longest run of the study some 40 evaluations (at least one an epoch)."""
        if self.training.evaluations_per_epoch is not None:
            return self.training.evaluations_per_epoch
        longest = self.space.largest("num_epochs", self.training.num_epochs)
        return max(1, round(TARGET_EVALUATIONS / longest))

    @property
    def max_epochs(self) -> int:
        return int(self.space.largest("num_epochs", self.training.num_epochs))

    @property
    def defaults(self) -> dict[str, dict[str, Any]]:
        """Values of settings whose default depends on the rest of the file, by section, where it names none."""
        # Weights that AdamW has trained gain nothing from Muon (Liu et al., arXiv 2502.16982, section 3.5), and an
        # average lags behind in the few epochs of fine-tuning.
        is_fresh = self.model.pretrained is None
        training: dict[str, Any] = {
            "optimizer": "muon" if is_fresh else "adamw",
            "weight_average": 0.1 if is_fresh else 0.0,
            "evaluations_per_epoch": self.evaluations_per_epoch,
        }
        model = {"architecture": self.definition.architecture} if is_fresh else {}
        # What is searched under a condition has its default where that does not hold.
        always = {name for name, dimension in self.space.dimensions.items() if not dimension.when}
        searched = {*self.space.fixed, *always}
        return {
            section: {
                name: value
                for name, value in values.items()
                if getattr(getattr(self, section), name) is None and name not in searched
            }
            for section, values in (("training", training), ("model", model))
        }

    def settings_for(self, params: dict[str, Any]) -> tuple[ModelSettings, RunSettings]:
        """The full settings of a trial: the file's, with the fixed and the sampled values of `search` over them."""
        model, training = split_settings({**self.space.fixed, **params})
        model["config"] = {**self.model.config, **model.get("config", {})}
        defaults = self.defaults
        settings = {**self.model.model_dump(), **defaults["model"], **model}
        run = {**self.training.model_dump(), **defaults["training"], **training}
        return ModelSettings(**settings), RunSettings(**run)

    def record(self) -> dict[str, Any]:
        """What identifies the study, as JSON: everything but where it runs and where it is kept, defaults filled in.

        Of local files there are names only. What is in the data is told by its fingerprint.
        """
        record = self.model_dump(mode="json", exclude={"store", "budget", *_PLACEMENT})
        for section, values in self.defaults.items():
            record[section] |= values
        for source in (record["data"], *record["data"]["mix"]):
            if source["files"] is not None:
                source["files"] = _names(source["files"])
        if Path(record["model"]["pretrained"] or "").is_absolute():
            record["model"]["pretrained"] = Path(record["model"]["pretrained"]).name
        return record

    def placement(self) -> dict[str, Any]:
        """Where the study runs and where its files are, as JSON."""
        return {
            **self.model_dump(mode="json", include=_PLACEMENT),
            "folder": str(locate(self.folder)),
            **self.data.model_dump(mode="json", include={"files", "mix"}),
            "pretrained": self.model.pretrained,
        }

    @property
    def fingerprint(self) -> str:
        """Changes when the study becomes another one; the budget, the machine and the store do not count."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:16]


_RESERVED = {*StudySpec.model_fields, *WANDB_KEYS}


@cache
def study_class(*tasks: str) -> type[StudySpec]:
    """StudySpec with a section, under its name, for the options of each of these tasks. Raises UsageError."""
    sections: dict[str, Any] = {}
    for definition in map(task_named, tasks):
        name = definition.name
        if not name.isidentifier() or name.startswith("_") or hasattr(StudySpec, name) or name in _RESERVED:
            raise UsageError(f"a task may not be named {name!r}: expected a word that is no key")
        if definition.options.model_fields:
            sections[definition.name] = (definition.options, Field(default_factory=definition.options))
    return create_model("StudySpec", __base__=StudySpec, **sections)


def recorded_study(record: dict[str, Any], placement: dict[str, Any], store: str, *, trials: int) -> StudySpec:
    """The study that `record()` and `placement()` of a launched one describe."""
    where = dict(placement)
    data = {**record["data"], **{key: where.pop(key) for key in ("files", "mix") if key in where}}
    model = {**record["model"], "pretrained": where.pop("pretrained", record["model"]["pretrained"])}
    others = {name for name in TASKS.built_in if name != record["task"]}  # earlier records have sections of all tasks
    record = {key: value for key, value in record.items() if key not in others}
    # Earlier studies looked at all of the validation split each time.
    record["training"] = {"evaluation_share": 1.0, **record["training"]}
    whole = {**record, **where, "data": data, "model": model, "store": store, "budget": {"trials": trials}}
    return study_class(record["task"]).model_validate(whole, context={"recorded": True})


def recorded_space(record: dict[str, Any]) -> Space:
    """The space that `record()` of a launched study describes."""
    return parse_space(record["search"])[0]


def _names(paths: Any) -> Any:
    """Local files by their names alone: where they lie is no part of what a study is."""
    if isinstance(paths, dict):
        return {key: _names(value) for key, value in paths.items()}
    return [_names(path) for path in paths] if isinstance(paths, list) else Path(paths).name
