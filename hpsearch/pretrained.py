"""A pretrained model: its folder, found or fetched from the hub, and its tokenizer. Owns huggingface_hub.

Weights are read from safetensors only; a folder with nothing but pickled weights is refused, never unpickled, and code
that comes with a model is never run.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hpsearch.errors import UsageError
from hpsearch.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.spm")
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.spm")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@cache
def locate(name: str, revision: str | None) -> Path:
    """The folder of a pretrained model, fetched from the hub if it is no folder here. Raises UsageError."""
    folder = Path(name) if Path(name).is_dir() else _fetch(name, revision)
    if not (folder / "config.json").is_file():
        raise UsageError(f"model.pretrained: {name} is no model of transformers: it has no config.json")
    try:
        json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UsageError(f"model.pretrained: {folder}/config.json cannot be used: {error}") from error
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
        if pickled:
            raise UsageError(
                f"model.pretrained: {name} has pickled weights only ({', '.join(pickled)}), and unpickling runs "
                "whatever they contain; save the model once with save_pretrained(FOLDER) where you trust it"
            )
        raise UsageError(f"model.pretrained: {name} has no weights (*.safetensors)")
    return folder


@cache
def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises UsageError when there is none, or it marks no end of text."""
    from transformers import AutoTokenizer

    # Without any of these files some tokenizers start out empty and turn every word into nothing.
    if not any(file for pattern in _VOCABULARIES for file in folder.glob(pattern)):
        raise UsageError(f"model.pretrained: {folder} has no tokenizer ({', '.join(_VOCABULARIES)})")
    if (folder / "target" / "tokenizer.json").is_file():
        raise UsageError(
            f"model.pretrained: {folder} has a vocabulary for each language; only models with one can be fine-tuned"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each kind of tokenizer misses its files in its own way
        raise UsageError(
            f"model.pretrained: {folder} has no tokenizer that can be read: {_first_line(error)}"
        ) from error
    if end_id(tokenizer) is None:
        raise UsageError(f"model.pretrained: the tokenizer of {folder} has no token for the end of a text")
    return tokenizer


def end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a text: end-of-sequence, or an encoder's separator."""
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return None if found is None else int(found)


def of(settings: ModelSettings) -> Path | None:
    """The folder of the model that these settings fine-tune, if they do."""
    return None if settings.pretrained is None else locate(settings.pretrained, settings.revision)


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:  # network, hub, rights and cache: all mean that it is not to be had
        raise UsageError(
            f"model.pretrained: {name} is no folder beside the study file, and the hub does not give it: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
