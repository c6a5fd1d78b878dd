"""Tokenizers: trained on a study's text or brought by a pretrained model, and kept beside the weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from hpsearch.data import pretrained
from hpsearch.data.files import END_OF_TEXT
from hpsearch.spec.study import StudySpec
from hpsearch.spec.task import Marks

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


PADDING = "<|pad|>"
END_ID, PADDING_ID = 0, 1
TOKENIZER_FOLDER = "tokenizer"
CHAT_TEMPLATE = "chat_template.jinja"
"""As transformers calls it in the folder of a tokenizer."""
ROLE_MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
"""Tokens of their own in the vocabularies that we train for chats."""
TARGET_FOLDER = "target"
"""Of a translation's target tokenizer, in a checkpoint of a model with two vocabularies."""
TARGET_TOKENIZER = "tokenizer-target.json"


def train_tokenizer(texts: Iterable[str], vocab_size: int, marks: Marks = "stream") -> Tokenizer:
    """A byte-level BPE tokenizer (as GPT-2's) trained on these texts; end-of-text is token 0, padding (if any) 1.

    It puts end-of-text before or behind a text; in a stream, which needs no padding, whoever writes it does, and in a
    chat its template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            END_OF_TEXT,
            *([] if marks == "stream" else [PADDING]),
            *(ROLE_MARKS if marks == "chat" else ()),
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if marks in ("before", "behind"):
        marked = f"{END_OF_TEXT} $A" if marks == "before" else f"$A {END_OF_TEXT}"
        tokenizer.post_processor = processors.TemplateProcessing(single=marked, special_tokens=[(END_OF_TEXT, END_ID)])
    return tokenizer


def save_tokenizer(
    folder: Path, checkpoint: str, *, context_length: int | None, sides: tuple[str, str] = ("right", "right")
) -> None:
    """Put the tokenizer of prepared data beside the weights that were trained on it, told to cut and pad as we did.

    `sides` are those where it cuts and where it pads; with no `context_length` it keeps the length that it came with.
    A target language with a vocabulary of its own has its tokenizer in a folder below, named `target`.
    """
    source, target = folder / TOKENIZER_FOLDER, Path(checkpoint)
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(TARGET_TOKENIZER))
    file = target / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config |= {
        "truncation_side": sides[0],
        "padding_side": sides[1],
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": config.get("pad_token") or config.get("eos_token") or config.get("sep_token"),
    }
    if context_length is not None:
        config["model_max_length"] = context_length
    file.write_text(json.dumps(config, indent=2))
    if (source / TARGET_TOKENIZER).is_file():
        (target / TARGET_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(source / TARGET_TOKENIZER, target / TARGET_FOLDER / "tokenizer.json")
        shutil.copyfile(file, target / TARGET_FOLDER / file.name)


def decode(folder: Path, rows: Sequence[Sequence[int]]) -> list[str]:
    """Text of token ids of the target language of a prepared translation."""
    from tokenizers import Tokenizer

    own = folder / TOKENIZER_FOLDER / TARGET_TOKENIZER
    if own.is_file():
        return [text.strip() for text in Tokenizer.from_file(str(own)).decode_batch(rows, skip_special_tokens=True)]
    tokenizer = pretrained.load_tokenizer(folder / TOKENIZER_FOLDER)
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


class _Chats:
    """Tokenizers that render and tokenize conversations."""

    chats: PreTrainedTokenizerBase

    def read_chats(self, folder: Path, name: str) -> None:
        """Use the tokenizer and the chat template of a folder that it was saved to; `name` is for messages."""
        self.chats = pretrained.load_tokenizer(folder)
        self.chats.name_or_path = name


AnyTokenizers: TypeAlias = "TrainedTokenizers | BroughtTokenizers"


class TrainedTokenizers(_Chats):
    """Tokenizers trained on the training split: one, or one for each language."""

    first_id = start_id = begin_id = None

    def __init__(self, tokenizers: dict[str, Tokenizer], spec: StudySpec) -> None:
        """Of each field of the task its tokenizer; two may have the same."""
        task = spec.definition
        self._is_stream = task.is_stream
        self._tokenizers = tokenizers
        first, last = (self._tokenizers[field] for field in (task.fields[0], task.fields[-1]))
        self.end_id, self.padding_id = END_ID, PADDING_ID
        self.vocab_size = first.get_vocab_size()
        self.target_vocab_size = last.get_vocab_size() if last is not first else None
        distinct = dict.fromkeys(tokenizer.to_str() for tokenizer in self._tokenizers.values())
        self.hash = hashlib.sha256("".join(distinct).encode()).hexdigest()[:16]

    @classmethod
    def trained(cls, texts: Callable[[str], Iterable[str]], vocab_size: int, spec: StudySpec) -> TrainedTokenizers:
        """`texts` gives those of a field to train on."""
        fields, marks = spec.definition.fields, spec.definition.marks
        if spec.tokenizer.shared:
            joint = (text for field in fields for text in texts(field))
            return cls(dict.fromkeys(fields, train_tokenizer(joint, vocab_size, marks)), spec)
        return cls({field: train_tokenizer(texts(field), vocab_size, marks) for field in fields}, spec)

    @classmethod
    def read(cls, folder: Path, spec: StudySpec) -> TrainedTokenizers:
        """What `save` has written."""
        from tokenizers import Tokenizer

        fields = spec.definition.fields
        tokenizers = dict.fromkeys(fields, Tokenizer.from_file(str(folder / "tokenizer.json")))
        if (folder / TARGET_TOKENIZER).is_file():
            tokenizers[fields[-1]] = Tokenizer.from_file(str(folder / TARGET_TOKENIZER))
        return cls(tokenizers, spec)

    def encode(self, field: str, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizers[field].encode_batch_fast(texts)
        ending = [END_ID] if self._is_stream else []
        return [encoding.ids + ending for encoding in encodings]

    def save(self, folder: Path) -> None:
        words = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | (
            {} if self._is_stream else {"pad_token": PADDING}
        )
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **words}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizers = list(self._tokenizers.values())
        tokenizers[0].save(str(folder / "tokenizer.json"))
        if self.target_vocab_size is not None:
            tokenizers[-1].save(str(folder / TARGET_TOKENIZER))


class BroughtTokenizers(_Chats):
    """The tokenizer that a pretrained model brings along."""

    target_vocab_size = None

    def __init__(self, spec: StudySpec) -> None:
        folder = pretrained.of(spec.model)
        assert folder is not None
        self._task, self._options = spec.definition, spec.options
        self.first_id: int | None = None
        self.start_id: int | None = None
        if self._task.is_pair:
            data = spec.data
            self._tokenizer, code = pretrained.load_translator(folder, data.source_language, data.target_language)
            # mBART's first models start from the language; later ones are made to say it first.
            if code is not None and pretrained.starts_from_language(folder, self._tokenizer, code):
                self.start_id = code
            else:
                self.first_id = code
        else:
            self._tokenizer = pretrained.load_tokenizer(folder)
        end = pretrained.end_id(self._tokenizer)
        assert end is not None
        self.end_id = end
        reads_whole = self._task.is_stream or self._task.is_chat
        self.begin_id = pretrained.begin_id(self._tokenizer) if reads_whole else None
        self.chat_template: str | dict[str, str] | None = self._tokenizer.chat_template
        self.special_tokens = sorted((name, str(token)) for name, token in self._tokenizer.special_tokens_map.items())
        self.padding_id = end if self._tokenizer.pad_token_id is None else int(self._tokenizer.pad_token_id)
        self.vocab_size = max(len(self._tokenizer), 1 + max(pretrained.languages(self._tokenizer).values(), default=0))
        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        described = fast.to_str() if fast else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        self.hash = hashlib.sha256(described.encode()).hexdigest()[:16]

    def encode(self, field: str, texts: list[str]) -> list[list[int]]:
        if self._task.is_stream:
            encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            begin = [] if self.begin_id is None else [self.begin_id]
            return [[*begin, *ids, self.end_id] for ids in encoded]
        if self._task.is_pair and field == self._task.fields[-1]:
            encoded = self._tokenizer(text_target=texts, verbose=False)["input_ids"]
            codes = {self.first_id, self.start_id} - {None}
            first = [] if self.first_id is None else [self.first_id]
            # Some tokenizers put the language behind the text, where no decoder could begin with it.
            encoded = (
                [[*first, *(token for token in ids if token not in codes)] for ids in encoded] if codes else encoded
            )
        else:
            prefix = self._task.prefix(field, self._options)
            encoded = self._tokenizer([prefix + text for text in texts], verbose=False)["input_ids"]
        if self._task.marks == "behind":
            return [ids if self.end_id in ids[-2:] else [*ids, self.end_id] for ids in encoded]
        return [ids or [self.end_id] for ids in encoded]

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)
