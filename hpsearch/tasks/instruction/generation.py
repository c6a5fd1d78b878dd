"""Answers that a model writes: in batches, with a key-value cache, greedy or sampled, up to what ends them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig
from transformers.modeling_utils import PreTrainedModel

from hpsearch.data.pretrained import load_tokenizer, special_ids
from hpsearch.data.tokenizers import TOKENIZER_FOLDER
from hpsearch.models import probe
from hpsearch.tasks.base import EVALUATION_TOKENS, Batch, Indices, within_budget
from hpsearch.tasks.instruction.definition import GenerationOptions
from hpsearch.tasks.instruction.forms import spoken


class Writer:
    """Writes answers to prompts with a model as it stands."""

    def __init__(
        self,
        model: PreTrainedModel,
        data: Path,
        options: GenerationOptions,
        *,
        answers: Sequence[NDArray[np.int64]],
        end_id: int,
        padding_id: int,
        most: int,
        length: int,
    ) -> None:
        """`answers` are tokens of answers that are learnt: what stands behind their words, and is no text, ends one.
        Answers have `most` tokens at most; with their prompt they fit into `length`.

        The model is told so, too, so that `generate` does the same wherever it is exported to. Raises UsageError.
        """
        self.frame = ("", "")
        """What stands before and behind the words of every answer, and is no part of them: `final` of gpt-oss."""
        self._model, self._options = model, options
        self._tokenizer: Any = load_tokenizer(data / TOKENIZER_FOLDER)
        self._most, self._length, self._padding = most, length, padding_id
        self._stops = sorted({end_id, *(token for answer in answers for token in self._ending(answer))})
        self._how = probe.how_it_generates(model)
        # What a pretrained model brings along, such as a repetition penalty, is no part of the score's contract.
        sampling = {"temperature": options.temperature, "top_k": 0} if options.temperature else {}
        model.generation_config = GenerationConfig(
            bos_token_id=model.generation_config.bos_token_id,
            eos_token_id=self._stops,
            pad_token_id=padding_id,
            do_sample=bool(options.temperature),
            max_new_tokens=most,
            use_cache=self._how.use_cache,
            **sampling,
        )

    @property
    def contract(self) -> dict[str, Any]:
        """What decides the answers beside the model."""
        found: dict[str, Any] = {"max_new_tokens": self._most, "temperature": self._options.temperature}
        return {**found, **({"stop": self._options.stop} if self._options.stop else {})}

    def batches(self, prompt_lengths: NDArray[np.int64]) -> list[Indices]:
        """Prompts, by their numbers, whose answers are written at once.

        Where the context leaves less room than the longest answer needs, all of a batch have the same room. All are of
        one length where padding would change answers.
        """
        room = self._room(prompt_lengths)
        kinds = room if self._how.pads else prompt_lengths
        found: list[Indices] = []
        for kind in np.unique(kinds):
            own = np.flatnonzero(kinds == kind)
            batches = within_budget(prompt_lengths[own] + room[own], max(EVALUATION_TOKENS, self._length))
            found += [own[batch] for batch in batches]
        return found

    def batch(self, prompts: Sequence[NDArray[np.int64]]) -> Batch:
        """Token ids, padded on the left, and which of them are text; each of shape (prompts, longest of them)."""
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), self._padding, np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
        is_text = np.arange(longest) >= longest - np.array([len(prompt) for prompt in prompts])[:, None]
        return Batch((torch.from_numpy(ids), torch.from_numpy(is_text.astype(np.int64))))

    def write(self, batch: Batch) -> Tensor:
        """Token ids of the answers, of shape (prompts, longest of the answers)."""
        prompts, is_text = batch.tensors
        room = int(self._room(np.array([int(is_text.sum(dim=1).max())]))[0])
        more: dict[str, Any] = {}
        if self._options.stop:
            more = {"stop_strings": self._options.stop, "tokenizer": self._tokenizer}
        devices = [prompts.device] if prompts.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            # What is drawn for a prompt hangs on its batch alone, and neither on the trial nor on what it drew before.
            torch.manual_seed(0)
            ids: Any = self._model.generate(input_ids=prompts, attention_mask=is_text, max_new_tokens=room, **more)
        answers: Tensor = ids[:, prompts.shape[1] :]
        return answers

    def texts(self, answers: Tensor) -> list[str]:
        """What the answers say, without what ends them and without thoughts before them."""
        before, behind = self.frame
        texts = (self._before_stop(text) for text in self.decoded(answers))
        return [text.removeprefix(before).removesuffix(behind).strip() for text in texts]

    def decoded(self, answers: Tensor) -> list[str]:
        """The text of answers up to what ends them, without thoughts before it."""
        rows = []
        for row in answers.tolist():
            end = next((place for place, token in enumerate(row) if token in self._stops), len(row))
            rows.append(row[:end])
        return [spoken(text) for text in self._decoded(rows)]

    def text_bytes(self, rows: Sequence[NDArray[np.int64]]) -> list[int]:
        """Bytes of UTF-8 of the text that tokens stand for."""
        return [len(text.encode(errors="replace")) for text in self._decoded([row.tolist() for row in rows])]

    def _decoded(self, rows: list[list[int]]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode(
            rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts

    def _ending(self, answer: NDArray[np.int64]) -> Iterator[int]:
        """Tokens behind the words of an answer that are no text."""
        for token in reversed(answer.tolist()):
            if token in self._special:
                yield token
            elif self._tokenizer.decode([token]).strip():
                return

    def _before_stop(self, text: str) -> str:
        places = [place for stop in self._options.stop if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text

    def _room(self, prompt_lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that an answer may have: the last one is read no more."""
        return np.minimum(self._most, np.maximum(1, self._length + 1 - prompt_lengths))

    @cached_property
    def _special(self) -> set[int]:
        return special_ids(self._tokenizer)
