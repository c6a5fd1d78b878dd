"""What instruction tuning is to a study: its forms of data, its options, and the metrics that it can be ranked by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic.json_schema import WithJsonSchema

from hpsearch.errors import DataError, Problem
from hpsearch.spec.sections import SourceSpec
from hpsearch.spec.settings import MOST, Strict
from hpsearch.spec.task import Row, TaskDefinition, TokenSequence
from hpsearch.tasks.instruction.forms import RowReader, conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hpsearch.data.shards import DataCard
    from hpsearch.records import TrialConfig
    from hpsearch.spec.settings import ModelSettings
    from hpsearch.tasks.base import Task

_USUAL_COLUMN = SourceSpec.model_fields["column"].default


class MessageTemplate(Strict):
    """Messages made of a row's columns: a column's name in braces stands for what it holds."""

    prompt: str
    completion: str
    system: str | None = None


class GenerationOptions(Strict):
    """How answers are generated, to be scored as text."""

    max_new_tokens: int | None = Field(
        None, ge=1, le=MOST, description="Tokens of an answer at most; by default those of the longest in training."
    )
    temperature: float = Field(0.0, ge=0, le=10, description="0 takes the likeliest token each time.")
    stop: Annotated[
        list[str], WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
    ] = Field(default_factory=list, description="Texts that end an answer, and are no part of it, beside end-of-text.")
    max_examples: int | None = Field(
        200,
        ge=1,
        le=MOST,
        description="Of the validation split, where a score of generated text is the objective: the same for all "
        "trials. The test split is always scored whole.",
    )
    samples: int = Field(5, ge=0, le=MOST, description="Answers that `show` and the reports have beside references.")

    @field_validator("stop", mode="before")
    @classmethod
    def _one(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _some_text(cls, stop: list[str]) -> list[str]:
        if not all(stop):
            raise ValueError("expected text, got ''")
        return stop


class InstructionOptions(Strict):
    """How conversations are read, which tokens are learnt, and how answers are generated."""

    template: MessageTemplate | None = Field(
        None,
        description="For rows of other columns: {prompt: 'Translate to French: {en}', completion: '{fr}'}, and system.",
    )
    chat_template: str | None = Field(
        None,
        description="A file with a chat template (Jinja), or the template itself; by default the tokenizer's own, and "
        "a plain one where it has none.",
    )
    loss_on: Literal["assistant", "completion", "all"] = Field(
        "assistant",
        description="What is learnt, and counts in losses and perplexity: all that the assistant says, its last answer "
        "alone, or every token.",
    )
    packing: Annotated[
        Literal["auto", "true", "false"],
        WithJsonSchema({"enum": ["auto", True, False, "true", "false"], "default": "auto"}),
    ] = Field(
        "auto",
        description="Whether several conversations share a sequence, of which none sees another. auto: where the "
        "architecture can keep them apart.",
    )
    labels: Annotated[
        list[str], WithJsonSchema({"type": "array", "items": {"type": ["string", "number", "boolean"]}})
    ] = Field(
        default_factory=list,
        max_length=1000,
        description="The possible answers, if there are few: then F1 and accuracy are scores, too.",
    )
    f1: Literal["macro", "micro", "weighted"] = Field("macro", description="The F1 of labels that is called f1.")
    generation: GenerationOptions = Field(default_factory=GenerationOptions)

    @field_validator("packing", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: "true", False: "false"}[value] if isinstance(value, bool) else value

    @field_validator("labels", mode="before")
    @classmethod
    def _texts(cls, labels: Any) -> Any:
        if not isinstance(labels, list):
            return labels
        texts = (json.dumps(label) if isinstance(label, int | float) else label for label in labels)
        return [label.strip() if isinstance(label, str) else label for label in texts]

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str]) -> list[str]:
        if len({*labels}) < len(labels) or len(labels) == 1:
            raise ValueError("expected at least two labels, each once")
        return labels


TEXT_METRICS = ("rouge_l", "token_f1", "exact_match", "bleu", "chrf")
LABEL_METRICS = ("f1", "f1_macro", "f1_micro", "f1_weighted", "accuracy")


class InstructionDefinition(TaskDefinition):
    name = "instruction"
    options = InstructionOptions
    file_options = ("chat_template",)
    fields = ("prompt", "answer")
    marks = "chat"
    compares_text = True
    corpora = ("python_functions",)
    architecture = "gpt2"
    objectives = ("loss", *TEXT_METRICS, "f1", "accuracy")
    metric = "rouge_l"
    ranking_metrics = ("perplexity", "bits_per_byte", *TEXT_METRICS, *LABEL_METRICS)

    def row_reader(self, data: SourceSpec, options: InstructionOptions) -> Callable[[Row], tuple[str, ...]]:
        return RowReader(
            column=None if data.column == _USUAL_COLUMN else data.column,
            template=options.template.model_dump() if options.template else None,
            labels=options.labels,
        )

    def words(self, field: str, text: str) -> str:
        if field == "answer":
            return text
        return "\n".join(message["content"] for message in conversation(text, ""))

    def encode(self, examples: list[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase) -> list[TokenSequence]:
        from hpsearch.tasks.instruction.chat import ChatEncoder

        return ChatEncoder(tokenizer).encode([conversation(*example) for example in examples])

    def chat_template(self, options: InstructionOptions, own: str | dict[str, str] | None, *, begins: bool) -> str:
        from hpsearch.tasks.instruction.chat import default_template

        if options.chat_template is not None:
            return options.chat_template
        if isinstance(own, dict) and "default" not in own:
            raise DataError(
                f"instruction: the tokenizer has chat templates called {', '.join(own)} and none called default; name "
                "a file with one under instruction.chat_template"
            )
        return (own["default"] if isinstance(own, dict) else own) or default_template(begins=begins)

    def data_options(self, options: InstructionOptions) -> dict[str, Any]:
        return options.model_dump(include={"template", "chat_template", "labels"})

    def metric_names(self, options: InstructionOptions) -> tuple[str, ...]:
        names = super().metric_names(options)
        return names if options.labels else tuple(name for name in names if name not in LABEL_METRICS)

    def objective_names(self, options: InstructionOptions) -> tuple[str, ...]:
        return tuple(name for name in self.objectives if options.labels or name not in LABEL_METRICS)

    def problems(self, options: InstructionOptions) -> Iterator[Problem]:
        if options.template is not None and "{" not in options.template.prompt + options.template.completion:
            message = "expected names of columns in braces, such as {prompt: 'Translate: {en}', completion: '{fr}'}"
            yield Problem(path=("instruction", "template"), message=message)
        if options.f1 != "macro" and not options.labels:
            message = "F1 is of labels, which instruction.labels lists; expected it beside"
            yield Problem(path=("instruction", "f1"), message=message)

    def notes(self, options: InstructionOptions, card: DataCard) -> Iterator[str]:
        from hpsearch.metrics import bleu

        if bleu.is_short(card.longest_reference):
            yield (
                f"no answer of the test split has {bleu.ORDER} words: BLEU counts the shorter sequences that there are"
            )

    def left_out(self, folder: Path, split: str, context_length: int) -> int:
        from hpsearch.tasks.instruction.conversations import Conversations

        return Conversations(folder, split, context_length).left_out

    def check_model(self, settings: ModelSettings, options: InstructionOptions, card: DataCard) -> None:
        from hpsearch.tasks.instruction.training import check_model

        check_model(settings, options, card)

    def build(self, config: TrialConfig) -> Task:
        from hpsearch.tasks.instruction.training import Instruction

        options = InstructionOptions.model_validate(config.options)
        smoothing = config.training.label_smoothing
        return Instruction(
            Path(config.data), config.model, options, objective=config.objective, label_smoothing=smoothing
        )
