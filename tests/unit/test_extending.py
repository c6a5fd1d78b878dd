"""What docs/extending.md shows, run from the page: a sampler, a tracker and a metric of one's own, each in one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpsearch
from hpsearch import registry
from hpsearch.errors import SpecError, UsageError
from hpsearch.metrics import ties
from hpsearch.metrics.intervals import interval
from hpsearch.metrics.statistics import METRICS, score, summands
from hpsearch.search.study import first_suggestions
from hpsearch.spec.load import load_study

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


def section(title: str, language: str = "python") -> str:
    part = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", part, re.S)
    assert found is not None
    return found[1]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_samplers.py").write_text(section("A sampler"))
    (tmp_path / "my_trackers.py").write_text(section("A tracker"))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_sampler_proposes_what_a_study_tries(modules: Path, tiny: Path) -> None:
    tiny.write_text(tiny.read_text() + section("A sampler", "yaml"))
    spec = load_study(tiny)
    assert spec.sampler.name == "my_samplers:halton"
    first = first_suggestions(spec, 8)
    assert len({str(params) for params in first}) == 8
    assert first == first_suggestions(spec, 8), "by the study's seed"
    assert first != first_suggestions(
        spec.model_copy(update={"sampler": spec.sampler.model_copy(update={"name": "qmc"})}), 8
    )


@pytest.mark.slow
def test_the_tracker_hears_of_every_trial(modules: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(modules)
    hpsearch.launch(tiny, trials=1, track=["my_trackers:Lines"])
    words = [line.split()[0] for line in (modules / "tiny.log").read_text().splitlines()]
    assert words[0] == "begin"
    assert words[-1] == "end"
    assert "point" in words


def test_the_metric_has_a_score_an_interval_and_ties() -> None:
    names: dict[str, Any] = {}
    try:
        exec(section("A metric"), names)
        rng = np.random.default_rng(0)
        good, bad = ({"exact": (rng.random(400) < share).astype(float)} for share in (0.8, 0.4))
        value = float(score("exact_match", summands("exact_match", good).sum(axis=0), {}))
        assert value == pytest.approx(good["exact"].mean())
        low, high = interval("exact_match", good, {})
        assert low < value < high
        assert (low, high) == pytest.approx((value - 0.04, value + 0.04), abs=0.01), "as a binomial proportion has it"
        resampled = ties.resample("exact_match", [good, bad], {})
        observed = np.array([value, bad["exact"].mean()])
        best, other = ties.tie_p_values(
            observed, resampled, 400, higher_is_better=METRICS["exact_match"].higher_is_better
        )
        assert best > 0.5
        assert other < 0.01, "told from the winner"
    finally:
        METRICS.pop("exact_match", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tpa",
            "unknown sampler 'tpa'; expected tpe, gp, random, cmaes, grid, qmc, or package.module:name of your own",
        ),
        ("os.path", "unknown sampler 'os.path'"),
    ],
)
def test_an_unknown_name_is_named_in_the_study_file(tiny: Path, name: str, message: str) -> None:
    tiny.write_text(f"{tiny.read_text()}sampler: {name}\n")
    with pytest.raises(SpecError, match=re.escape(message)):
        load_study(tiny)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:thing", "cannot import no_such_module"),
        ("hpsearch.errors:thing", "hpsearch.errors has no thing"),
        ("builtins:dict", "sampler builtins:dict: TypeError"),
        ("os.path:join", "sampler os.path:join"),
    ],
)
def test_what_cannot_be_loaded_is_a_usage_error(tiny: Path, name: str, message: str) -> None:
    spec = load_study(tiny, overrides=[f"sampler={name}"])
    with pytest.raises(UsageError, match=message):
        first_suggestions(spec, 1)


def test_everything_built_in_is_there() -> None:
    for kind in (registry.SAMPLERS, registry.TRACKERS):
        for name in kind.built_in:
            assert kind.load(name) is not None
