"""The sections of a study file: what each key is, its bounds and its default."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import WithJsonSchema

from hpsearch.registry import SAMPLERS
from hpsearch.spec.settings import MOST, Strict

MOST_MINUTES = 10_000_000.0
"""About 19 years: timers of the system take no longer ones."""

Corpus = Literal["python_docs", "python_docstrings", "ui_messages", "python_areas", "python_functions"]
TARGET_EVALUATIONS = 40
"""Evaluations of the longest run of a study: what the windows of the rule are made for."""


SplitOn = Literal["blank_line", "line", "end_of_text", "file"]
_Names = Annotated[list[str], WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}]}), Field(min_length=1)]


class AlignedFiles(Strict):
    """Two plain text files, or as many of each: the translation of a line of one is the same line of the other."""

    source: _Names
    target: _Names

    @field_validator("source", "target", mode="before")
    @classmethod
    def _one(cls, files: Any) -> Any:
        return [files] if isinstance(files, str) else files

    @field_validator("target")
    @classmethod
    def _as_many(cls, files: list[str], info: ValidationInfo) -> list[str]:
        sources = info.data.get("source", files)
        if len(sources) != len(files):
            raise ValueError(f"expected as many source files ({len(sources)}) as target files ({len(files)})")
        return files


class FileSplits(Strict):
    """Local files of text: .txt, .jsonl (.json, .ndjson), .csv, .tsv, .parquet; all but the last also as .gz, .bz2, .xz
    or .zst. Names are relative to the study file; a name may be a pattern, or a folder: all of its files, or what
    `save_to_disk` of `datasets` has written there."""

    train: list[str] | AlignedFiles
    validation: list[str] | AlignedFiles = Field(default_factory=list, description="Without it, a fraction of train.")
    test: list[str] | AlignedFiles = Field(default_factory=list, description="Without it, a fraction of train.")

    @field_validator("train")
    @classmethod
    def _some(cls, files: list[str] | AlignedFiles) -> list[str] | AlignedFiles:
        if not files:
            raise ValueError("expected at least one file")
        return files


class SourceSpec(Strict):
    """Where text comes from: exactly one of corpus, files and hub."""

    corpus: Corpus | None = Field(None, description="Built-in text, read at run time from the running Python.")
    files: FileSplits | None = Field(None, description="A path, a list of paths, or train, validation and test.")
    hub: str | None = Field(None, description="A dataset id for `datasets`, such as Salesforce/wikitext.")
    config: str | None = Field(None, description="Configuration of the hub dataset.")
    revision: str | None = Field(None, description="Commit or tag of the hub dataset.")
    max_tokens: int | None = Field(
        None,
        ge=1000,
        le=10**13,
        description="Read about so many tokens of its training text at most, from the beginning, at four bytes each; a "
        "data set of the hub is then streamed, and never fetched as a whole.",
    )
    column: str = Field(
        "text",
        description="Column or key that holds the text (in instruction tuning a list of messages, if it is not called "
        "messages); `meta.text` is the key text of the column meta.",
    )
    label_column: str = Field("label", description="Column that holds the label, or a list of labels.")
    source_column: str = Field("source", description="Column that holds the text to translate.")
    target_column: str = Field("target", description="Column that holds its translation.")
    group_column: str | None = Field(
        None,
        description="Column that names what a text is a piece of, such as its document or its author: all of one stand "
        "in the same split.",
    )
    whole_files: bool | None = Field(
        None,
        description="Whether all texts of a file stand in the same split. By default those of plain text files do, if "
        "they are paragraphs, and there are at least 20 files.",
    )
    split_on: SplitOn | Literal["auto"] = Field(
        "auto",
        description="What parts the texts of a plain text file. auto: end-of-text marks, blank lines or lines, by how "
        "the file begins.",
    )
    encoding: str | None = Field(None, description="Of local files: utf-8 unless it is another one, such as cp1252.")
    delimiter: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="Between the columns of CSV files; by default comma, semicolon, tab or bar, by the first line.",
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
    def _one_source(self) -> Self:
        given = [name for name in self._KINDS if getattr(self, name)]
        if len(given) != 1:
            kinds = f"{', '.join(self._KINDS[:-1])} and {self._KINDS[-1]}"
            raise ValueError(f"expected exactly one of {kinds}, got {' and '.join(given) or 'none'}")
        if self.hub is None and (self.config or self.revision):
            raise ValueError("config and revision belong to hub")
        if self.files is None and (
            self.encoding or self.delimiter or self.split_on != "auto" or self.whole_files is not None
        ):
            raise ValueError("split_on, whole_files, encoding and delimiter belong to files")
        has_columns = self.hub is not None or isinstance(getattr(self.files, "train", None), list)
        if self.group_column is not None and not has_columns and not getattr(self, "mix", None):
            raise ValueError("group_column belongs to files with columns, and to hub")
        if self.group_column is not None and self.whole_files:
            raise ValueError("group_column and whole_files each say what stays in one split; give one of them")
        return self

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, name: str | None) -> str | None:
        try:
            return name and codecs.lookup(name).name
        except LookupError:
            raise ValueError(f"no encoding is called {name!r}; expected one such as utf-8, cp1252 or utf-16") from None

    _KINDS: ClassVar[tuple[str, ...]] = ("corpus", "files", "hub")


class MixedSourceSpec(SourceSpec):
    """One of several sources that are mixed."""

    weight: float | None = Field(
        None,
        gt=0,
        description="Its part of the training text, beside the weights of the others; of what is too much, a part is "
        "left out. By default all of it is used.",
    )


class DataSpec(SourceSpec):
    """Where the text comes from, exactly one of corpus, files, hub and mix, and how it is split."""

    mix: list[MixedSourceSpec] = Field(
        default_factory=list,
        max_length=255,
        description="Several sources that are read as one, each with columns of its own.",
    )
    source_language: str | None = Field(
        None, description="What a multilingual tokenizer calls the language to translate from: eng_Latn, en_XX, en."
    )
    target_language: str | None = Field(
        None, description="The language to translate to; it decides what BLEU takes for words, too."
    )
    max_examples: int | None = Field(None, ge=10, le=MOST, description="Use at most n examples of each split.")
    fraction: float = Field(1.0, gt=0, le=1, description="Part of the training split to use.")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="Part split off when there is no validation split.")
    test_fraction: float = Field(0.1, gt=0, lt=1, description="Part split off when there is no test split.")
    rare_labels: Literal["keep", "drop"] = Field(
        "keep",
        description="Labels with too few examples to stand in all splits: they stand in training at least, or are left "
        "out with their examples.",
    )

    @model_validator(mode="after")
    def _fitting(self) -> DataSpec:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction leave nothing to train on")
        for name in ("column", "label_column", "source_column", "target_column", "group_column", "max_tokens"):
            if self.mix and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to the sources of the mix: give it to each that needs it")
        if 0 < sum(source.weight is not None for source in self.mix) < len(self.mix):
            raise ValueError("some sources of the mix have a weight and others none; give all of them one, or none")
        return self

    @property
    def sources(self) -> Sequence[SourceSpec]:
        return self.mix or [self]

    _KINDS: ClassVar[tuple[str, ...]] = ("corpus", "files", "hub", "mix")


class TokenizerSpec(Strict):
    """A byte-pair tokenizer trained on the training split alone."""

    shared: bool = Field(True, description="One vocabulary for both languages of a translation, or one each.")
    sample_mb: float | None = Field(
        100.0,
        gt=0,
        le=MOST,
        description="Training text that it is trained on, in 10^6 bytes; of more, a sample. null: all of it.",
    )
    vocab_size: Annotated[int, Field(ge=258, le=1_000_000)] | Literal["auto"] = Field(
        "auto",
        description="Entries, the 256 bytes and end-of-text included. auto: by the amount of training text, 1,024 for "
        "up to half a megabyte, 8,192 for a hundred, at most 32,768.",
    )

    def entries(self, text_bytes: int) -> int:
        """The size of the vocabulary for so much training text.

        A power of two near 1,024 (bytes / 300,000)^0.4: with the text grows the model that suits it, and slower than
        that the vocabulary (Tao et al., arXiv 2407.13623).
        """
        if self.vocab_size != "auto":
            return self.vocab_size
        wanted = 1024 * (max(1, text_bytes) / 300_000) ** 0.4
        return int(min(32_768, max(1024, 2 ** round(math.log2(wanted)))))


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
        2, ge=0, le=MOST, description="Times that a trial whose worker died resumes from its checkpoint."
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


_SAMPLER_SCHEMA = {
    "anyOf": [{"enum": list(SAMPLERS.built_in)}, {"type": "string", "pattern": "^[\\w.-]+(:\\w+)?$"}],
    "default": "tpe",
}
PrunerName = Literal["promote", "median", "percentile", "asha", "hyperband", "none"]


class SamplerSpec(Strict):
    """How Optuna proposes settings."""

    name: Annotated[str, WithJsonSchema(_SAMPLER_SCHEMA)] = Field(
        "tpe", description="One of these, of an installed package, or package.module:name of your own."
    )
    startup_trials: int = Field(
        10,
        ge=0,
        le=MOST,
        description="Trials, spread evenly over the space, before a model is trusted (tpe, gp, cmaes).",
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        is_recorded = bool(info.context and info.context.get("recorded"))  # its package may not be here any more
        if not is_recorded and (problem := SAMPLERS.problem(name)) is not None:
            raise ValueError(problem)
        return name


class UnpromisingSpec(Strict):
    """How trials are pruned against each other. Rungs (but those of promote) and warm-up count epochs of the run."""

    rule: PrunerName = Field(
        "promote",
        description="promote: a trial pauses, with its checkpoint, at parts of its run and resumes when it is among "
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
        description="One in n is promoted at each rung (promote, asha, hyperband); of promote more where the order "
        "at a rung is not the order later.",
    )


class OverfitRule(Strict):
    """The windows and thresholds of the verdict.

    Windows count evaluations of a run that has some 40 of them. In one with many more, neighbours are averaged: seven
    of three hundred values say little of where a run is going.
    """

    window: int = Field(7, ge=4, le=MOST, description="Validation losses looked at for a rising trend.")
    z: float = Field(1.96, gt=0, description="Mann-Kendall z above which the trend counts as rising (1.96: p < 0.025).")
    patience: int = Field(7, ge=2, le=MOST, description="Evaluations without a new best that end the run as well.")
    warmup: float = Field(0.2, ge=0, lt=1, description="Part of the run before which it is too early to tell.")
    explode_factor: float = Field(
        2.0, gt=1, description="Training loss above this multiple of its first value counts as exploding."
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
