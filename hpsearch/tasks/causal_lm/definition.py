"""What causal language modelling is to a study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hpsearch.spec.settings import Strict
from hpsearch.spec.task import TaskDefinition

if TYPE_CHECKING:
    from hpsearch.data.shards import DataCard
    from hpsearch.records import TrialConfig
    from hpsearch.spec.settings import ModelSettings
    from hpsearch.tasks.base import Task


class CausalLMOptions(Strict):
    """How documents are read."""

    packing: Literal["continuous", "documents"] = Field(
        "continuous",
        description="What stands in a sequence of context_length tokens. continuous: the next tokens, over the ends of "
        "documents. documents: whole documents, and pieces of longer ones, as many as fit, of which none sees another. "
        "Perplexities of one are not those of the other.",
    )


class CausalLMDefinition(TaskDefinition):
    name = "causal_lm"
    options = CausalLMOptions
    corpora = ("python_docs", "python_docstrings")
    architecture = "gpt2"
    metric = "perplexity"
    ranking_metrics = ("bits_per_byte",)

    def check_model(self, settings: ModelSettings, options: CausalLMOptions, card: DataCard) -> None:
        from hpsearch.tasks.causal_lm.training import check_model

        check_model(settings, options, card)

    def build(self, config: TrialConfig) -> Task:
        from hpsearch.tasks.causal_lm.training import CausalLM

        return CausalLM(Path(config.data), config.model, CausalLMOptions.model_validate(config.options))
