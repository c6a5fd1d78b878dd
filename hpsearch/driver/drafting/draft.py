"""A study file written from what data looks like: task, columns, lengths, model, search space, budget; and why."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpsearch.data.tokenizers import train_tokenizer
from hpsearch.driver.drafting.looks import Look, look_at, said_in
from hpsearch.errors import DataError, SpecError, UsageError
from hpsearch.metrics import bleu
from hpsearch.spec.load import load_study
from hpsearch.spec.parsing.yaml_file import on_a_line
from hpsearch.spec.sections import TokenizerSpec

_TASKS = ("causal_lm", "translation", "classification", "instruction")
_LANGUAGE_MODELS = ("causal_lm", "instruction")
_PERCENTILE = 95
_TRIALS = 20
_LONGEST_MINUTES = 720
_EFFICIENCY = 0.35
"""Of a machine's speed in multiplying matrices, what training small models gets."""
_PRUNED = 0.6
"""Of what all trials would train to their ends, what pruning leaves."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A study file that was written, and what a person should know of it."""

    path: str
    task: str
    notes: list[str]
    """What was recognised, and what could not be told."""


@dataclass(frozen=True, kw_only=True)
class _Size:
    hidden: int
    heads: int
    layers: tuple[int, int]
    epochs: tuple[int, int]
    batches: tuple[int, ...]


_SIZES = {
    300_000: _Size(hidden=128, heads=4, layers=(1, 4), epochs=(4, 20), batches=(8, 16, 32)),
    5_000_000: _Size(hidden=192, heads=6, layers=(2, 6), epochs=(2, 10), batches=(16, 32, 64)),
    50_000_000: _Size(hidden=256, heads=8, layers=(2, 8), epochs=(1, 4), batches=(16, 32, 64)),
    10**15: _Size(hidden=512, heads=8, layers=(4, 12), epochs=(1, 1), batches=(32, 64, 128)),
}
"""By training tokens, up to so many: models that learn something from them, and overfit only towards the end."""
_CPU_HIDDEN = 256
_NO_SCRIPTS = ("COMBINING", "VARIATION", "MODIFIER", "FULLWIDTH", "HALFWIDTH", "KATAKANA-HIRAGANA", "IDEOGRAPHIC")
"""First words of the Unicode names of letters and marks that stand beside any script."""
_SCRIPT_SHARE = 0.05
"""Of letters: less of another script are names and quotations."""


def draft(names: Sequence[str], output: str, *, task: str | None, pretrained: str | None) -> Draft:
    """Write a study file for local files. Raises UsageError, DataError; overwrites nothing."""
    target = Path(output)
    if target.exists():
        raise UsageError(f"{output} is there already; name another file with -o, or remove it")
    if task is not None and task not in _TASKS:
        raise UsageError(f"--task {task}: expected {', '.join(_TASKS[:-1])} or {_TASKS[-1]}")
    look = look_at(names, task)
    if pretrained is not None and Path(pretrained).is_dir():
        pretrained = os.path.join(".", os.path.relpath(pretrained, target.parent))
    made = _Writer(look, target, task, pretrained)
    content = made.content()
    try:
        with target.open("x") as file:
            file.write(content)
        load_study(target)
    except SpecError:
        target.unlink()
        raise
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from error
    return Draft(path=output, task=made.task, notes=made.notes)


class _Writer:
    def __init__(self, look: Look, target: Path, task: str | None, pretrained: str | None) -> None:
        self._look, self._target, self._pretrained = look, target, pretrained
        self.notes = [f"the data: {look.form}"]
        self.task, self._why = (task, "as told") if task else _proposed(look)
        self._data: dict[str, Any] = {"files": self._files()}
        self._texts = self._choose_columns()
        self.notes.insert(1, f"task {self.task}: {self._why}")
        self.notes.insert(2, self._letters())

    def content(self) -> str:
        texts, look = self._texts, self._look
        if not any(texts):
            raise DataError("no row of the sample has text")
        examples = max(1, round(len(texts[-1]) / look.part))
        train = {*look.splits} == {"train"}
        share = 0.8 if train else 1.0
        size = sum(len(text.encode()) for own in texts for text in own)
        total = int(size / look.part * share)
        entries = TokenizerSpec().entries(total)
        lengths, tokens = self._measured(entries)
        wanted = int(np.percentile(lengths, _PERCENTILE))
        training_tokens = int(tokens / look.part * share)
        gpus = _gpus()
        chosen = next(one for most, one in _SIZES.items() if training_tokens <= most)
        hidden = chosen.hidden if gpus else min(chosen.hidden, _CPU_HIDDEN)
        # Of a conversation that is too long the answer may not fit, and it is left out.
        most = 1024 if gpus or self.task == "instruction" else 256
        context = min(max(32, 2 ** math.ceil(math.log2(max(2, wanted)))), most)
        if self.task in _LANGUAGE_MODELS:
            context = max(64, context)
        if self.task != "causal_lm" and np.mean(lengths > context) > 0.01:
            fate = "cut, or left out" if self.task == "instruction" else "cut"
            share = np.mean(lengths > context)
            self.notes.append(f"{share:.0%} of the texts are longer than {context} tokens and {fate}")
        if examples < 200:
            self.notes.append(f"{examples} examples are few: scores will hardly tell trials apart")
        minutes = self._minutes(chosen, hidden, entries, training_tokens, gpus)
        self.notes.append(
            f"about {training_tokens:,} training tokens, 95 % of the texts within {wanted}; "
            f"the whole search takes some {_duration(minutes)} on {_machine(gpus)}"
        )
        if minutes > _LONGEST_MINUTES:
            hours = _LONGEST_MINUTES // 60
            self.notes.append(f"that is long: the budget ends it after {hours} hours; or search a smaller space")
        return self._written(chosen, hidden, context, entries, minutes, fits=wanted <= context)

    def _written(self, size: _Size, hidden: int, context: int, entries: int, minutes: float, *, fits: bool) -> str:
        budget = min(_LONGEST_MINUTES, max(5, math.ceil(2 * minutes)))
        lines = [
            f"# Drafted by `hpsearch init` from {self._look.form}.",
            f"name: {on_a_line(re.sub(r'[^A-Za-z0-9._-]+', '-', self._target.stem).strip('-.') or 'study')}",
            f"task: {self.task:<20}# {self._why}",
            f"data: {on_a_line(self._data)}",
        ]
        if self.task == "classification" and self._is_multi:
            lines.append("classification: {multi_label: true}")
        if self._template:
            lines.append(f"instruction: {on_a_line({'template': self._template})}")
        if self._pretrained:
            lines += [
                f"model: {on_a_line({'pretrained': self._pretrained, 'context_length': context})}",
                "search:",
                "  learning_rate: {min: 1.0e-5, max: 5.0e-4, scale: log}",
                "  batch_size: [8, 16, 32]",
                "  num_epochs: {min: 1, max: 4}",
            ]
        else:
            lines.append(f"tokenizer: {{vocab_size: auto}}   # {entries:,} entries for this much text")
            model: dict[str, Any] = {"hidden_size": hidden, "num_heads": size.heads if hidden == size.hidden else 8}
            model["context_length"] = context
            if hidden <= _CPU_HIDDEN:
                model["init_std"] = 0.08 if hidden <= 128 else 0.05
            if self.task == "translation":
                model |= {"architecture": "marian", "config": {"scale_embedding": True}}
            is_language_model = self.task in _LANGUAGE_MODELS
            low, high = (1e-3, 2e-2) if is_language_model else (5e-4, 1e-2)
            layers = size.layers if is_language_model else (1, max(2, size.layers[1] // 2))
            lines += [
                f"model: {on_a_line(model)}   # 95 % of the texts fit into the context"
                if self.task != "causal_lm" and fits
                else f"model: {on_a_line(model)}",
                "search:",
                f"  learning_rate: {{min: {low:.1e}, max: {high:.1e}, scale: log}}",
                f"  batch_size: {list(size.batches)}",
                f"  num_layers: {{min: {layers[0]}, max: {layers[1]}}}",
                _epochs(size),
            ]
        lines += [
            f"budget: {{trials: {_TRIALS}, minutes: {budget}}}   # it takes some {_duration(minutes)} here",
            "seed: 0",
        ]
        return "\n".join(lines) + "\n"

    def _files(self) -> Any:
        """The files as the study file names them: relative to it."""

        def named(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: named(child) for key, child in value.items()}
            if isinstance(value, list):
                return named(value[0]) if len(value) == 1 else [named(child) for child in value]
            return os.path.relpath(value, self._target.parent)

        splits = named(self._look.splits)
        return splits["train"] if {*splits} == {"train"} else splits

    def _letters(self) -> str:
        """Which scripts the texts are written in, and what follows for their scores."""
        found: list[str] = []
        for texts in self._texts:
            scripts = bleu.scripts_of(texts)
            known = {name: count for name, count in scripts.items() if name not in _NO_SCRIPTS}
            main = [name for name, count in known.items() if count >= _SCRIPT_SHARE * sum(known.values())]
            found += [name if len(name) < 4 else name.capitalize() for name in main]
        said = f"the texts are written in {' and '.join(dict.fromkeys(found)) or 'no letters'}"
        if self.task == "translation":
            said += f"; BLEU's words are those of {bleu.choose(None, self._texts[-1])} (translation.bleu_tokenizer)"
        return said

    def _choose_columns(self) -> tuple[list[str], ...]:
        """Set the columns of the task, and return a sample of its texts."""
        look = self._look
        self._is_multi = False
        self._template: dict[str, str] = {}
        if look.encoding:
            self._data["encoding"] = look.encoding
            self.notes.append(f"the text is no UTF-8: read as {look.encoding}, which is a guess")
        if look.texts:
            if self.task in ("classification", "instruction") or (self.task == "translation") != (len(look.texts) == 2):
                raise UsageError(f"--task {self.task}: {look.form} hold nothing for it but texts")
            return look.texts
        if (document := look.document) is not None:
            self._data["group_column"] = document.name
            self.notes.append(f"rows with the same {document.name} stay in one split (data.group_column)")
        if self.task == "instruction":
            return (self._conversations(),)
        if self.task == "translation":
            pair = look.pair or _two_texts(look)
            if pair is None:
                raise UsageError(f"a translation needs two columns of text; there are {', '.join(look.columns)}")
            self._data |= {"source_column": pair[0].name, "target_column": pair[1].name}
            return pair[0].values, pair[1].values
        text = look.text
        if text is None:
            raise UsageError(f"no column holds text; there are {', '.join(look.columns)}")
        if text.name != "text":
            self._data["column"] = text.name
        if self.task == "classification":
            label = look.label
            if label is None:
                raise UsageError(f"no column looks like labels; there are {', '.join(look.columns)}")
            if label.name != "label":
                self._data["label_column"] = label.name
            self._is_multi = label.is_many_labels
            written = [value for value in label.values if isinstance(value, str)]
            if written and sum("|" in value for value in written) > 0.05 * len(written):
                self._is_multi = True
            self._data["rare_labels"] = "drop"
            classes = {str(one) for value in label.values for one in (value if isinstance(value, list) else [value])}
            self.notes.append(f"{len(classes)} labels in the sample; those too rare for every split are dropped")
        return (text.values,)

    def _conversations(self) -> list[str]:
        """What is said in each conversation of the sample; two columns of other names become a template."""
        look = self._look
        if look.conversations:
            return look.conversations
        pair = look.pair or _two_texts(look)
        if pair is None:
            raise UsageError(f"no columns look like prompts and answers; there are {', '.join(look.columns)}")
        self._template = {"prompt": f"{{{pair[0].name}}}", "completion": f"{{{pair[1].name}}}"}
        return said_in(look.rows, {**self._template})

    def _measured(self, entries: int) -> tuple[np.ndarray[Any, Any], int]:
        """Tokens of each example's longest text, and of all that is predicted, by a tokenizer of the sample."""
        kept = [[text for text in own if text.strip()] for own in self._texts]
        tokenizer = train_tokenizer((text for own in kept for text in own), entries, "behind")
        counts = [[len(found.ids) for found in tokenizer.encode_batch_fast(own)] for own in kept]
        most = min(map(len, counts))
        longest = np.max([own[:most] for own in counts], axis=0)
        return longest, sum(map(sum, counts))

    def _minutes(self, size: _Size, hidden: int, entries: int, tokens: int, gpus: int) -> float:
        """What the search would take, from the multiplications that training needs (6 a weight and token)."""
        layers = sum(size.layers) / 2
        # A classifier multiplies with no vocabulary.
        weights = 12 * layers * hidden**2 + (0 if self.task == "classification" else entries * hidden)
        epochs = sum(size.epochs) / 2
        work = 6 * weights * tokens * epochs * _TRIALS * _PRUNED * 1.2
        return work / (_speed(gpus) * _EFFICIENCY) / 60


def _proposed(look: Look) -> tuple[str, str]:
    """The task that data seems to be for, and why."""
    if len(look.texts) == 2:
        return "translation", "two aligned files"
    if look.texts:
        return "causal_lm", "plain text"
    if look.conversations:
        return "instruction", "the rows are prompts and answers"
    pair, label, text = look.pair, look.label, look.text
    if pair is not None:
        return "translation", f"{pair[0].name} and {pair[1].name} are a text and what is written for it"
    if label is not None and text is not None:
        return "classification", f"{label.name} has few values beside {text.name}"
    if text is not None:
        return "causal_lm", f"{text.name} is the only column of text that stands for itself"
    raise UsageError(f"no column holds text; there are {', '.join(look.columns) or 'none'}")


def _two_texts(look: Look) -> tuple[Any, Any] | None:
    texts = [column for column in look.columns.values() if column.is_text]
    return (texts[0], texts[1]) if len(texts) == 2 else None


def _epochs(size: _Size) -> str:
    low, high = size.epochs
    return f"  num_epochs: {{min: {low}, max: {high}}}" if low < high else f"  num_epochs: {low}"


def _gpus() -> int:
    from hpsearch.training.devices import gpu_names

    return len(gpu_names())


def _machine(gpus: int) -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else f"{cores} CPU{'s' if cores > 1 else ''}"


def _speed(gpus: int) -> float:
    """Multiplications and additions a second: measured on CPUs, of GPUs a cautious guess."""
    if gpus:
        return gpus * 20e12
    size, least = 512, math.inf
    one = np.ones((size, size), np.float32)
    # The fastest of some: others may use the machine, too.
    for _ in range(30):
        began = time.perf_counter()
        one @ one
        least = min(least, time.perf_counter() - began)
    return 2 * size**3 / max(1e-6, least)


def _duration(minutes: float) -> str:
    if minutes > 120:
        return f"{minutes / 60:.0f} hours"
    return "a minute" if minutes < 1.5 else f"{minutes:.0f} minutes"
