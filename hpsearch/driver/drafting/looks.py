"""What files of text look like: their form, columns and splits, and a sample of their rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from hpsearch.data.files import Position, beginning, guess_split, lines_of, rows_of, texts_of
from hpsearch.data.sources import first_line, rows_of_dataset
from hpsearch.errors import DataError, UsageError
from hpsearch.spec.files import expanded, format_of, is_saved_dataset, split_by_name
from hpsearch.spec.task import UnusableRowError
from hpsearch.tasks.instruction.forms import RowReader, conversation

_READ = 200_000
"""Rows that are read at most."""
_ROWS = 5000
"""Rows of a sample at least, where there are so many; at most twice as many."""
_T = TypeVar("_T")
_LANGUAGES = (
    "ar bg bn ca cs da de el en es et eu fa fi fr gl gu he hi hr hu id is it ja ka kk kn ko lt lv mk ml mr ms mt nb ne "
    "nl nn no pa pl ps pt ro ru sk sl sq sr sv sw ta te th tl tr uk ur uz vi xh yo zh zu"
)
_LABELS = "label labels class category categories intent sentiment topic tag tags genre rating stars target y"
_TEXTS = "text content body sentence document article review message comment abstract description question title"
_PAIRS = (
    "source:target src:tgt src:trg document:summary article:summary article:highlights text:summary dialogue:summary"
)


_DOCUMENTS = (
    "doc doc_id document_id docid page page_id pageid article article_id book book_id chapter_id url uri path file "
    "filename thread_id conversation_id dialogue_id user user_id author author_id"
)
"""What columns are called that say which document, or whose, a text is."""
_MANY = 30
"""Documents that can be split."""
_PIECES = 0.7
"""Of the rows: where nearly each has a document of its own, it says nothing."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """What a sample holds under one name; `a.b` is the key b of the mappings under a."""

    name: str
    values: list[Any]
    """Without empty ones."""

    @property
    def is_text(self) -> bool:
        return bool(self.values) and all(isinstance(value, str) for value in self.values)

    @property
    def mean_length(self) -> float:
        return sum(len(str(value)) for value in self.values) / max(1, len(self.values))

    @property
    def is_many_labels(self) -> bool:
        return bool(self.values) and all(isinstance(value, list) for value in self.values)

    def could_be_label(self, *, is_named: bool) -> bool:
        """Whether few values stand in many rows; of a column that is called so, it need not be as few."""
        if not self.values or any(isinstance(value, dict | float) for value in self.values):
            return False
        distinct = len({str(value) for value in self.values})
        most = len(self.values) / (2 if is_named else 5)
        return self.mean_length <= 60 and 2 <= distinct <= max(2.0, most)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a person's files hold."""

    splits: dict[str, Any]
    """As `data.files` names them."""
    form: str
    """In words."""
    columns: dict[str, Column] = field(default_factory=dict)
    """Of a sample; none of plain text and of aligned files."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of the sample, as they are read."""
    texts: tuple[list[str], ...] = ()
    """Of plain text and aligned files, a sample of each field."""
    part: float = 1.0
    """Of the training files, how much of them the sample is."""
    encoding: str | None = None

    def named(self, wanted: str) -> Iterator[Column]:
        """Columns that are called one of these, in the order of the words; a prefix such as `meta.` does not count."""
        for word in wanted.split():
            yield from (c for name, c in self.columns.items() if name.lower().split(".")[-1] == word)

    @property
    def label(self) -> Column | None:
        named = next((column for column in self.named(_LABELS) if column.could_be_label(is_named=True)), None)
        if named is not None:
            return named
        documents = [*self.named(_DOCUMENTS)]
        others = (column for column in self.columns.values() if column not in documents)
        return next((column for column in others if column.could_be_label(is_named=False)), None)

    @property
    def text(self) -> Column | None:
        label = self.label
        named = [column for column in self.named(_TEXTS) if column.is_text and column is not label]
        others = [column for column in self.columns.values() if column.is_text and column is not label]
        others.sort(key=lambda column: -column.mean_length)
        return next(iter(named), None) or next(iter(others), None)

    @property
    def document(self) -> Column | None:
        """What the rows are pieces of, by its name, if many documents have several rows each and no split is given."""
        if {*self.splits} != {"train"}:
            return None
        for column in self.named(_DOCUMENTS):
            names = [str(value) for value in column.values if isinstance(value, str | int)]
            if (
                column not in (self.text, self.label)
                and len(names) == len(column.values)
                and _MANY <= len({*names}) < _PIECES * len(names)
            ):
                return column
        return None

    @cached_property
    def conversations(self) -> list[str]:
        """What is said in the rows of the sample, if they have a form of prompts and answers; else nothing."""
        return said_in(self.rows, None)

    @property
    def pair(self) -> tuple[Column, Column] | None:
        """Two columns of which one is written for the other: by languages, or by what pairs are called."""
        known = {*_LANGUAGES.split()}
        languages = [c for name, c in self.columns.items() if _code(name) in known and c.is_text]
        if len(languages) == 2:
            return languages[0], languages[1]
        for pair in _PAIRS.split():
            found = [next((c for c in self.named(side) if c.is_text), None) for side in pair.split(":")]
            if found[0] is not None and found[1] is not None:
                return found[0], found[1]
        return None


def said_in(rows: Sequence[dict[str, Any]], template: dict[str, str | None] | None) -> list[str]:
    """What is said in each row that holds a conversation; nothing if some are of no form, or of several."""
    read, found = RowReader(column=None, template=template, labels=[]), []
    for row in rows:
        try:
            found.append("\n".join(message["content"] for message in conversation(*read(row))))
        except UnusableRowError:
            continue
        except DataError:
            return []
    return found


def look_at(names: Sequence[str], task: str | None) -> Look:
    """Raises UsageError for names that are no files of text, DataError for files that cannot be read."""
    files = [file for name in names for file in expanded(name)]
    for file in files:
        if not Path(file).exists():
            raise UsageError(f"no such file: {file}")
    if not files:
        raise UsageError(f"no file of text is in {' '.join(names)}")
    if task in (None, "translation") and (aligned := _aligned(files)) is not None:
        return aligned
    for file in files:
        if format_of(file) is None and not is_saved_dataset(Path(file)):
            raise UsageError(
                f"cannot tell the format of {Path(file).name}; see docs/tasks-and-data.md for those there are"
            )
    folder = Path(names[0]) if len(names) == 1 and Path(names[0]).is_dir() else None
    try:
        splits = split_by_name(files, folder)
    except ValueError as error:
        raise UsageError(str(error)) from None
    only = names[0] if len(names) == 1 and Path(names[0]).is_dir() else None
    first = splits["train"][0]
    size = sum(Path(file).stat().st_size for file in splits["train"] if Path(file).is_file())
    encoding = _encoding(first)
    named: dict[str, Any] = {"train": [only]} if only else splits
    position = Position()
    try:
        if format_of(first) == "text":
            split_on = guess_split(beginning(first, encoding))
            texts, part = _sampled(texts_of(first, split_on, encoding=encoding, position=position))
            form = {"line": "a text a line", "blank_line": "texts parted by blank lines"}
            return Look(
                splits=named,
                form=form.get(split_on, "texts that end with an end-of-text mark"),
                texts=(texts,),
                part=part * min(1.0, position.bytes / max(1, size)),
                encoding=encoding,
            )
        read: Iterable[tuple[str, dict[str, Any]]]
        if Path(first).is_dir():
            read = rows_of_dataset(first)
        else:
            delimiter = _delimiter(first, encoding)
            read = rows_of(first, (), encoding=encoding, delimiter=delimiter, position=position)
        rows, part = _sampled(row for _, row in read)
        sample = [_flat(row) for row in rows]
        part *= min(1.0, position.bytes / size) if size else 1.0
    except UnicodeDecodeError as error:
        raise DataError(f"{first} is neither UTF-8 nor cp1252 text ({error.reason})") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{first} cannot be read as {format_of(first)}: {first_line(error)}") from error
    keys = dict.fromkeys(name for row in sample for name in row)
    columns = {name: [row[name] for row in sample if row.get(name) not in (None, "", [])] for name in keys}
    return Look(
        splits=named,
        form="a data set of `save_to_disk`" if Path(first).is_dir() else f"rows of {format_of(first)}",
        columns={name: Column(name=name, values=values) for name, values in columns.items()},
        rows=rows,
        part=part,
        encoding=encoding,
    )


def _sampled(items: Iterable[_T]) -> tuple[list[_T], float]:
    """Some of the items, from everywhere among the first _READ, and which part of these they are.

    Rows are often sorted: the first ones may all have one label.
    """
    kept: list[_T] = []
    step, read = 1, 0
    for read, item in enumerate(islice(items, _READ), start=1):
        if (read - 1) % step == 0:
            kept.append(item)
        if len(kept) == 2 * _ROWS:
            kept, step = kept[::2], 2 * step
    return kept, len(kept) / max(1, read)


def _aligned(files: list[str]) -> Look | None:
    """Plain files in two languages, called alike but for these: corpus.en and corpus.fr, or en.txt and fr.txt."""
    if any(format_of(file) not in (None, "text") for file in files):
        return None
    known = {*_LANGUAGES.split(), "src", "tgt", "trg", "source", "target"}
    by_language: dict[str, dict[str, str]] = {}
    for file in files:
        words = re.split(r"([._-])", Path(file).name.removesuffix(".txt"))
        if (language := words[-1].lower()) not in known:
            return None
        by_language.setdefault(language, {})[str(Path(file).parent / "".join(words[:-1]))] = file
    if len(by_language) != 2:
        return None
    (first, second), stems = by_language.values(), [*next(iter(by_language.values()))]
    if {*first} != {*second} or len(first) + len(second) != len(files):
        return None
    sources, targets = [first[stem] for stem in stems], [second[stem] for stem in stems]
    for source, target in zip(sources, targets, strict=True):
        if (counts := (_lines(source), _lines(target)))[0] != counts[1]:
            raise DataError(
                f"{source} has {counts[0]:,} lines and {target} has {counts[1]:,}; line by line, one must be the "
                "translation of the other"
            )
    found: dict[str, Any] = {}
    for split, own in split_by_name(sources).items():
        others = [targets[sources.index(file)] for file in own]
        found[split] = {"source": own, "target": others} if len(own) > 1 else {"source": own[0], "target": others[0]}
    texts = tuple(_sampled(lines_of(side[0], encoding=None, position=Position()))[0] for side in (sources, targets))
    return Look(
        splits=found,
        form="aligned files, a text a line",
        texts=texts,
        part=min(1.0, len(texts[0]) / max(1, sum(map(_lines, sources)))),
    )


def _lines(name: str) -> int:
    with Path(name).open("rb") as file:
        return sum(1 for _ in file)


def _encoding(name: str) -> str | None:
    """None of UTF-8 text and of Parquet."""
    if Path(name).is_dir() or format_of(name) == "parquet":
        return None
    with Path(name).open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return "utf-16"
    try:
        beginning(name, None)
    except UnicodeDecodeError:
        return "cp1252"
    return None


def _delimiter(name: str, encoding: str | None) -> str | None:
    """Of a CSV file, what parts its first line into the most columns."""
    if format_of(name) != "csv":
        return None
    first = (beginning(name, encoding).splitlines() or [""])[0]
    return max((",", ";", "\t", "|"), key=first.count)


def _flat(row: dict[str, Any], before: str = "") -> dict[str, Any]:
    """A row in which a key of a mapping is a column of its own, `column.key`."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def _code(name: str) -> str:
    """The language that a column may be named after."""
    return re.split(r"[_-]", name.lower().split(".")[-1])[0]
