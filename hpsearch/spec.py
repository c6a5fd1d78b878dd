"""A study file, validated: what to search, on what data, for how long. A user's mistakes should end here.

Imports nothing heavy, so that a wrong study is refused before torch, Ray or a database is touched.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic.json_schema import GenerateJsonSchema, WithJsonSchema

from hpsearch import rungs, storage
from hpsearch.corpora import CORPORA
from hpsearch.errors import Problem, SpecError
from hpsearch.pruning import TARGET_EVALUATIONS, OverfitRule
from hpsearch.redaction import hide_secrets, remember_secrets
from hpsearch.settings import (
    FIXED_BY_PRETRAINED,
    FOR_PRETRAINED,
    MOST,
    SEARCHABLE,
    ClassificationSpec,
    ModelSettings,
    Objective,
    RunSettings,
    Scalar,
    Strict,
    TranslationSpec,
    split_settings,
)
from hpsearch.space import Choice, Range, Space, parse_space, readable
from hpsearch.storage import locate
from hpsearch.study_file import KeyPath, StudyDocument, parse_scalar, read_study_file

DEFAULT_STORE = "sqlite:///hpsearch.db"
DEFAULT_ARCHITECTURE = {"causal_lm": "gpt2", "translation": "marian", "classification": "bert"}
_PLACEMENT = {"folder", "resources", "backend", "address", "limits", "enqueue", "transfer_from"}
MOST_MINUTES = 10_000_000.0
"""Some 19 years: timers of the system take no longer ones."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Corpus = Literal["python_docs", "python_docstrings", "ui_messages", "python_areas"]
OBJECTIVES: dict[str, tuple[Objective, ...]] = {
    "causal_lm": ("loss",),
    "translation": ("loss", "bleu"),
    "classification": ("loss", "f1"),
}
"""What a task can search for on the validation split."""
TaskName = Literal["causal_lm", "translation", "classification"]


class AlignedFiles(Strict):
    """Two plain text files: the translation of each line of one is the same line of the other."""

    source: str
    target: str


class FileSplits(Strict):
    """Local text files (.txt, .jsonl, .csv, .parquet); paths are relative to the study file."""

    train: list[str] | AlignedFiles
    validation: list[str] | AlignedFiles = Field(default_factory=list, description="Without it, a fraction of train.")
    test: list[str] | AlignedFiles = Field(default_factory=list, description="Without it, a fraction of train.")

    @field_validator("train")
    @classmethod
    def _some(cls, files: list[str] | AlignedFiles) -> list[str] | AlignedFiles:
        if not files:
            raise ValueError("expected at least one file")
        return files


class DataSpec(Strict):
    """Where the text comes from: exactly one of corpus, files and hub."""

    corpus: Corpus | None = Field(None, description="Built-in text, read at run time from the running Python.")
    files: FileSplits | None = Field(None, description="A path, a list of paths, or train, validation and test.")
    hub: str | None = Field(None, description="A dataset id for `datasets`, such as Salesforce/wikitext.")
    config: str | None = Field(None, description="Configuration of the hub dataset.")
    revision: str | None = Field(None, description="Commit or tag of the hub dataset.")
    column: str = Field("text", description="Column or key that holds the text (jsonl, csv, parquet, hub).")
    label_column: str = Field("label", description="Column that holds the label, or a list of labels.")
    source_column: str = Field("source", description="Column that holds the text to translate.")
    target_column: str = Field("target", description="Column that holds its translation.")
    source_language: str | None = Field(
        None, description="What a multilingual tokenizer calls the language to translate from: eng_Latn, en_XX, en."
    )
    target_language: str | None = Field(
        None, description="The language to translate to; it decides what BLEU takes for words, too."
    )
    max_examples: int | None = Field(None, ge=10, le=MOST, description="Use at most so many examples of each split.")
    fraction: float = Field(1.0, gt=0, le=1, description="Part of the training split to use.")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="Part split off when there is no validation split.")
    test_fraction: float = Field(0.1, gt=0, lt=1, description="Part split off when there is no test split.")
    rare_labels: Literal["keep", "drop"] = Field(
        "keep",
        description="Labels with too few examples to stand in all splits: they stand in training at least, or are left "
        "out with their examples.",
    )

    @field_validator("files", mode="before")
    @classmethod
    def _short_forms(cls, files: Any) -> Any:
        if isinstance(files, str):
            files = [files]
        if isinstance(files, list):
            files = {"train": files}
        if isinstance(files, dict) and set(files) == {"source", "target"}:
            files = {"train": files}
        if isinstance(files, dict):
            return {key: [value] if isinstance(value, str) else value for key, value in files.items()}
        return files

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        given = [name for name in ("corpus", "files", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of corpus, files and hub, got {' and '.join(given) or 'none'}")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction leave nothing to train on")
        if self.hub is None and (self.config or self.revision):
            raise ValueError("config and revision belong to hub")
        return self


class TokenizerSpec(Strict):
    """A byte-pair tokenizer trained on the training split alone."""

    shared: bool = Field(True, description="One vocabulary for both languages of a translation, or one each.")
    vocab_size: int = Field(1024, ge=258, le=1_000_000, description="Entries, the 256 bytes and end-of-text included.")


class BudgetSpec(Strict):
    trials: int = Field(20, ge=1, le=MOST, description="Trials to finish; interrupted ones do not count.")
    minutes: float | None = Field(
        None,
        gt=0,
        le=MOST_MINUTES,
        description="Wall time of one launch. As it runs out, the leading trials are brought to their ends; what has "
        "not ended is scored as it is.",
    )


class LimitSpec(Strict):
    """What a trial may cost and how often it may break, before it is ended."""

    max_minutes: float | None = Field(
        None,
        gt=0,
        le=MOST_MINUTES,
        description="A trial that has run so long is ended and scored at its best checkpoint.",
    )
    stall_minutes: float | None = Field(
        30.0,
        gt=0,
        le=MOST_MINUTES,
        description="A worker that makes no step for so long is ended; its trial is tried again.",
    )
    retries: int = Field(
        2, ge=0, le=MOST, description="Times that a trial whose worker died goes on from its checkpoint."
    )
    keep_checkpoints: int = Field(
        5,
        ge=1,
        le=MOST,
        description="Ranked trials whose best checkpoint stays; the rest is collected as the study runs.",
    )
    keep_paused: int = Field(
        20,
        ge=1,
        le=MOST,
        description="Trials that wait with their checkpoint to be promoted; of more, the last is ended.",
    )


SamplerName = Literal["tpe", "gp", "random", "cmaes", "grid", "qmc"]
PrunerName = Literal["promote", "median", "percentile", "asha", "hyperband", "none"]


class SamplerSpec(Strict):
    """How Optuna proposes settings."""

    name: SamplerName = "tpe"
    startup_trials: int = Field(
        10,
        ge=0,
        le=MOST,
        description="Trials, spread evenly over the space, before a model is trusted (tpe, gp, cmaes).",
    )


class UnpromisingSpec(Strict):
    """How trials are pruned against each other. Rungs (but those of promote) and warm-up count epochs of the run."""

    rule: PrunerName = Field(
        "promote",
        description="promote: a trial pauses, with its checkpoint, at parts of its run and goes on when it is among "
        "the best there. The others end trials for good.",
    )
    startup_trials: int = Field(
        5, ge=0, le=MOST, description="Trials that finish before any is pruned (median, percentile)."
    )
    warmup_epochs: int | None = Field(
        None,
        ge=0,
        le=MOST,
        description="Epochs that no trial is pruned in (median, percentile); by default a fifth of the longest run.",
    )
    percentile: float = Field(25.0, gt=0, lt=100, description="The best part that is kept (percentile).")
    min_epochs: int = Field(1, ge=1, le=MOST, description="Epochs at the lowest rung (asha, hyperband).")
    reduction_factor: int = Field(
        3,
        ge=2,
        le=MOST,
        description="One in so many goes on at each rung (promote, asha, hyperband); of promote more where the order "
        "at a rung is not the order later.",
    )


class PruneSpec(Strict):
    overfit: OverfitRule | None = Field(
        default_factory=OverfitRule, description="true, false, or the rule's own windows and thresholds."
    )
    unpromising: UnpromisingSpec = Field(
        default_factory=UnpromisingSpec, description="A rule's name, or a mapping with its settings."
    )

    @field_validator("overfit", mode="before")
    @classmethod
    def _overfit_switch(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @field_validator("unpromising", mode="before")
    @classmethod
    def _unpromising_name(cls, value: Any) -> Any:
        return {"rule": value} if isinstance(value, str) else value


class ResourceSpec(Strict):
    """What one trial gets, and how many run at once. Threads per process of a trial equal its CPUs."""

    cpus_per_trial: int = Field(
        1, ge=1, le=MOST, description="Shared by the processes of a trial, which take one each at least."
    )
    gpus_per_trial: float | Literal["auto", "packed"] = Field(
        "auto",
        description="A fraction of one, or several: a process for each trains its part of every batch "
        "(DistributedDataParallel). auto: 1 if there are any. packed: as many trials on each as fit in its memory, by "
        "what the study's first trials took.",
    )
    across_nodes: bool = Field(False, description="The GPUs of a trial may be on several nodes.")
    memory_gb_per_trial: float | None = Field(
        None, gt=0, le=MOST, description="Memory that a node must have free for a trial, in 10^9 bytes."
    )
    accelerator_type: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._-]+$", description="Kind of GPU that a trial needs, as Ray calls it (A100, H100)."
    )
    custom_per_trial: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="What a trial takes of resources that the nodes were started with."
    )
    parallel: int | Literal["auto"] = Field("auto", description="Trials at once; auto: as many as fit.")

    @field_validator("gpus_per_trial", mode="before")
    @classmethod
    def _gpus(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 4096
        if value not in ("auto", "packed") and not (is_number and (value <= 1 or value == int(value))):
            raise ValueError(f"expected auto, packed, a part of one or a whole number, got {value!r}")
        return value

    @property
    def processes(self) -> int:
        """Of one trial: one for each of its GPUs."""
        return 1 if isinstance(self.gpus_per_trial, str) else max(1, int(self.gpus_per_trial))

    @field_validator("parallel", mode="before")
    @classmethod
    def _parallel(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"expected auto or a whole number of at least 1, got {value!r}")
        return value


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
    """One study. `search` holds what is sampled; `model` and `training` what stays fixed."""

    name: str = Field(description="Letters, digits, '.', '_' and '-'; unique in its store.")
    task: TaskName
    data: DataSpec
    tokenizer: TokenizerSpec = Field(default_factory=TokenizerSpec)
    model: ModelSettings = Field(default_factory=ModelSettings)
    training: RunSettings = Field(default_factory=RunSettings)
    translation: TranslationSpec = Field(default_factory=TranslationSpec)
    classification: ClassificationSpec = Field(default_factory=ClassificationSpec)
    objective: Objective = Field(
        "loss",
        description="What the search improves on the validation split, and what chooses a run's best checkpoint. A "
        "score (bleu, f1) is taken at the end of each epoch; runs are still judged to overfit by their losses.",
    )
    search: Annotated[dict[str, Any], WithJsonSchema(_SEARCH_SCHEMA)] = Field(default_factory=dict)
    enqueue: list[dict[str, Any]] = Field(
        default_factory=list,
        description="Settings to try first, each a mapping from searched settings to values; the sampler fills in what "
        "one leaves open. May grow while a study goes on.",
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

    _space: Space = PrivateAttr(default_factory=lambda: Space(fixed={}, dimensions={}))

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

    @property
    def space(self) -> Space:
        return self._space

    @property
    def evaluations_per_epoch(self) -> int:
        """Set, or what gives the longest run of the study some 40 evaluations (at least one an epoch)."""
        if self.training.evaluations_per_epoch is not None:
            return self.training.evaluations_per_epoch
        longest = self.space.largest("num_epochs", self.training.num_epochs)
        return max(1, round(TARGET_EVALUATIONS / longest))

    def rungs(self, training: RunSettings) -> tuple[float, ...]:
        """Parts of a run with these settings at which it may be paused."""
        rule = self.prune.unpromising
        return rungs.places(rule.reduction_factor, training.warmup_fraction) if rule.rule == "promote" else ()

    @property
    def max_epochs(self) -> int:
        return int(self.space.largest("num_epochs", self.training.num_epochs))

    def settings_for(self, params: dict[str, Any]) -> tuple[ModelSettings, RunSettings]:
        """The full settings of a trial: the file's, with the fixed and the sampled values of `search` over them."""
        model, training = split_settings({**self.space.fixed, **params})
        model["config"] = {**self.model.config, **model.get("config", {})}
        settings = {**self.model.model_dump(), **model}
        if self.model.pretrained is None:
            settings["architecture"] = settings["architecture"] or DEFAULT_ARCHITECTURE[self.task]
        run = {**self.training.model_dump(), **training, "evaluations_per_epoch": self.evaluations_per_epoch}
        # Weights that AdamW has trained gain nothing from Muon (Liu et al., arXiv 2502.16982, section 3.5), and an
        # average lags behind in the few epochs of fine-tuning.
        is_fresh = self.model.pretrained is None
        defaults = {"optimizer": "muon" if is_fresh else "adamw", "weight_average": 0.1 if is_fresh else 0.0}
        run |= {name: value for name, value in defaults.items() if run[name] is None}
        return ModelSettings(**settings), RunSettings(**run)

    def record(self) -> dict[str, Any]:
        """What identifies the study, as JSON: everything but where it runs and where it is kept.

        Of local files there are names only. What is in the data is told by its fingerprint.
        """
        record = self.model_dump(mode="json", exclude={"store", "budget", *_PLACEMENT})
        if self.data.files is not None:
            record["data"]["files"] = _names(record["data"]["files"])
        if Path(record["model"]["pretrained"] or "").is_absolute():
            record["model"]["pretrained"] = Path(record["model"]["pretrained"]).name
        return record

    def placement(self) -> dict[str, Any]:
        """Where the study runs and where its files are, as JSON."""
        return {
            **self.model_dump(mode="json", include=_PLACEMENT),
            "folder": str(locate(self.folder)),
            "files": self.data.model_dump(mode="json")["files"],
            "pretrained": self.model.pretrained,
        }

    @property
    def fingerprint(self) -> str:
        """Changes when the study becomes another one; the budget, the machine and the store do not count."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:16]


def recorded_study(record: dict[str, Any], placement: dict[str, Any], store: str, *, trials: int) -> StudySpec:
    """The study that `record()` and `placement()` of a launched one describe."""
    where = dict(placement)
    data = {**record["data"], "files": where.pop("files", record["data"]["files"])}
    model = {**record["model"], "pretrained": where.pop("pretrained", record["model"]["pretrained"])}
    whole = {**record, **where, "data": data, "model": model, "store": store, "budget": {"trials": trials}}
    spec = StudySpec.model_validate(whole)
    spec._space = recorded_space(record)
    return spec


def recorded_space(record: dict[str, Any]) -> Space:
    """The space that `record()` of a launched study describes."""
    return parse_space(record["search"])[0]


def load_study(
    path: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    name: str | None = None,
    trials: int | None = None,
    store: str | None = None,
    backend: str | None = None,
    address: str | None = None,
    folder: str | None = None,
) -> StudySpec:
    """Read and validate a study file, with `KEY=VALUE` overrides on top.

    The store is `store`, then the environment's HPSEARCH_STORE (or what is in the file HPSEARCH_STORE_FILE), then the
    study file's, then sqlite:///hpsearch.db. Likewise `address`, RAY_ADDRESS and local; `folder` and HPSEARCH_FOLDER.
    Raises SpecError with every mistake at once.
    """
    document = read_study_file(Path(path))
    for override in overrides:
        dotted, equals, value = override.partition("=")
        if not equals or not dotted:
            raise SpecError([f"--set {override}: expected KEY=VALUE, such as search.num_layers.max=4"])
        document.override(dotted.strip(), parse_scalar(value), f"--set {override}", value.strip())
    for dotted, option, given in (
        ("name", "--name", name),
        ("budget.trials", "--trials", trials),
        ("backend", "--backend", backend),
    ):
        if given is not None:
            document.override(dotted, given, f"{option} {given}")
    for key, option, given, variable, there in (
        ("store", "--store", store, "HPSEARCH_STORE", environment_store()),
        ("address", "--address", address, "RAY_ADDRESS", os.environ.get("RAY_ADDRESS")),
        ("folder", "--folder", folder, "HPSEARCH_FOLDER", os.environ.get("HPSEARCH_FOLDER")),
    ):
        if chosen := given or there:
            remember_secrets(chosen)
            document.override(key, chosen, option if given else variable)
    return validate_study(document, base=Path(path).parent)


def environment_store() -> str | None:
    """The store that the environment names: HPSEARCH_STORE, or the content of the file HPSEARCH_STORE_FILE (a secret).

    The file of a submitted job is `masked` with HPSEARCH_STORE_KEY. Raises SpecError when there is no such file.
    """
    if store := os.environ.get("HPSEARCH_STORE"):
        remember_secrets(store)
        return store
    file = os.environ.get("HPSEARCH_STORE_FILE")
    if not file:
        return None
    try:
        content = Path(file).read_bytes()
        if key := os.environ.get("HPSEARCH_STORE_KEY"):
            content = masked(content, bytes.fromhex(key))
        store = content.decode().strip()
        remember_secrets(store)
        return store or None
    except OSError as error:
        raise SpecError([f"HPSEARCH_STORE_FILE: cannot read {file}: {error.strerror}"]) from None
    except ValueError:
        raise SpecError(
            [f"HPSEARCH_STORE_FILE: {file} holds no text, or HPSEARCH_STORE_KEY is another file's"]
        ) from None


def masked(content: bytes, key: bytes) -> bytes:
    """Content under a key of its length (a one-time pad), or what was under it. Raises ValueError."""
    return bytes(byte ^ mask for byte, mask in zip(content, key, strict=True))


def validate_study(document: StudyDocument, *, base: Path) -> StudySpec:
    """The study that a parsed file describes; data paths are relative to `base`."""
    problems: list[Problem] = []
    content = _from_wandb(dict(document.content), problems, document)
    space, space_problems = parse_space(content.pop("search", {}))
    problems += space_problems
    _interpolate(content, problems)
    _take_label_as_written(content, document)
    raw_search = document.content.get("search") if isinstance(document.content.get("search"), dict) else {}
    try:
        spec = StudySpec.model_validate({**content, "search": raw_search})
    except ValidationError as error:
        # Of a value that fits no branch of a union, one complaint is enough.
        found = {problem.path: problem for problem in map(_problem, reversed(error.errors()))}
        raise document.error(problems + list(found.values())) from None
    spec = _with_absolute_paths(spec, base, problems)
    spec = _with_pretrained_folder(spec, base, problems)
    spec._space = space
    problems += _cross_checks(spec, content)
    if (wrong := storage.problem(spec.folder)) is not None:
        problems.append(Problem(path=("folder",), message=f"{hide_secrets(spec.folder)}: {wrong}"))
    if problems:
        raise document.error(problems)
    return spec


def _take_label_as_written(content: dict[str, Any], document: StudyDocument) -> None:
    """Labels are text, whatever YAML takes them for."""
    options = content.get("classification")
    label = options.get("positive_label") if isinstance(options, dict) else None
    if isinstance(options, dict) and isinstance(label, bool | int | float):
        text = document.texts.get(("classification", "positive_label"), label)
        content["classification"] = {**options, "positive_label": text}


def json_schema() -> dict[str, Any]:
    """The JSON schema of a study file, for editors. It knows the short forms that the validators accept."""
    schema = StudySpec.model_json_schema(schema_generator=GenerateJsonSchema)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    properties, definitions = schema["properties"], schema["$defs"]
    paths = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    aligned = {"$ref": "#/$defs/AlignedFiles"}
    for split in definitions["FileSplits"]["properties"].values():
        split["anyOf"] = [*paths["anyOf"], aligned]
    _also(definitions["DataSpec"]["properties"]["files"], {"anyOf": [*paths["anyOf"], aligned]})
    _also(properties["sampler"], definitions["SamplerSpec"]["properties"]["name"])
    _also(definitions["PruneSpec"]["properties"]["overfit"], {"type": "boolean"})
    _also(definitions["PruneSpec"]["properties"]["unpromising"], definitions["UnpromisingSpec"]["properties"]["rule"])
    properties["store"]["type"] = "string"
    return schema


def _also(schema: dict[str, Any], short_form: dict[str, Any]) -> None:
    choices = schema.pop("anyOf", None) or [{"$ref": schema.pop("$ref")}]
    schema["anyOf"] = [*choices, {key: value for key, value in short_form.items() if key != "default"}]


_WANDB_METHODS = {"bayes": "tpe", "random": "random", "grid": "grid"}
_WANDB_HELP = {
    "metric": "hpsearch always minimises validation loss and ranks by the test metric; leave it out",
    "early_terminate": "pruning is set under 'prune'",
    "program": "hpsearch trains the model itself; say what under 'task', 'data' and 'model'",
    "command": "hpsearch trains the model itself; say what under 'task', 'data' and 'model'",
    "run_cap": "the number of trials is set under 'budget.trials'",
}


def _from_wandb(content: dict[str, Any], problems: list[Problem], document: StudyDocument) -> dict[str, Any]:
    """The two top-level words of a pasted W&B sweep in our spelling; the others are refused with advice."""
    for key, advice in _WANDB_HELP.items():
        if key in content:
            del content[key]
            problems.append(Problem(path=(key,), message=f"a W&B sweep key: {advice}", at_key=True))
    for theirs, ours in (("parameters", "search"), ("method", "sampler")):
        if theirs not in content:
            continue
        if ours in content:
            problems.append(Problem(path=(theirs,), message=f"'{ours}' is given as well; keep one", at_key=True))
            del content[theirs]
            continue
        value = content.pop(theirs)
        if theirs == "method":
            if value not in _WANDB_METHODS:
                problems.append(Problem(path=(theirs,), message=f"expected {', '.join(_WANDB_METHODS)}, got {value!r}"))
                continue
            value = _WANDB_METHODS[value]
        content[ours] = document.content[ours] = value
        for marks in (document.key_marks, document.value_marks):
            for path in [path for path in marks if path[:1] == (theirs,)]:
                marks[(ours, *path[1:])] = marks[path]
    return content


_OURS = "HPSEARCH_"
_EXPANDED = ("HOME", "USER", "TMPDIR", "PGHOST", "PGPORT", "PGUSER", "PGDATABASE")
"""Other variables that a study file may name: it may come from elsewhere, and secrets are not for it to send away."""
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _interpolate(content: dict[str, Any], problems: list[Problem]) -> None:
    """Environment variables, in the two places that are documented to have them: `store` and `data.files`."""

    def filled(text: str, path: KeyPath) -> str:
        def value(match: re.Match[str]) -> str:
            if not match[1].startswith(_OURS) and match[1] not in _EXPANDED:
                expected = f"names that begin with {_OURS}, or {', '.join(_EXPANDED)}"
                problems.append(
                    Problem(path=path, message=f"${{{match[1]}}} is not read in a study file; expected {expected}")
                )
                return ""
            found = os.environ.get(match[1], match[2])
            if found is None:
                problems.append(
                    Problem(
                        path=path,
                        message=f"the environment has no {match[1]}; set it, or write ${{{match[1]}:-default}}",
                    )
                )
                return ""
            return found

        return _VARIABLE.sub(value, text)

    def walk(value: Any, path: KeyPath) -> Any:
        if isinstance(value, str):
            return filled(value, path)
        if isinstance(value, list):
            return [walk(child, (*path, index)) for index, child in enumerate(value)]
        if isinstance(value, dict):
            return {key: walk(child, (*path, key)) for key, child in value.items()}
        return value

    if isinstance(content.get("store"), str):
        content["store"] = filled(content["store"], ("store",))
        remember_secrets(content["store"])
    if isinstance(content.get("data"), dict) and "files" in content["data"]:
        content["data"] = {**content["data"], "files": walk(content["data"]["files"], ("data", "files"))}


def _problem(error: Any) -> Problem:
    # pydantic names the branch of a union, too; no key of the file is called so.
    path = tuple(part for part in error["loc"] if part not in ("list[str]", "AlignedFiles"))
    if error["type"] == "extra_forbidden":
        return Problem(path=path, message=f"unknown key '{path[-1]}'{_known_keys(path)}", at_key=True)
    if error["type"] == "missing":
        return Problem(path=path[:-1], message=f"missing key '{path[-1]}'")
    return Problem(path=path, message=readable(error))


def _known_keys(path: tuple[Any, ...]) -> str:
    model: type[BaseModel] | None = StudySpec
    for part in path[:-1]:
        model = _submodel(model, str(part)) if model else None
    if model is None:
        return ""
    names = list(model.model_fields)
    if len(path) == 1 and path[-1] in SEARCHABLE:
        return "; it belongs under 'search', 'model' or 'training'"
    places = {name: name for name in names}
    if len(path) == 1:
        for section in names:
            inner = _submodel(StudySpec, section)
            for name in inner.model_fields if inner else ():
                places.setdefault(name, f"{section}.{name}")
    near = [places[name] for name in difflib.get_close_matches(str(path[-1]), places, n=1, cutoff=0.6)]
    return f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(names)}"


def _submodel(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = model.model_fields.get(name)
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((entry for entry in candidates if isinstance(entry, type) and issubclass(entry, BaseModel)), None)


def _with_absolute_paths(spec: StudySpec, base: Path, problems: list[Problem]) -> StudySpec:
    if spec.data.files is None:
        return spec
    splits: dict[str, Any] = {}
    for split in ("train", "validation", "test"):
        files = getattr(spec.data.files, split)
        if isinstance(files, AlignedFiles):
            pair = {side: _absolute(base, name, split, problems) for side, name in files.model_dump().items()}
            splits[split] = AlignedFiles(**pair)
            if spec.task != "translation":
                message = "source and target files are for translation"
                problems.append(Problem(path=("data", "files", split), message=message))
            continue
        splits[split] = [_absolute(base, name, split, problems) for name in files]
        for name in files:
            _check_format(Path(name), spec.task, split, problems)
    data = spec.data.model_copy(update={"files": FileSplits(**splits)})
    return spec.model_copy(update={"data": data})


def _absolute(base: Path, name: str, split: str, problems: list[Problem]) -> str:
    file = base / name
    if not file.is_file():
        problems.append(Problem(path=("data", "files", split), message=f"no such file: {file}"))
    return str(file.resolve())


def _check_format(file: Path, task: str, split: str, problems: list[Problem]) -> None:
    expected = ".txt, .jsonl, .csv or .parquet" if task == "causal_lm" else ".jsonl, .csv or .parquet"
    if file.suffix in (".txt", ".jsonl", ".csv", ".parquet") and (file.suffix != ".txt" or task == "causal_lm"):
        return
    message = f"cannot tell the format of {file.name}; expected {expected}"
    if file.suffix == ".txt" or task == "translation":
        lines = ", or two text files as {source: FILE, target: FILE}" if task == "translation" else ""
        message = f"{file.name} has one text a paragraph and nothing beside it; expected {expected}{lines}"
    problems.append(Problem(path=("data", "files", split), message=message))


def _with_pretrained_folder(spec: StudySpec, base: Path, problems: list[Problem]) -> StudySpec:
    name = spec.model.pretrained
    if name is None:
        return spec
    folder = base / Path(name).expanduser()
    if folder.is_dir():
        model = spec.model.model_copy(update={"pretrained": str(folder.resolve())})
        return spec.model_copy(update={"model": model})
    if not _HUB_ID.fullmatch(name):
        message = f"no folder {folder}, and no id of a model on the hub"
        problems.append(Problem(path=("model", "pretrained"), message=message))
    return spec


def _names(paths: Any) -> Any:
    """Local files by their names alone: where they lie is no part of what a study is."""
    if isinstance(paths, dict):
        return {key: _names(value) for key, value in paths.items()}
    return [_names(path) for path in paths] if isinstance(paths, list) else Path(paths).name


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _wrong_start(space: Space, start: dict[str, Any], path: KeyPath) -> Iterator[Problem]:
    if not start:
        yield Problem(path=path, message="expected a mapping from searched settings to values")
    for name, value in start.items():
        if name not in space.dimensions:
            known = ", ".join(space.dimensions)
            yield Problem(path=(*path, name), message=f"'{name}' is not searched; searched are {known}", at_key=True)
        elif not space.overlap({name: value}):
            yield Problem(path=(*path, name), message=f"{value!r} is not in the search space")


def _cross_checks(spec: StudySpec, content: dict[str, Any]) -> list[Problem]:
    """Mistakes that only show when two parts of the file are seen together."""
    problems = []
    space = spec.space
    corpus = spec.data.corpus
    if corpus is not None and corpus not in CORPORA[spec.task]:
        fitting = " or ".join(CORPORA[spec.task])
        problems.append(
            Problem(path=("data", "corpus"), message=f"{corpus} is no {spec.task} data; expected {fitting}")
        )
    for section in ("translation", "classification"):
        if section in content and section != spec.task:
            message = f"settings of another task; this study's is {spec.task}"
            problems.append(Problem(path=(section,), message=message, at_key=True))
    for name in ("source_language", "target_language"):
        if getattr(spec.data, name) is not None and spec.task != "translation":
            problems.append(Problem(path=("data", name), message="only a translation has languages", at_key=True))
    if spec.data.rare_labels != "keep" and spec.task != "classification":
        problems.append(Problem(path=("data", "rare_labels"), message="only a classification has labels", at_key=True))
    if spec.classification.f1 == "binary" and spec.classification.positive_label is None:
        message = "binary F1 needs positive_label: the label that it is about"
        problems.append(Problem(path=("classification", "f1"), message=message))
    if spec.objective not in OBJECTIVES[spec.task]:
        expected = " or ".join(OBJECTIVES[spec.task])
        message = f"a {spec.task} study has no validation {spec.objective}; expected {expected}"
        problems.append(Problem(path=("objective",), message=message))
    if spec.backend == "inline" and spec.resources.processes > 1:
        message = "the inline backend has one process, on one GPU at most; expected backend: ray"
        problems.append(Problem(path=("resources", "gpus_per_trial"), message=message))
    problems += _pretrained_problems(spec, content)
    if not spec.tokenizer.shared and spec.task != "translation":
        problems.append(Problem(path=("tokenizer", "shared"), message="only a translation has two vocabularies"))
    for section in ("model", "training"):
        given = content.get(section)
        for name in given if isinstance(given, dict) else ():
            if name in space.fixed or name in space.dimensions:
                problems.append(
                    Problem(
                        path=(section, name), message=f"'{name}' stands under 'search' as well; keep one", at_key=True
                    )
                )
    for index, start in enumerate(spec.enqueue):
        problems += _wrong_start(space, start, ("enqueue", index))
    if spec.sampler.name == "grid" and (spec.enqueue or spec.transfer_from or space.priors):
        what = "enqueue" if spec.enqueue else "transfer_from" if spec.transfer_from else "search"
        message = "the grid sampler tries every setting once, in no order; expected another sampler"
        problems.append(Problem(path=(what,), message=message, at_key=True))
    if spec.sampler.name == "grid":
        for name, dimension in space.dimensions.items():
            if isinstance(dimension, Range) and dimension.size == float("inf"):
                problems.append(
                    Problem(
                        path=("search", name), message="the grid sampler needs a list of values, or a range with step"
                    )
                )
            if dimension.when:
                problems.append(Problem(path=("search", name, "when"), message="the grid sampler knows no conditions"))
    if spec.sampler.name == "cmaes":
        numeric = [name for name, dimension in space.dimensions.items() if isinstance(dimension, Range)]
        if len(numeric) < 2:
            problems.append(
                Problem(path=("sampler",), message="cmaes needs at least two ranges (choices are sampled at random)")
            )
    if spec.model.pretrained is None:
        problems += _head_problems(spec)
    return problems


def _pretrained_problems(spec: StudySpec, content: dict[str, Any]) -> list[Problem]:
    """Settings that a pretrained model brings along, or that need one."""
    model = content.get("model")
    named = [(("model", name), name) for name in (model if isinstance(model, dict) else ())]
    named += [(("search", name), name) for name in (*spec.space.fixed, *spec.space.dimensions)]
    if spec.model.pretrained is None:
        return [
            Problem(path=path, message=f"'{name}' is for a model that is fine-tuned; set model.pretrained", at_key=True)
            for path, name in named
            if name in FOR_PRETRAINED
        ]
    problems = [
        Problem(path=path, message=f"'{name}' comes with the pretrained model; leave it out", at_key=True)
        for path, name in named
        if name in FIXED_BY_PRETRAINED
    ]
    if "tokenizer" in content:
        message = "the tokenizer comes with the pretrained model; leave it out"
        problems.append(Problem(path=("tokenizer",), message=message, at_key=True))
    return problems


def _head_problems(spec: StudySpec) -> list[Problem]:
    """Widths that some number of heads does not divide, over all combinations of the space."""

    def values(name: str, fixed: Scalar | None) -> list[Any] | None:
        dimension = spec.space.dimensions.get(name)
        if isinstance(dimension, Choice):
            return list(dimension.values)
        if isinstance(dimension, Range):
            if dimension.size > 1000:
                return None
            step = int(dimension.step or 1)
            return list(range(int(dimension.low), int(dimension.high) + 1, step))
        return [spec.space.fixed.get(name, fixed)]

    widths = values("hidden_size", spec.model.hidden_size)
    heads = values("num_heads", spec.model.num_heads)
    where = ("search", "num_heads") if "num_heads" in spec.space.dimensions else ("model", "num_heads")
    for width in widths or ():
        for count in heads or ():
            if count is not None and width % count:
                return [Problem(path=where, message=f"num_heads ({count}) does not divide hidden_size ({width})")]
    return []
