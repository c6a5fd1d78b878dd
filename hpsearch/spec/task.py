"""What a task is to everything but the training loop: its data, options, model, objectives and test metric.

Nothing outside `hpsearch.tasks` asks which task a study has; it asks the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hpsearch.errors import Problem, UsageError
from hpsearch.registry import TASKS
from hpsearch.spec.sections import SourceSpec
from hpsearch.spec.settings import ModelSettings, Strict

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from hpsearch.data.shards import DataCard
    from hpsearch.metrics.metric import Metric
    from hpsearch.records import TrialConfig
    from hpsearch.tasks.base import Task


Marks = Literal["stream", "before", "behind", "chat"]
Row = dict[str, Any]
LABEL_SEPARATOR = "|"
"""Between the labels of one example, where several are given as text."""


class NoOptions(Strict):
    """Of a task that has none."""


class UnusableRowError(Exception):
    """A row holds no example, for a reason that may hold of others: they are left out, and counted by reason."""


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """Tokens of an example all of whose fields are read as one sequence."""

    ids: list[int]
    parts: list[int]
    """Of each token, which part of the example it is; 0 if nothing is to predict it."""


class TaskDefinition:
    """A task. Subclass it, and name the class in a study file (`task: package.module:Class`) or by an entry point.

    A definition is made once in a process and holds no state. Loading its module should import neither torch nor
    transformers where it can: commands that only read a study load it, too.
    """

    name: ClassVar[str]
    """An identifier. A study file has the task's options under it."""
    options: ClassVar[type[Strict]] = NoOptions
    as_written: ClassVar[tuple[str, ...]] = ()
    """Options that are text as it stands in the file, whatever YAML takes it for: `1`, `yes`."""
    file_options: ClassVar[tuple[str, ...]] = ()
    """Options that may name a file: its text takes the name's place."""

    fields: ClassVar[tuple[str, ...]] = ("text",)
    """Names of the texts of an example, in the order of its columns; the last is what the model predicts. Two of them
    may each have a language, a vocabulary and a file whose lines are aligned with the other's."""
    has_labels: ClassVar[bool] = False
    """Whether an example has labels, in the column behind its texts: splits are stratified by them."""
    marks: ClassVar[Marks] = "stream"
    """Where end-of-text stands. In a stream it parts the documents, which are read one after the other; elsewhere an
    example is cut to the model's context, and padded. `chat`: all fields of an example are one sequence, which
    `encode` makes of them."""
    compares_text: ClassVar[bool] = False
    """Whether the last text of held-out examples is kept as it is, to score what the model writes in its place."""
    corpora: ClassVar[tuple[str, ...]] = ()
    """Built-in corpora (`data.corpus`) that fit."""

    architecture: ClassVar[str]
    """Of models that are trained from scratch, where the study names none."""
    objectives: ClassVar[tuple[str, ...]] = ("loss",)
    """What a study may search for: the loss, and metrics of which more is better, of the validation split."""
    metric: ClassVar[str]
    """The test metric that trials are ranked by, where the study names none."""
    ranking_metrics: ClassVar[tuple[str, ...]] = ()
    """Test metrics that a study may name in its place."""
    loss_unit: ClassVar[str] = "nats per token"

    @property
    def is_stream(self) -> bool:
        return self.marks == "stream"

    @property
    def is_pair(self) -> bool:
        return len(self.fields) == 2 and not self.is_chat

    @property
    def is_chat(self) -> bool:
        return self.marks == "chat"

    @property
    def sequences(self) -> tuple[str, ...]:
        """Names of the arrays that an example's tokens stand in."""
        return ("text",) if self.is_chat else self.fields

    def columns(self, data: SourceSpec) -> tuple[str, ...]:
        """The columns that an example is read from: one for each field, then that of the labels."""
        texts = (data.source_column, data.target_column) if self.is_pair else (data.column,)
        return (*texts, data.label_column) if self.has_labels else texts

    def row_reader(self, data: SourceSpec, options: Any) -> Callable[[Row], tuple[str, ...]] | None:
        """What reads the fields of an example from a row of one file, where they are no columns of text.

        It raises DataError for a row that cannot be meant, and UnusableRowError.
        """
        return None

    def words(self, field: str, text: str) -> str:
        """What a tokenizer is trained on of a field."""
        return text

    def encode(self, examples: list[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase) -> list[TokenSequence]:
        """The one sequence of each example, where `marks` is `chat`. Raises DataError."""
        raise NotImplementedError  # as build

    def chat_template(self, options: Any, own: str | dict[str, str] | None, *, begins: bool) -> str:
        """The chat template of prepared data, where `marks` is `chat`. Raises DataError.

        `own` is the tokenizer's, or several by name; `begins` says whether it puts a token before every text.
        """
        raise NotImplementedError  # as build

    def metric_names(self, options: Any) -> tuple[str, ...]:
        """What trials may be ranked by; the first is the usual one."""
        return tuple(dict.fromkeys((self.metric, *self.ranking_metrics)))

    def objective_names(self, options: Any) -> tuple[str, ...]:
        return self.objectives

    def labels(self, written: str, options: Any) -> list[str]:
        """The labels of an example, as its column has them; several are separated by LABEL_SEPARATOR."""
        return [written]

    def split_key(self, text: str) -> str:
        """Examples whose first texts have the same key fall into the same split."""
        return text

    def data_options(self, options: Any) -> dict[str, Any]:
        """Of the options, what decides the prepared data: it is prepared again when this changes."""
        return {}

    def prefix(self, field: str, options: Any) -> str:
        """What a pretrained model wants in front of the texts of a field."""
        return ""

    def metrics(self) -> Sequence[Metric]:
        """Test metrics of its own, beside those of `hpsearch.metrics.statistics`."""
        return ()

    def problems(self, options: Any) -> Iterator[Problem]:
        """Mistakes that only show when several options are seen together; paths begin with the task's name."""
        return iter(())

    def check_score(self, options: Any) -> None:
        """Raise UsageError when the scores cannot be taken on this machine."""

    def check_data(self, options: Any, card: DataCard) -> None:
        """Raise DataError when the options do not fit the prepared data."""

    def notes(self, options: Any, card: DataCard) -> Iterator[str]:
        """What a person should know of the prepared data before trials run on it, a sentence each."""
        return iter(())

    def left_out(self, folder: Path, split: str, context_length: int) -> int:
        """How many examples of prepared data are left out, because a context of this length cannot hold them."""
        return 0

    def check_model(self, settings: ModelSettings, options: Any, card: DataCard) -> None:
        """Raise UsageError if the task cannot build and train such a model. Found out before any trial starts."""

    def build(self, config: TrialConfig) -> Task:
        """The task of a trial, its data opened and its model built (weights drawn from torch's current seed)."""
        raise NotImplementedError  # each task has its own; `task_named` refuses one that has none


@cache
def task_named(name: str) -> TaskDefinition:
    """The definition of a name that a study file may have under `task`. Raises UsageError."""
    found = TASKS.load(name)
    if not (isinstance(found, type) and issubclass(found, TaskDefinition)):
        raise UsageError(f"task {name}: expected a class of hpsearch.spec.task.TaskDefinition, got {found!r}")
    definition = found()
    if name not in TASKS.built_in:
        _check(name, definition)
    return definition


def known_task(name: str) -> TaskDefinition | None:
    """The definition, where a study is only read: None when the module of a task of one's own is not here."""
    try:
        return task_named(name)
    except UsageError:
        return None


def _check(name: str, definition: TaskDefinition) -> None:
    """Raise UsageError for a task that lacks something; record its metrics."""
    from hpsearch.metrics.statistics import BUILT_IN, METRICS

    for attribute in ("name", "architecture", "metric"):
        if not isinstance(getattr(definition, attribute, None), str):
            raise UsageError(f"task {name}: the class has no {attribute}, which must be text")
    if type(definition).build is TaskDefinition.build:
        raise UsageError(f"task {name}: the class has no method build")
    for method in ("row_reader", "encode", "chat_template") if definition.is_chat else ():
        if getattr(type(definition), method) is getattr(TaskDefinition, method):
            raise UsageError(f"task {name}: its marks are `chat`, and the class has no method {method}")
    if not 1 <= len(definition.fields) <= 2:
        raise UsageError(f"task {name}: expected one field or two, got {definition.fields!r}")
    for metric in definition.metrics():
        if metric.name in BUILT_IN:
            raise UsageError(f"task {name}: hpsearch has a metric {metric.name} already; give yours another name")
        METRICS[metric.name] = metric
    if definition.metric not in METRICS:
        raise UsageError(f"task {name}: no metric is called {definition.metric}; there are {', '.join(METRICS)}")
    for objective in definition.objectives:
        if objective != "loss" and not (objective in METRICS and METRICS[objective].higher_is_better):
            raise UsageError(f"task {name}: the objective {objective} is no metric of which more is better")
