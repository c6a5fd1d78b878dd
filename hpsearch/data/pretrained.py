"""A pretrained model: its folder, found or fetched from the hub, and its tokenizer. Owns huggingface_hub.

Weights are read from safetensors only; a folder with nothing but pickled weights is refused, never unpickled, and code
that comes with a model is never run.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Container
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpsearch.errors import UsageError
from hpsearch.spec.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.spm")
_WANTED = ("*.safetensors", *_BESIDE_WEIGHTS)
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.spm")
_SENTENCEPIECE = ("*.model", "*.spm")
_LFS_POINTER = b"version https://git-lfs"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@cache
def locate(name: str, revision: str | None) -> Path:
    """The folder of a pretrained model, fetched from the hub if it is no folder here. Raises UsageError."""
    folder = Path(name) if Path(name).is_dir() else _fetch(name, revision)
    if not (folder / "config.json").is_file():
        raise UsageError(f"model.pretrained: {name} is no model of transformers: it has no config.json")
    for file in (file for pattern in _BESIDE_WEIGHTS for file in sorted(folder.glob(pattern))):
        _refuse_pointer(file)
    config = _read_json(folder / "config.json")
    if config.get("auto_map") and config.get("model_type") not in _known_types():
        raise UsageError(
            f"model.pretrained: {name} is of a kind that transformers does not know ('{config.get('model_type')}'): "
            "the auto_map of its config.json names code of its own, and code that comes with a model is never run"
        )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
        if pickled:
            raise UsageError(
                f"model.pretrained: {name} has pickled weights only ({', '.join(pickled)}), and unpickling runs "
                "whatever they contain; save the model once with save_pretrained(FOLDER) where you trust it"
            )
        raise UsageError(f"model.pretrained: {name} has no weights (*.safetensors)")
    _check_weights(folder)
    return folder


def dataset_commit(name: str, revision: str | None) -> str | None:
    """The commit that a data set of the hub is at; None when the hub cannot be asked."""
    if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except Exception:  # a network has as many errors as layers; `datasets` may have the data set here
        return None


def _check_weights(folder: Path) -> None:
    """Raise UsageError when the weights that transformers would load are not all there; reads their headers only."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        _names(whole)
        return
    if not index.is_file():
        found = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
        raise UsageError(f"model.pretrained: {folder} has neither {whole.name} nor {index.name}, only {found}")
    weights = _read_json(index).get("weight_map")
    if not isinstance(weights, dict):
        raise UsageError(f"model.pretrained: {index} names no weights (weight_map)")
    for shard in sorted({str(name) for name in weights.values()}):
        if not (folder / shard).is_file():
            raise UsageError(f"model.pretrained: {folder / shard} is missing; {index.name} names it")
        lacking = sorted({name for name, place in weights.items() if place == shard} - _names(folder / shard))
        if lacking:
            raise UsageError(f"model.pretrained: {folder / shard} lacks {lacking[0]}, which {index.name} says it has")


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as content:
        if content.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UsageError(
                f"model.pretrained: {file} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
            )


def _names(file: Path) -> set[str]:
    """Names of the tensors of a safetensors file; its header is compared with its size."""
    from safetensors import safe_open

    _refuse_pointer(file)
    try:
        with safe_open(file, framework="numpy") as content:
            return set(content.keys())
    except Exception as error:  # of safetensors, or of the file system
        raise UsageError(
            f"model.pretrained: {file} is no whole safetensors file ({file.stat().st_size:,} bytes): "
            f"{_first_line(error)}"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f"model.pretrained: {file} cannot be used: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"model.pretrained: {file} cannot be used: expected a mapping")
    return content


def _known_types() -> Container[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known: Container[str] = CONFIG_MAPPING_NAMES
    return known


@cache
def load_tokenizer(folder: Path, source: str | None = None, target: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, told the languages of a translation.

    Raises UsageError when there is none, or it marks no end of text.
    """
    from transformers import AutoTokenizer

    languages = {"src_lang": source, "tgt_lang": target} if source or target else {}

    # Without any of these files some tokenizers start out empty and turn every word into nothing.
    if not any(file for pattern in _VOCABULARIES for file in folder.glob(pattern)):
        raise UsageError(f"model.pretrained: {folder} has no tokenizer ({', '.join(_VOCABULARIES)})")
    if (folder / "target" / "tokenizer.json").is_file():
        raise UsageError(
            f"model.pretrained: {folder} has a vocabulary for each language; only models with one can be fine-tuned"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **languages)
    except Exception as error:  # each kind of tokenizer misses its files in its own way
        settings = folder / "tokenizer_config.json"
        why = " ".join(str(error).split()) or type(error).__name__
        if find_spec("sentencepiece") is None and any(file for name in _SENTENCEPIECE for file in folder.glob(name)):
            why = "it is a SentencePiece model, and sentencepiece is not installed: pip install sentencepiece"
        elif settings.is_file() and _read_json(settings).get("auto_map"):
            why = "the auto_map of its tokenizer_config.json names code of its own, which is never run"
        raise UsageError(f"model.pretrained: {folder} has no tokenizer that can be read: {why}") from error
    if end_id(tokenizer) is None:
        raise UsageError(f"model.pretrained: the tokenizer of {folder} has no token for the end of a text")
    return tokenizer


def load_translator(folder: Path, source: str | None, target: str | None) -> tuple[PreTrainedTokenizerBase, int | None]:
    """The tokenizer of a translation model, and the token that stands for the target language, if it has one.

    Raises UsageError when a multilingual tokenizer is not told both languages as it calls them.
    """
    tokenizer = load_tokenizer(folder)
    known = languages(tokenizer)
    if len(known) < 2:
        return tokenizer, None
    for side, name in (("source", source), ("target", target)):
        if name not in known:
            wrong = f"has no language {name!r}" if name else "is multilingual: expected the language as it calls it"
            raise UsageError(f"data.{side}_language: the tokenizer of {folder} {wrong}; {_near(name, list(known))}")
    assert target is not None
    return load_tokenizer(folder, source, target), known[target]


def languages(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The languages that a tokenizer marks texts with, and their tokens; empty where it has no source and target."""
    if not hasattr(tokenizer, "src_lang"):
        return {}
    own = getattr(tokenizer, "lang_code_to_id", None)
    named = {name for name in tokenizer.all_special_tokens if re.fullmatch(r"[a-z]{2,3}_[A-Z]\w+", name)}
    tokens = own or {name: tokenizer.convert_tokens_to_ids(name) for name in sorted(named)}
    return {name: int(token) for name, token in tokens.items() if token not in (None, tokenizer.unk_token_id)}


def starts_from_language(folder: Path, tokenizer: PreTrainedTokenizerBase, code: int) -> bool:
    """Whether the model decodes from the token of the target language, as mBART's first models do."""
    kind = _read_json(folder / "config.json").get("model_type")
    return kind in ("mbart", "plbart") and tokenizer(text_target=["a"])["input_ids"][0][-1] == code


def _near(name: str | None, known: list[str]) -> str:
    near = difflib.get_close_matches(name or "", known, n=5)
    near += [code for code in known if name and code[:2] == name[:2].lower() and code not in near]
    shown = near or known
    few = ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "")
    return f"near it are {few}" if near else f"it has {few}"


def end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a text: end-of-sequence, or an encoder's separator."""
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return None if found is None else int(found)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are no text: marks of texts, turns and whatever else the tokenizer has."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {*tokenizer.all_special_ids}


def begin_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a tokenizer puts before every text, as its model was trained; None when it puts none."""
    begin = tokenizer.bos_token_id
    if begin is None or begin == end_id(tokenizer):
        return None
    return int(begin) if tokenizer(["a"], verbose=False)["input_ids"][0][:1] == [begin] else None


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
