"""Examples as a study names them: local files, built-in corpora, data sets of the hub. Text is read as written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from hpsearch.data.corpora import READERS, Example
from hpsearch.data.files import (
    Position,
    beginning,
    guess_split,
    lines_of,
    marks_of,
    misplaced_byte,
    rows_of,
    texts_of,
    value_in,
)
from hpsearch.data.shards import SPLITS
from hpsearch.errors import DataError
from hpsearch.spec.files import expanded, format_of, split_by_name, split_called
from hpsearch.spec.sections import AlignedFiles, DataSpec, SourceSpec
from hpsearch.spec.study import StudySpec
from hpsearch.spec.task import LABEL_SEPARATOR, Row, UnusableRowError

_BYTES_OF_A_TOKEN = 4
_MANY_FILES = 20
"""Plain text files, at least, that are split file by file: of fewer, splits would not be as large as asked for."""


@dataclass
class Reading:
    """How far the examples of a study have been read, and what was found on the way."""

    position: Position = field(default_factory=Position)
    empty: Counter[str] = field(default_factory=Counter)
    """By file, the rows left out because they have no text in some column."""
    unusable: Counter[str] = field(default_factory=Counter)
    """By file and reason, the rows left out because they hold no example."""
    source: int = 0
    """Of a mix, the number of the source that the last example is from."""
    group: str | None = None
    """What the last example is a piece of, if that is known."""
    is_grouped: bool = False
    """Whether that was known of any example."""
    whole_files: int = 0
    """Files whose texts stay together without having been told to."""
    split_on: dict[str, str] = field(default_factory=dict)
    """By plain text file, what was guessed to part its texts."""


def given_splits(spec: StudySpec, reading: Reading) -> dict[str, Iterator[Example]]:
    """The examples of each split that the study's source has, in the order of SPLITS. Raises DataError."""
    found: dict[str, list[Iterator[Example]]] = {}
    for number, source in enumerate(spec.data.sources):
        for split, examples in _given_by(source, spec, reading).items():
            most = _BYTES_OF_A_TOKEN * source.max_tokens if source.max_tokens and split == "train" else None
            found.setdefault(split, []).append(_marked(examples, number, reading, most))
    if "train" not in found:
        raise DataError("data: there is no training split")
    return {split: chain.from_iterable(found[split]) for split in SPLITS if split in found}


def _given_by(source: SourceSpec, spec: StudySpec, reading: Reading) -> dict[str, Iterator[Example]]:
    if source.corpus is not None:
        return {"train": READERS[source.corpus]()}
    reader = _Reader(source, spec, reading)
    if source.files is not None:
        return {split: reader.files(files) for split, files in files_of(source).items()}
    return reader.hub()


def _marked(examples: Iterator[Example], number: int, reading: Reading, most: int | None) -> Iterator[Example]:
    """The examples of a source, up to about so many bytes of them, while `reading` says that they are from it."""
    read = 0
    for example in examples:
        reading.source = number
        reading.is_grouped |= reading.group is not None
        yield example
        reading.group = None
        read += sum(len(text.encode(errors="replace")) for text in example) if most is not None else 0
        if most is not None and read >= most:
            return


def files_of(data: SourceSpec) -> dict[str, list[str] | AlignedFiles]:
    """The local files of each given split of a source; empty for other sources."""
    if data.files is None:
        return {}
    found: dict[str, list[str] | AlignedFiles] = {}
    for split in SPLITS:
        files = getattr(data.files, split)
        if files:
            aligned = isinstance(files, AlignedFiles)
            found[split] = files if aligned else [file for name in files for file in expanded(name)]
    train = data.files.train
    if list(found) == ["train"] and isinstance(train, list) and len(train) == 1 and Path(train[0]).is_dir():
        only = Path(train[0])
        if (only / "dataset_dict.json").is_file():
            return {**_saved_splits(only)}
        try:
            return {**split_by_name(expanded(train[0]), only)}
        except ValueError as error:
            raise DataError(f"data: {only}: {error}") from None
    return found


def _saved_splits(folder: Path) -> dict[str, list[str]]:
    """The splits of a data set that was saved with several; those that are called otherwise are not read."""
    found: dict[str, list[str]] = {}
    for name in json.loads((folder / "dataset_dict.json").read_text())["splits"]:
        if (split := split_called(name)) is not None:
            found.setdefault(split, []).append(str(folder / name))
    if "train" not in found:
        raise DataError(f"data: {folder} has no train split")
    return found


def has_whole_files(source: SourceSpec) -> bool | None:
    """Whether the texts of a file stay in one split. None: those of a plain text file do, if they are paragraphs."""
    if source.whole_files is not None:
        return source.whole_files
    train = files_of(source).get("train", [])
    return None if isinstance(train, list) and sum(map(_is_text, train)) >= _MANY_FILES else False


def may_group(data: DataSpec) -> bool:
    """Whether some texts may have to stay in the split of others."""
    return any(source.group_column is not None or has_whole_files(source) is not False for source in data.sources)


def _is_text(name: str) -> bool:
    return not Path(name).is_dir() and format_of(name) == "text"


def size_of(data: DataSpec, split: str) -> int:
    """Bytes of the files of a given split; 0 when they are not known before they are read."""
    names = [name for source in data.sources for name in names_of(files_of(source).get(split, []))]
    return sum(Path(name).stat().st_size for name in names if Path(name).is_file())


def names_of(files: list[str] | AlignedFiles) -> list[str]:
    return [*files.source, *files.target] if isinstance(files, AlignedFiles) else files


class _Reader:
    """Reads examples as a study's columns say, and tells where a row is that cannot be one."""

    def __init__(self, source: SourceSpec, spec: StudySpec, reading: Reading) -> None:
        self._data, self._task, self._reading = source, spec.definition, reading
        self._options = spec.options
        self._columns = self._task.columns(source)
        self._whole_files = has_whole_files(source)
        self._marks: dict[str, str] = {}
        """Of the files that are being read, if each may be a document."""

    def files(self, files: list[str] | AlignedFiles) -> Iterator[Example]:
        if self._whole_files is not False:
            try:
                self._marks = marks_of(files.source if isinstance(files, AlignedFiles) else files)
            except OSError as error:
                raise DataError(f"data: {error.filename} cannot be read: {error.strerror}") from error
        if isinstance(files, AlignedFiles):
            yield from self._checked(" and ".join((files.source[0], files.target[0])), self._aligned(files))
            return
        for name in files:
            kind = "data set" if Path(name).is_dir() else format_of(name)
            try:
                yield from self._checked(name, self._file(name, kind))
            except DataError:
                raise
            except UnicodeDecodeError as error:
                raise self._undecodable(name) from error
            except Exception as error:  # pyarrow, datasets and the decompressors each raise their own: all malformed
                raise DataError(f"data: {name} cannot be read as {kind}: {first_line(error)}") from error

    def hub(self) -> dict[str, Iterator[Example]]:
        import datasets

        data = self._data
        try:
            streamed = {"streaming": True} if data.max_tokens else {}
            loaded = datasets.load_dataset(data.hub, data.config, revision=data.revision, **streamed)
        except Exception as error:  # hub, network, cache and script errors all mean: not to be had
            raise DataError(f"data: cannot load {data.hub} from the hub: {first_line(error)}") from error
        if "train" not in loaded:
            raise DataError(f"data: {data.hub} has no train split; it has {', '.join(loaded)}")
        return {
            split: self._checked(name := f"{data.hub} ({split})", self._examples(_named(loaded[split]), name))
            for split in SPLITS
            if split in loaded
        }

    def _file(self, name: str, kind: str | None) -> Iterator[tuple[str, Example]]:
        data, position = self._data, self._reading.position
        if kind == "data set":
            yield from self._examples(rows_of_dataset(name), name)
        elif kind == "text":
            if data.group_column is not None:
                raise DataError(f"data: {name} is plain text, which has no column '{data.group_column}' (group_column)")
            split_on = data.split_on
            if split_on == "auto":
                split_on = guess_split(beginning(name, data.encoding))
                if split_on != "blank_line":
                    self._reading.split_on[name] = split_on
            is_whole = split_on == "blank_line" if self._whole_files is None else self._whole_files
            mark = self._marks[name] if is_whole else None
            self._reading.whole_files += is_whole and self._whole_files is None
            for number, text in enumerate(texts_of(name, split_on, encoding=data.encoding, position=position), start=1):
                self._reading.group = mark
                yield f"text {number}", (text,)
        else:
            read = self._columns if data.group_column is None else (*self._columns, data.group_column)
            read = () if self._task.is_chat else read
            rows = rows_of(name, read, encoding=data.encoding, delimiter=data.delimiter, position=position)
            yield from self._examples(rows, name)

    def _aligned(self, files: AlignedFiles) -> Iterator[tuple[str, Example]]:
        for source, target in zip(files.source, files.target, strict=True):
            mark = self._marks.get(source)
            first, second = self._lines(source), self._lines(target)
            for number, (one, other) in enumerate(zip_longest(first, second), start=1):
                if one is None or other is None:
                    more = number + sum(1 for _ in (second if one is None else first))
                    lengths = (number - 1, more) if one is None else (more, number - 1)
                    raise DataError(
                        f"data: {source} has {lengths[0]} lines and {target} has {lengths[1]}; line by line, one must "
                        "be the translation of the other"
                    )
                self._reading.group = mark
                yield f"line {number}", (one, other)

    def _lines(self, name: str) -> Iterator[str]:
        try:
            yield from lines_of(name, encoding=self._data.encoding, position=self._reading.position)
        except UnicodeDecodeError as error:
            raise self._undecodable(name) from error
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"data: {name} cannot be read: {first_line(error)}") from error

    def _undecodable(self, name: str) -> DataError:
        if self._data.encoding:
            return DataError(f"data: {name} is not {self._data.encoding} text, as data.encoding says")
        byte = misplaced_byte(name)
        at = "" if byte is None else f" (byte {byte})"
        return DataError(f"data: {name} is not UTF-8 text{at}; set data.encoding to what it is, such as cp1252")

    def _examples(self, rows: Iterable[tuple[str, Row]], name: str) -> Iterator[tuple[str, Example]]:
        last = len(self._columns) - 1
        mark = self._marks.get(name) if self._whole_files else None
        read = self._task.row_reader(self._data, self._options)
        for place, row in rows:
            where = f"{name}, {place}"
            if (column := self._data.group_column) is not None:
                self._reading.group = _group(_value(row, column, where), f"{where}: column '{column}'")
            else:
                self._reading.group = mark
            if read is not None:
                try:
                    yield place, read(row)
                except UnusableRowError as reason:
                    self._reading.unusable[f"{name}: {reason}"] += 1
                except DataError as error:
                    raise DataError(f"data: {where}: {error}") from None
                continue
            yield (
                place,
                tuple(
                    as_text(
                        _value(row, column, where),
                        f"{where}: column '{column}'",
                        is_label=self._task.has_labels and index == last,
                    )
                    for index, column in enumerate(self._columns)
                ),
            )

    def _checked(self, name: str, examples: Iterator[tuple[str, Example]]) -> Iterator[Example]:
        """The examples with text in every field: others are left out and counted; with labels a hole is an error."""
        for place, example in examples:
            if all(map(str.strip, example)):
                yield example
            elif self._task.has_labels:
                column = next(c for c, text in zip(self._columns, example, strict=True) if not text.strip())
                raise DataError(f"data: {name}, {place}: column '{column}' is empty")
            else:
                self._reading.empty[name] += 1


def rows_of_dataset(name: str) -> Iterator[tuple[str, Row]]:
    """Rows of a folder that `save_to_disk` has written; of one with splits those of its training split."""
    import datasets

    found = datasets.load_from_disk(name)
    return _named(found["train"] if isinstance(found, datasets.DatasetDict) else found)


def _named(rows: Any) -> Iterator[tuple[str, Row]]:
    """Rows of a data set in which numbered classes read as their names."""
    # A stream may not know its columns before it is read.
    classes = {}
    for name, feature in (rows.features or {}).items():
        kind = getattr(feature, "feature", feature)  # of a list of classes
        if hasattr(kind, "int2str"):
            classes[name] = kind
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", {**row, **{name: _class_name(row[name], kind) for name, kind in classes.items()}}


def _class_name(value: Any, kind: Any) -> Any:
    """The name of a numbered class; a class that nobody knows (-1) has none."""
    if isinstance(value, list):
        return [_class_name(one, kind) for one in value]
    return kind.int2str(value) if isinstance(value, int) and value >= 0 else None


def _value(row: Row, column: str, where: str) -> Any:
    try:
        return value_in(row, column)
    except DataError as error:
        raise DataError(f"data: {where} {error}") from None


def as_text(value: Any, place: str, *, is_label: bool) -> str:
    """Text as it is, nothing as empty, a label of another type as text, a list of labels joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if is_label and isinstance(value, int | bool):
        return json.dumps(value)
    if is_label and isinstance(value, list):
        return LABEL_SEPARATOR.join(entry if isinstance(entry, str) else json.dumps(entry) for entry in value)
    raise DataError(f"data: {place} holds {type(value).__name__}, not text")


def _group(value: Any, place: str) -> str | None:
    """What a text is a piece of, by a name, a number or a date; None where there is none."""
    if value is None or value != value or value == "":
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers with holes
    if isinstance(value, dict | list):
        raise DataError(f"data: {place} holds {type(value).__name__}, not a name")
    return str(value)


def first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
