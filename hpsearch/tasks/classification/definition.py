"""What text classification is to a study: labels, and which F1 ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic.json_schema import WithJsonSchema

from hpsearch.errors import DataError, Problem
from hpsearch.spec.settings import Strict
from hpsearch.spec.task import LABEL_SEPARATOR, TaskDefinition

if TYPE_CHECKING:
    from hpsearch.data.shards import DataCard
    from hpsearch.records import TrialConfig
    from hpsearch.spec.settings import ModelSettings
    from hpsearch.tasks.base import Task


class ClassificationOptions(Strict):
    """What the ranking F1 averages, and what is being classified."""

    f1: Literal["macro", "micro", "weighted", "binary"] = Field("macro", description="The F1 that ranks.")
    positive_label: Annotated[
        str | None, WithJsonSchema({"type": ["string", "number", "boolean", "null"], "default": None})
    ] = Field(None, description="The label that binary F1 is about, as it is written in the data.")
    multi_label: bool = Field(False, description="An example may have several labels: a list, or text joined by '|'.")
    class_weights: bool = Field(False, description="Weigh training losses by inverse class frequency.")

    @field_validator("positive_label", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return json.dumps(value) if isinstance(value, bool | int | float) else value


class ClassificationDefinition(TaskDefinition):
    name = "classification"
    options = ClassificationOptions
    as_written = ("positive_label",)
    has_labels = True
    marks = "before"
    corpora = ("python_areas",)
    architecture = "bert"
    objectives = ("loss", "f1")
    metric = "f1"
    ranking_metrics = ("f1_macro", "f1_micro", "f1_weighted", "precision", "recall", "accuracy")
    loss_unit = "nats per text"

    def labels(self, written: str, options: ClassificationOptions) -> list[str]:
        return [label.strip() for label in written.split(LABEL_SEPARATOR)] if options.multi_label else [written]

    def data_options(self, options: ClassificationOptions) -> dict[str, Any]:
        return {"multi_label": options.multi_label}

    def problems(self, options: ClassificationOptions) -> Iterator[Problem]:
        if options.f1 == "binary" and options.positive_label is None:
            message = "binary F1 needs positive_label: the label that it is about"
            yield Problem(path=("classification", "f1"), message=message)

    def check_data(self, options: ClassificationOptions, card: DataCard) -> None:
        from hpsearch.data.splits import some

        positive = options.positive_label
        if positive is not None and positive not in card.labels:
            raise DataError(
                f"classification.positive_label: no example of the training split has the label {positive!r}; there "
                f"are {some([*card.label_counts['train']])}"
            )

    def check_model(self, settings: ModelSettings, options: ClassificationOptions, card: DataCard) -> None:
        from hpsearch.tasks.classification.training import check_model

        check_model(settings, card)

    def build(self, config: TrialConfig) -> Task:
        from hpsearch.tasks.classification.training import Classification

        options = ClassificationOptions.model_validate(config.options)
        return Classification(Path(config.data), config.model, options, config.training.label_smoothing)
