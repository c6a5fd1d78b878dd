"""What translation is to a study: pairs of texts, and how they are decoded and scored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hpsearch.spec.settings import MOST, Strict
from hpsearch.spec.task import TaskDefinition

if TYPE_CHECKING:
    from hpsearch.data.shards import DataCard
    from hpsearch.records import TrialConfig
    from hpsearch.spec.settings import ModelSettings
    from hpsearch.tasks.base import Task


class TranslationOptions(Strict):
    """How translations are decoded and scored on the test split."""

    num_beams: int = Field(1, ge=1, le=MOST, description="1 decodes greedily.")
    source_prefix: str = Field("", description="Put before every source, as T5 was trained to expect.")
    samples: int = Field(5, ge=0, le=MOST, description="Decoded sentences kept with each trial.")
    bleu_tokenizer: Literal[
        "auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "flores101", "flores200", "spBLEU-1K", "none"
    ] = Field(
        "auto",
        description="What BLEU takes for words, as sacrebleu calls it. auto: zh for Chinese, char for other languages "
        "without spaces between words, else 13a; by data.target_language or the script of the test split.",
    )


class TranslationDefinition(TaskDefinition):
    name = "translation"
    options = TranslationOptions
    fields = ("source", "target")
    marks = "behind"
    compares_text = True
    corpora = ("ui_messages",)
    architecture = "marian"
    objectives = ("loss", "bleu")
    metric = "bleu"
    ranking_metrics = ("chrf", "ter")

    def split_key(self, text: str) -> str:
        """Lower case without digits and punctuation: near-equal sources fall into the same split."""
        return " ".join(re.sub(r"[\W\d_]+", " ", text.lower()).split()) or text

    def data_options(self, options: TranslationOptions) -> dict[str, Any]:
        return {"source_prefix": options.source_prefix}

    def prefix(self, field: str, options: TranslationOptions) -> str:
        return options.source_prefix if field == "source" else ""

    def check_score(self, options: TranslationOptions) -> None:
        from hpsearch.metrics.bleu import metric

        if options.bleu_tokenizer != "auto":
            metric(options.bleu_tokenizer)

    def notes(self, options: TranslationOptions, card: DataCard) -> Iterator[str]:
        from hpsearch.metrics import bleu

        chosen = options.bleu_tokenizer
        if chosen in bleu.BY_SPACES and card.bleu_tokenizer not in (None, *bleu.BY_SPACES):
            yield (
                f"translation.bleu_tokenizer: {chosen} finds words between spaces, and the references have none: BLEU "
                f"is next to 0 for all outputs; {card.bleu_tokenizer} (or auto) fits them"
            )
        if bleu.is_short(card.longest_reference):
            yield (
                f"no reference of the test split has {bleu.ORDER} words: BLEU counts the shorter sequences that there "
                "are"
            )

    def check_model(self, settings: ModelSettings, options: TranslationOptions, card: DataCard) -> None:
        from hpsearch.tasks.translation.training import check_model

        check_model(settings, card)

    def build(self, config: TrialConfig) -> Task:
        from hpsearch.tasks.translation.training import Translation

        options = TranslationOptions.model_validate(config.options)
        return Translation(Path(config.data), config.model, options, config.training.label_smoothing)
