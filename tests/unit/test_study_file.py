"""YAML 1.2 scalars, places, overrides, and files that no study needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpsearch.errors import SpecError
from hpsearch.spec.parsing.yaml_file import MAX_BYTES, parse_scalar, parse_study, read_study_file


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E2", 300.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-3", -3),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("12:30:00", "12:30:00"),
        ("'1e-4'", "1e-4"),
        ("1_000", "1_000"),
        ("2026-11-23", "2026-11-23"),
        ("[1, 2e0]", [1, 2.0]),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    parsed = parse_scalar(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_every_key_and_value_has_its_place() -> None:
    document = parse_study("a: 1\nb:\n  c: [x, {d: 2}]\n", source="f")
    assert document.content == {"a": 1, "b": {"c": ["x", {"d": 2}]}}
    mark = document.value_marks[("b", "c", 1, "d")]
    assert (mark.line, mark.column) == (3, 14)
    assert document.key_marks[("b", "c")].column == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a: 1\nb: 2\na: 3\n", "f:3:1: a: given twice, first on line 1", id="duplicate key"),
        pytest.param(
            "a: &x 1\nb: *x\n", "f:1:4: not valid YAML: anchors (&) and aliases (*) are not allowed", id="alias"
        ),
        pytest.param("a: !!python/object:os.system x\n", "f:1:4: not valid YAML: tags (!) are not allowed", id="tag"),
        pytest.param("a: " + "[" * 40 + "]" * 40, "nested deeper than 32 levels", id="deep"),
        pytest.param("", "f: empty", id="empty"),
        pytest.param("- 1\n", "f:1:1: expected a mapping", id="list"),
        pytest.param("a: [1\n", "not valid YAML", id="unclosed"),
        pytest.param("a: 1\n---\nb: 2\n", "not valid YAML", id="two documents"),
        pytest.param("a: \x00\n", "not valid YAML", id="NUL"),
    ],
)
def test_what_is_no_study_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_study(text, source="f")
    assert message in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such study file"):
        read_study_file(tmp_path / "none.yaml")
    (tmp_path / "big.yaml").write_text("a: " + "x" * MAX_BYTES)
    with pytest.raises(SpecError, match="larger than 256 kB"):
        read_study_file(tmp_path / "big.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(SpecError, match=r"latin\.yaml:2: not UTF-8"):
        read_study_file(tmp_path / "latin.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        read_study_file(tmp_path)


def test_overrides_make_their_way_and_name_themselves() -> None:
    document = parse_study("search:\n  num_layers: {min: 1, max: 2}\n  sizes: [1, 2]\n", source="f")
    document.override("search.num_layers.max", 4, "--set a")
    document.override("search.sizes.1", 5, "--set b")
    document.override("budget.trials", 3, "--set c")
    assert document.content == {
        "search": {"num_layers": {"min": 1, "max": 4}, "sizes": [1, 5]},
        "budget": {"trials": 3},
    }
    with pytest.raises(SpecError, match="--set d"):
        document.override("search.sizes.7", 1, "--set d")
    with pytest.raises(SpecError, match=r"search\.sizes\.0 is not there"):
        document.override("search.sizes.0.x", 1, "--set e")
