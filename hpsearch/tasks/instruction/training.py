"""Instruction tuning: next-token loss of the answers, and scores of the answers that the model writes itself.

An example is a conversation. Where the architecture keeps them apart, several share a sequence of `context_length`
tokens. One that is longer loses its beginning; one whose last answer does not fit is left out.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from hpsearch.data.shards import SPLITS, DataCard, load_texts, read_card
from hpsearch.data.tokenizers import save_tokenizer
from hpsearch.errors import UsageError
from hpsearch.metrics import bleu, statistics, text
from hpsearch.metrics.sacrebleu_internals import sentence_statistics
from hpsearch.models import architecture, probe
from hpsearch.models.kernels import IGNORED, VocabularyLoss
from hpsearch.records import Score
from hpsearch.spec.settings import ModelSettings
from hpsearch.tasks.base import (
    EVALUATION_TOKENS,
    Batch,
    Evaluate,
    Indices,
    Scored,
    bucketed,
    cut,
    make_score,
    within_budget,
)
from hpsearch.tasks.instruction.chat import ANSWER, ASSISTANT
from hpsearch.tasks.instruction.conversations import Conversations
from hpsearch.tasks.instruction.definition import LABEL_METRICS, TEXT_METRICS, InstructionOptions
from hpsearch.tasks.instruction.forms import spoken
from hpsearch.tasks.instruction.generation import Writer
from hpsearch.tasks.windows import PackedExamples

_PROMPTS = " prompts"
"""Behind the name of a split: its prompts without answers, to be answered."""
_check_apart = partial(probe.check_apart, option="instruction.packing", instead="packing: auto")
_LOOKED_AT = 100
"""Answers that show what stands before and behind the words of all."""
_LEARNT = {"all": 0, "assistant": ASSISTANT, "completion": ANSWER}
"""The least part of a conversation that is predicted."""


def check_model(settings: ModelSettings, options: InstructionOptions, card: DataCard) -> None:
    tries: list[probe.Try] = [probe.how_it_generates]
    if options.packing == "true":
        tries.append(_check_apart)
    probe.check_model(AutoModelForCausalLM, settings, tries=tries, vocab_size=card.vocab_size)


class Instruction:
    """See `tasks.base.Task`. Indices are those of sequences, of one conversation or several."""

    def __init__(
        self,
        data: Path,
        settings: ModelSettings,
        options: InstructionOptions | None = None,
        *,
        objective: str = "loss",
        label_smoothing: float = 0.0,
    ) -> None:
        options = options or InstructionOptions()
        self._folder, self._options, self._objective = data, options, objective
        self._label_smoothing = label_smoothing
        self._card = read_card(data)
        self._length = settings.context_length
        self._learnt = _LEARNT[options.loss_on]
        self._splits = {split: Conversations(data, split, self._length) for split in SPLITS}
        for split, conversations in self._splits.items():
            if not len(conversations.kept):
                raise UsageError(
                    f"model.context_length: {self._length} tokens hold no whole answer of the {split} split"
                )
        self.model = architecture.build_model(AutoModelForCausalLM, settings, vocab_size=self._card.vocab_size)
        if options.packing == "true":
            _check_apart(self.model)
        self._is_packed = options.packing != "false" and probe.keeps_apart(self.model)
        self._packed = {
            split: PackedExamples(own.starts, own.lengths, self._length)
            for split, own in self._splits.items()
            if self._is_packed
        }
        generation = options.generation
        train = self._splits["train"]
        longest = generation.max_new_tokens or int(train.answer_lengths.max())
        self._writer = Writer(
            self.model,
            data,
            generation,
            answers=[train.answer(index) for index in range(min(_LOOKED_AT, len(train.kept)))],
            end_id=self._card.end_id,
            padding_id=self._card.padding_id,
            most=longest,
            length=self._length,
        )
        self._writer.frame = self._frame()
        self._longest = self._length if settings.pretrained is None else None
        self._loss = VocabularyLoss(self.model, input_ids=torch.arange(2)[None])
        self._bleu = bleu.metric(self._card.bleu_tokenizer or "13a", longest_reference=self._card.longest_reference)

    def _frame(self) -> tuple[str, str]:
        """What the template has stand before and behind the words of every answer, by some of the validation split."""
        own = self._splits["validation"]
        found = set()
        for index, answer in enumerate(self._texts("validation", "answer")[:_LOOKED_AT]):
            before, is_there, behind = self._writer.decoded(torch.from_numpy(own.answer(index))[None])[0].partition(
                answer
            )
            found.add((before, behind) if is_there else ("", ""))
        return found.pop() if len(found) == 1 else ("", "")

    @property
    def num_examples(self) -> dict[str, int]:
        if self._is_packed:
            return {split: packed.count for split, packed in self._packed.items()}
        return {split: len(own.kept) for split, own in self._splits.items()}

    def epoch_batches(self, order: np.random.Generator, batch_size: int) -> list[Indices]:
        if self._is_packed:
            return cut(self._packed["train"].of_epoch(order), batch_size)
        return bucketed(self._splits["train"].lengths, order, batch_size)

    def evaluation_batches(self, split: str) -> list[Indices]:
        if split.endswith(_PROMPTS):
            return self._prompt_batches(split.removesuffix(_PROMPTS))
        if self._is_packed:
            return cut(self._packed[split].in_order(), max(1, EVALUATION_TOKENS // self._length))
        return within_budget(self._splits[split].lengths)

    def batch(self, split: str, indices: Indices) -> Batch:
        """Inputs, their positions if conversations share sequences, and labels; each of shape (sequences, tokens).

        Of prompts: token ids, padded on the left, and which of them are text.
        """
        if split.endswith(_PROMPTS):
            own = self._splits[split.removesuffix(_PROMPTS)]
            return self._writer.batch([own.prompt(index) for index in indices])
        places, positions = self._layout(split, indices)
        is_read, own = places >= 0, self._splits[split]
        at = np.where(is_read, places, 0)
        inputs, labels = own.tokens[at].astype(np.int64), self._labels(split, at)
        inputs[~is_read], labels[~is_read] = self._card.padding_id, IGNORED
        arrays = (inputs, labels) if positions is None else (inputs, positions, labels)
        return Batch(tuple(map(torch.from_numpy, arrays)))

    def predicted(self, split: str, indices: Indices) -> int:
        places, _ = self._layout(split, indices)
        return int((self._labels(split, places[places >= 0]) != IGNORED).sum())

    def losses(self, batch: Batch) -> Tensor:
        inputs, *positions, labels = batch.tensors
        smoothing = self._label_smoothing if self.model.training else 0.0
        places = {"position_ids": positions[0]} if positions else {}
        return self._loss(labels, input_ids=inputs, label_smoothing=smoothing, **places)

    def score(self, evaluate: Evaluate) -> Scored:
        """Perplexity of the test split's answers, and scores of the answers that the model writes in their place."""
        examples = self._nats(evaluate)
        per_token = examples["nats"].sum()
        learnt = {**self._shared, "loss_on": self._options.loss_on}
        by_token = {**learnt, "unit": "token", "tokenizer": self._card.tokenizer}
        scores = [
            make_score("perplexity", math.exp(per_token / examples["tokens"].sum()), examples, by_token),
            make_score(
                "bits_per_byte",
                float(per_token / math.log(2) / examples["bytes"].sum()),
                examples,
                {**learnt, "unit": "byte of UTF-8"},
            ),
        ]
        began = time.perf_counter()
        outputs = self._answers(evaluate, "test")
        spent = time.perf_counter() - began
        own = self._splits["test"]
        prompts, references = (self._texts("test", name) for name in ("prompt", "answer"))
        names = (*TEXT_METRICS, *(LABEL_METRICS if self._options.labels else ()))
        found, contracts = self._judged(outputs, references, names)
        scores += [self._scored(name, found, contract) for name, contract in contracts.items()]
        samples = np.linspace(0, len(outputs) - 1, min(self._options.generation.samples, len(outputs)), dtype=int)
        details = {
            "samples": [
                {"source": _asked(prompts[index]), "reference": references[index], "output": outputs[index]}
                for index in samples
            ],
            "outputs": outputs,
            "generation": {"seconds": spent, "answers": len(outputs), "cut": own.cut, "left_out": own.left_out},
        }
        return Scored(scores=tuple(scores), details=details, examples={**examples, **found})

    def validation_score(self, evaluate: Evaluate) -> float:
        """The objective, of generated answers to a part of the validation split."""
        chosen = self._chosen("validation")
        outputs = self._answers(evaluate, "validation")
        references = self._texts("validation", "answer")
        wanted = (self._objective,)
        found, contracts = self._judged([outputs[i] for i in chosen], [references[i] for i in chosen], wanted)
        return self._scored(self._objective, found, contracts[self._objective]).value

    def save(self, folder: str) -> None:
        save_tokenizer(self._folder, folder, context_length=self._longest, sides=("left", "left"))

    @property
    def _shared(self) -> dict[str, Any]:
        return {
            "split": "test",
            "data": self._card.test_fingerprint,
            "context_length": self._length,
            "chat_template": self._card.chat_template,
        }

    def _texts(self, split: str, field: str) -> list[str]:
        """Of the conversations that fit; of answers what is said, without thoughts."""
        texts = load_texts(self._folder, split, field)
        kept = (texts[number] for number in self._splits[split].kept)
        return [spoken(text) if field == "answer" else text for text in kept]

    def _layout(self, split: str, indices: Indices) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Places in the stream that are read, -1 for none, and positions; each of shape (sequences, tokens)."""
        if self._is_packed:
            layout = self._packed[split].layout(indices)
            return layout.places, layout.positions
        own = self._splits[split]
        within = np.arange(own.lengths[indices].max())
        places = own.starts[indices, None] + within
        return np.where(within < own.lengths[indices, None], places, -1), None

    def _labels(self, split: str, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What is predicted at these places of the stream; IGNORED where nothing is."""
        own = self._splits[split]
        labels: NDArray[np.int64] = own.tokens[places + 1].astype(np.int64)
        labels[own.parts(places) < self._learnt] = IGNORED
        return labels

    def _nats(self, evaluate: Evaluate) -> dict[str, NDArray[Any]]:
        """Of each conversation of the test split: nats, tokens and bytes of what is learnt."""
        own = self._splits["test"]
        nats = np.zeros(len(own.tokens))
        for indices, losses in evaluate("test", self.losses):
            places, _ = self._layout("test", indices)
            is_read = places >= 0
            nats[places[is_read]] = losses.double().cpu().numpy()[is_read]
        labels = (self._labels("test", places) for places in own.places())
        learnt = [predicted[predicted != IGNORED] for predicted in labels]
        return {
            "nats": np.array([nats[places].sum() for places in own.places()]),
            "tokens": np.array([len(labels) for labels in learnt]),
            "bytes": np.array(self._writer.text_bytes(learnt), dtype=np.float64),
        }

    def _chosen(self, split: str) -> list[int]:
        """Conversations whose answers are judged: of the validation split some, from everywhere in it."""
        count = len(self._splits[split].kept)
        most = self._options.generation.max_examples if split == "validation" else None
        chosen = count if most is None else min(most, count)
        return [number * count // chosen for number in range(chosen)]

    def _prompt_batches(self, split: str) -> list[Indices]:
        chosen = np.array(self._chosen(split))
        batches = self._writer.batches(self._splits[split].prompt_lengths[chosen])
        return [chosen[batch] for batch in batches]

    def _answers(self, evaluate: Evaluate, split: str) -> list[str]:
        """What the model answers to the prompts of a split, in its order; "" where it is not asked."""
        outputs = [""] * len(self._splits[split].kept)
        for indices, ids in evaluate(split + _PROMPTS, self._writer.write):
            for index, answer in zip(indices, self._writer.texts(ids), strict=True):
                outputs[index] = answer
        return outputs

    def _judged(
        self, outputs: list[str], references: list[str], names: Sequence[str]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, dict[str, Any]]]:
        """What each answer adds to these scores, and the contract of each."""
        shared = {**self._shared, "generation": self._writer.contract}
        found: dict[str, NDArray[Any]] = {}
        contracts: dict[str, dict[str, Any]] = dict.fromkeys(names, shared)
        for name in names:
            match name:
                case "rouge_l":
                    words = text.rouge_words(references)
                    found[name] = text.rouge_l(outputs, references, words)
                    contracts[name] = {**shared, "words": words}
                case "token_f1":
                    found[name] = text.token_f1(outputs, references)
                case "exact_match":
                    found[name] = text.exact_match(outputs, references)
                case "bleu" | "chrf":
                    metric = self._bleu if name == "bleu" else CHRF(word_order=2)
                    found[name] = sentence_statistics(metric, outputs, references).astype(np.float64)
                    metric.corpus_score(outputs[:1], [references[:1]])  # without it there is no signature
                    contracts[name] = {**shared, "signature": str(metric.get_signature())}
                case _:
                    found |= self._classes(outputs, references)
                    contracts[name] = {**shared, **self._averaged(name)}
        return found, contracts

    def _classes(self, outputs: list[str], references: list[str]) -> dict[str, NDArray[Any]]:
        """Which label each answer is; what is none of them has none."""
        labels = self._options.labels
        numbers = {label: number for number, label in enumerate(labels)}
        identity = np.eye(len(labels) + 1, len(labels), dtype=np.uint8)
        truth, predicted = (identity[[numbers.get(one, -1) for one in texts]] for texts in (references, outputs))
        return {"truth": truth, "predicted": predicted}

    def _averaged(self, name: str) -> dict[str, Any]:
        """The contract of a score of labels."""
        average = self._options.f1 if name == "f1" else name.removeprefix("f1_")
        return {
            "labels": self._options.labels,
            "average": average,
            "positive_label": None,
            "zero_division": statistics.ZERO_DIVISION,
        }

    def _scored(self, name: str, found: dict[str, NDArray[Any]], contract: dict[str, Any]) -> Score:
        own = {part: found[part] for part in statistics.METRICS[name].needs}
        value = float(statistics.score(name, statistics.summands(name, own).sum(axis=0), contract))
        return make_score(name, value, own, contract)


def _asked(prompt: str) -> str:
    """The last message before an answer."""
    messages = json.loads(prompt)
    return str(messages[-1]["content"]) if messages else ""
