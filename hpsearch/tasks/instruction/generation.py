"""Answers that a model writes: in batches, with a key-value cache, greedy or sampled, up to what ends them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hpsearch.data.pretrained import load_tokenizer
from hpsearch.data.tokenizers import TOKENIZER_FOLDER
from hpsearch.models import architecture
from hpsearch.tasks.base import EVALUATION_TOKENS, Batch, Indices, within_budget
from hpsearch.tasks.instruction.chat import spoken
from hpsearch.tasks.instruction.definition import GenerationOptions


class Writer:
    """Writes answers to prompts with a model as it stands."""

    def __init__(
        self,
        model: PreTrainedModel,
        data: Path,
        options: GenerationOptions,
        *,
        answers: NDArray[np.int64],
        end_id: int,
        padding_id: int,
        most: int,
        length: int,
        seed: int,
    ) -> None:
        """`answers` are the last tokens of answers that are learnt, of shape (answers, tokens): those among them that
        are no text end an answer. Answers have `most` tokens at most; with their prompt they fit into `length`.

        The model is told so, too, so that `generate` does the same wherever it is exported to.
        """
        self._model, self._data, self._options = model, data, options
        self.header = ""
        """What stands before the words of every answer, and is no part of them: `final` of gpt-oss."""
        self._most, self._length, self._seed, self._padding = most, length, seed, padding_id
        added = {number for number, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        special = added | {*self._tokenizer.all_special_ids}
        self._stops = sorted({end_id} | ({*np.unique(answers).tolist()} & special))
        sampling = {"temperature": options.temperature} if options.temperature else {}
        architecture.set_generation(
            model,
            bos_token_id=model.generation_config.bos_token_id or end_id,
            eos_token_id=self._stops,
            pad_token_id=padding_id,
            do_sample=bool(options.temperature),
            max_new_tokens=most,
            num_beams=1,
            **sampling,
        )

    @property
    def contract(self) -> dict[str, Any]:
        """What decides the answers beside the model."""
        found: dict[str, Any] = {"max_new_tokens": self._most, "temperature": self._options.temperature}
        if self._options.temperature:
            found["seed"] = self._seed
        return {**found, **({"stop": self._options.stop} if self._options.stop else {})}

    def batches(self, prompt_lengths: NDArray[np.int64]) -> list[Indices]:
        """Prompts, by their numbers, whose answers are written at once.

        Where the context leaves less room than the longest answer needs, all of a batch have the same room.
        """
        room = self._room(prompt_lengths)
        found: list[Indices] = []
        for size in np.unique(room):
            own = np.flatnonzero(room == size)
            batches = within_budget(prompt_lengths[own] + size, max(EVALUATION_TOKENS, self._length))
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
            # What is drawn for a prompt hangs on its batch alone, and not on what was trained before.
            torch.manual_seed(self._seed)
            ids: Any = self._model.generate(
                input_ids=prompts, attention_mask=is_text, max_new_tokens=room, use_cache=True, **more
            )
        answers: Tensor = ids[:, prompts.shape[1] :]
        return answers

    def texts(self, answers: Tensor) -> list[str]:
        """What the answers say, without what ends them and without thoughts before them."""
        rows = []
        for row in answers.tolist():
            end = next((place for place, token in enumerate(row) if token in self._stops), len(row))
            rows.append(row[:end])
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [spoken(self._before_stop(text)).removeprefix(self.header).strip() for text in texts]

    def _before_stop(self, text: str) -> str:
        places = [place for stop in self._options.stop if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text

    def _room(self, prompt_lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that an answer may have: the last one is read no more."""
        return np.minimum(self._most, np.maximum(1, self._length + 1 - prompt_lengths))

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._data / TOKENIZER_FOLDER)
