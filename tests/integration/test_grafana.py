"""The Grafana dashboards: every panel's SQL on a real PostgreSQL store, every metric one that Ray or we export."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

import hpsearch as package
from hpsearch.backends.ray.metrics import NAMES
from tests.conftest import TINY

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "dashboards" / "grafana"
DASHBOARDS = {file.stem: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}
PANELS = {f"{name}: {panel['title']}": panel for name, dashboard in DASHBOARDS.items() for panel in dashboard["panels"]}


@pytest.fixture(scope="module")
def store(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study that overfits, in a database of its own."""
    server = sa.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text("CREATE DATABASE grafana"))
    server.dispose()
    url = sa.make_url(postgres).set(database="grafana").render_as_string(hide_password=False)
    folder = tmp_path_factory.mktemp("grafana")
    file = folder / "study.yaml"
    file.write_text(f"{TINY.replace('name: tiny', 'name: it.s')}folder: {folder}/runs\n")
    wanted = [
        "data.fraction=0.02",
        "search.num_epochs=30",
        "search.batch_size=[8, 12]",
        "search.learning_rate=1e-2",
        "model.hidden_size=64",
    ]
    package.launch(file, store=url, trials=2, overrides=[*wanted, "training.schedule=constant"])
    return url


def asked(panel: dict[str, Any], language: str) -> list[str]:
    return [target[language] for target in panel["targets"] if language in target]


@pytest.mark.parametrize("title", [title for title, panel in PANELS.items() if asked(panel, "rawSql")])
def test_a_panel_has_rows_of_a_real_study(store: str, title: str) -> None:
    engine = sa.create_engine(store)
    with engine.connect() as connection:
        for query in asked(PANELS[title], "rawSql"):
            filled = query.replace("${study:sqlstring}", "'it.s'")
            assert "$" not in filled, "every variable is quoted by Grafana"
            rows = connection.exec_driver_sql(filled).mappings().all()
            assert rows
            if PANELS[title]["targets"][0]["format"] == "time_series":
                assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
            assert any(value is not None for value in rows[0].values())
    engine.dispose()


def test_the_panels_say_what_the_store_says(store: str) -> None:
    engine = sa.create_engine(store)
    opened = package.open_study("it.s", store=store)
    with engine.connect() as connection:
        (query,) = asked(PANELS["study: Best test score"], "rawSql")
        row = connection.exec_driver_sql(query.replace("${study:sqlstring}", "'it.s'")).mappings().one()
        assert opened.best is not None
        assert row["score"] == opened.best.score
        (query,) = asked(PANELS["studies: Studies"], "rawSql")
        row = connection.exec_driver_sql(query).mappings().one()
        assert (row["study"], row["trials ended"], row["of"], row["driver"]) == ("it.s", 2, 2, None)
        (query,) = asked(PANELS["study: Verdicts"], "rawSql")
        rows = connection.exec_driver_sql(query.replace("${study:sqlstring}", "'it.s'")).mappings().all()
        assert {row["verdict"] for row in rows} <= {"overfitting", "plateau"}
    engine.dispose()


def test_every_metric_is_exported() -> None:
    spec = find_spec("ray.dashboard.modules.reporter.reporter_agent")
    assert spec is not None
    assert spec.origin is not None
    of_ray = set(re.findall(r'"(node_\w+)"', Path(spec.origin).read_text()))
    queries = [query for panel in PANELS.values() for query in asked(panel, "expr")]
    assert queries
    for name in {name for query in queries for name in re.findall(r"ray_(\w+)", query)}:
        assert name.removesuffix("_total") in NAMES or name in of_ray, name


def test_they_are_provisioned_where_compose_puts_them() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["grafana"]
    sources = yaml.safe_load((FOLDER / "provisioning/datasources/hpsearch.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((FOLDER / "provisioning/dashboards/hpsearch.yaml").read_text())["providers"]
    assert f"../dashboards/grafana:{provider['options']['path']}:ro" in compose["volumes"]
    uids = {source["uid"]: source["type"] for source in sources}
    for panel in PANELS.values():
        for target in panel["targets"]:
            assert uids[target["datasource"]["uid"]] == target["datasource"]["type"]
    for name in re.findall(r"\$\{(\w+)\}", (FOLDER / "provisioning/datasources/hpsearch.yaml").read_text()):
        assert name in compose["environment"]
    assert len({dashboard["uid"] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS)
