"""Conversations of real text, tokenizers with chat templates, and a small prepared study of them."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hpsearch.data.corpora import python_docs, python_functions

MARKS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
]


@cache
def _vocabulary() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text for (text,) in python_docs()][:400], trainer)
    return str(tokenizer.to_str())


def tokenizer_with(template: str | None, *, begin: str | None = None, end: str = "<|endoftext|>") -> Any:
    """A byte-level tokenizer that knows the marks of common templates as tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_vocabulary()),
        bos_token=begin,
        eos_token=end,
        pad_token="<|endoftext|>",
        chat_template=template,
    )


@cache
def _asked() -> list[tuple[str, str]]:
    return [(json.loads(prompt)[0]["content"], answer) for prompt, answer in python_functions()]


def conversations(count: int, *, seed: int = 0) -> list[list[dict[str, str]]]:
    """One turn to four, some with a system message, white space and words of other scripts among their texts."""
    draw = random.Random(seed)
    asked = _asked()
    texts = [text for (text,) in python_docs()]
    odd = ["  indented", "a\n\nb", "naïve – “yes”", "数は三つ", "x" * 40, "1.", "{}", "don't\t", "\nfirst\n"]
    found = []
    for _ in range(count):
        messages = [{"role": "system", "content": draw.choice(texts)}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 4)):
            question, answer = draw.choice(asked)
            answer = draw.choice([answer, answer, draw.choice(odd), draw.choice(texts)])
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        found.append(messages)
    return found


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file
