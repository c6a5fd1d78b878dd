"""What the containers would run, run here: the commands of the compose file as processes, a study submitted to them."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import hpsearch as package
from tests.commands import HPSEARCH
from tests.conftest import TINY, alive_nodes, kill_all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
PATIENCE_S = 120.0
VALUES = {"RAY_AUTH_TOKEN": "5ca1ab1e" * 8, "HPSEARCH_DASHBOARD_TOKEN": "d15ea5e" * 8}


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return str(port) if not 10002 <= port <= 19999 else _free_port()  # where Ray's workers listen


def test_the_example_names_what_the_compose_file_asks_for() -> None:
    text = (ROOT / "docker/compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+)", text)) | {secret["environment"] for secret in COMPOSE["secrets"].values()}
    given = set(re.findall(r"^(\w+)=", (ROOT / "docker/.env.example").read_text(), re.MULTILINE))
    assert given == asked


def test_no_port_is_open_to_other_machines_and_every_ray_has_a_token() -> None:
    for name, service in COMPOSE["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        if "ray start" in str(service.get("command")):
            assert service["environment"]["RAY_AUTH_MODE"] == "token", name
            assert ":?" in service["environment"]["RAY_AUTH_TOKEN"], "compose stops when there is none"


def test_prometheus_looks_where_the_metrics_are() -> None:
    (scrape,) = yaml.safe_load((ROOT / "docker/prometheus.yml").read_text())["scrape_configs"]
    (found,) = scrape["dns_sd_configs"]
    nodes = {name for name, service in COMPOSE["services"].items() if "ray start" in str(service.get("command"))}
    assert set(found["names"]) == nodes
    for name in nodes:
        assert f"--metrics-export-port={found['port']} " in COMPOSE["services"][name]["command"] + " "


def test_the_image_has_what_the_compose_file_and_the_manifests_run() -> None:
    from importlib import metadata

    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", dockerfile)
    assert set(extras.split(",")) <= set(metadata.metadata("hpsearch").get_all("Provides-Extra") or [])
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", dockerfile, re.MULTILINE)
        for name in line.split()
    }
    kept = set(re.findall(r"^!(.+)$", (ROOT / "docker/Dockerfile.dockerignore").read_text(), re.MULTILINE))
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    for file in (ROOT / "docker/kuberay").glob("ray*.yaml"):
        found = yaml.safe_load(file.read_text())
        cluster = found["spec"].get("rayClusterSpec", found["spec"])
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["rayVersion"] == metadata.version("ray")
        if "entrypoint" in found["spec"]:
            study = found["spec"]["entrypoint"].split()[-1]
            assert (ROOT / study.replace("/home/hpsearch/", "")).is_file()


def test_the_dockerfile_passes_the_linter(tmp_path: Path) -> None:
    assert _tool("hadolint", str(ROOT / "docker/Dockerfile")) == (0, "")
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN cd /tmp && apt-get install python3\n")
    assert _tool("hadolint", str(bad))[0] == 1, "it would say so"


def test_the_compose_file_follows_the_compose_schema(tmp_path: Path) -> None:
    check = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    code, said = _tool(*check, str(ROOT / "docker/compose.yaml"))
    assert code == 0, said
    bad = tmp_path / "compose.yaml"
    bad.write_text((ROOT / "docker/compose.yaml").read_text().replace("interval:", "intervall:"))
    assert _tool(*check, str(bad))[0] == 1, "it would say so"


GROUP = {
    "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
    "template": {"type": "object"},
}
RAY_CLUSTER = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
    "properties": {
        "rayVersion": {"type": "string"},
        "authOptions": {"type": "object", "properties": {"mode": {"enum": ["disabled", "token"]}}},
        "headGroupSpec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["template"],
            "properties": GROUP,
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["groupName", "template"],
                "properties": {**GROUP, "groupName": {"type": "string"}, "replicas": {"type": "integer"}},
            },
        },
    },
}
RAY_JOB = {
    "type": "object",
    "additionalProperties": False,
    "required": ["entrypoint", "rayClusterSpec"],
    "properties": {
        "entrypoint": {"type": "string"},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "backoffLimit": {"type": "integer"},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": {"type": "integer"},
        "rayClusterSpec": RAY_CLUSTER,
    },
}
"""The part of https://docs.ray.io/en/master/cluster/kubernetes/references/api.html that the manifests use."""


@pytest.mark.parametrize("file", sorted((ROOT / "docker/kuberay").glob("*.yaml")), ids=lambda file: file.stem)
def test_manifests_follow_the_schemas_of_kubernetes_and_kuberay(file: Path) -> None:
    import jsonschema
    import kubernetes_validate

    found = yaml.safe_load(file.read_text())
    version = kubernetes_validate.latest_version()
    if found["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(found, version, strict=True)
        return
    jsonschema.validate(found["spec"], {"RayJob": RAY_JOB, "RayCluster": RAY_CLUSTER}[found["kind"]])
    cluster = found["spec"].get("rayClusterSpec", found["spec"])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, version, strict=True)
        del pod["spec"]["containers"][0]["name"]
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod, version, strict=True)


def _tool(*command: str) -> tuple[int, str]:
    done = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]], capture_output=True, text=True, check=False
    )
    return done.returncode, (done.stdout + done.stderr).strip() if done.returncode else ""


class Stack:
    """The services of the compose file as processes of this checkout, on free ports of 127.0.0.1."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder = folder
        self.gcs, self.http, self.dashboard = _free_port(), _free_port(), _free_port()
        (folder / "store_url").write_text(store)
        self._moved = {
            "--port=6379": f"--port={self.gcs}",
            "head:6379": f"127.0.0.1:{self.gcs}",
            "127.0.0.1:6379": f"127.0.0.1:{self.gcs}",
            "8265": self.http,
            "8080": self.dashboard,
            "0.0.0.0": "127.0.0.1",
            "/run/secrets/": f"{folder}/",
            "/var/lib/hpsearch": f"{folder}/runs",
        }
        self.metrics: list[str] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def environment(self, service: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "HPSEARCH_"))}
        kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
        given = COMPOSE["services"][service].get("environment", {})
        filled = {
            name: re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: VALUES[found[1]], value) for name, value in given.items()
        }
        return {**kept, **{name: self._here(value) for name, value in filled.items()}}

    def start(self, service: str, *more: str) -> None:
        command = shlex.split(self._here(COMPOSE["services"][service]["command"]))
        if command[0] == "ray":
            self.metrics.append(_free_port())
            command[command.index("--metrics-export-port=9464")] = f"--metrics-export-port={self.metrics[-1]}"
            more = (*more, "--temp-dir", str(self.folder / str(len(self.processes))))
            more = (*more, "--dashboard-agent-listen-port", _free_port())
        with (self.folder / f"{service}-{len(self.processes)}.txt").open("wb") as log:
            self.processes.append(
                subprocess.Popen([*command, *more], env=self.environment(service), stdout=log, stderr=log)
            )

    def is_healthy(self, service: str) -> bool:
        kind, *command = COMPOSE["services"][service]["healthcheck"]["test"]
        assert kind == "CMD"
        moved = [self._here(word) for word in command]
        return subprocess.run(moved, env=self.environment(service), capture_output=True, check=False).returncode == 0

    def wait_for(self, what: Callable[[], Any]) -> None:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if what():
                return
            time.sleep(0.5)
        raise AssertionError("waited in vain: " + "".join(file.read_text() for file in self.folder.glob("*-*.txt")))

    def end(self) -> None:
        for process in self.processes:
            kill_all(psutil.Process(process.pid).children(recursive=True))
            process.kill()
            process.wait()

    def _here(self, text: str) -> str:
        for there, here in self._moved.items():
            text = text.replace(there, here)
        return text


@pytest.fixture
def stack(postgres_store: str, short_folder: Path) -> Iterator[Stack]:
    made = Stack(short_folder, postgres_store)
    try:
        yield made
    finally:
        made.end()


@pytest.mark.nightly
def test_a_study_submitted_to_the_stack_is_in_its_store_and_its_dashboard(stack: Stack, tmp_path: Path) -> None:
    stack.start("dashboard")  # before the first study there is
    stack.start("head", "--ray-client-server-port", _free_port())
    stack.wait_for(lambda: stack.is_healthy("head"))
    stack.start("worker", "--num-cpus", "2")
    (tmp_path / "study.yaml").write_text(TINY.replace("backend: inline\n", "").replace("trials: 4", "trials: 2"))
    submit = [*HPSEARCH, "submit", "study.yaml", "--address", f"http://127.0.0.1:{stack.http}"]
    token = VALUES["RAY_AUTH_TOKEN"]
    stack.wait_for(lambda: alive_nodes(f"http://127.0.0.1:{stack.http}", token) == 2)
    refused = subprocess.run(
        submit,
        cwd=tmp_path,
        env={**os.environ, "RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 75
    done = subprocess.run(
        submit, cwd=tmp_path, env={**os.environ, "RAY_AUTH_TOKEN": token}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on Ray on 2 nodes (2 CPUs, 0 GPUs), 2 at a time" in done.stdout, "the head runs launches alone"
    opened = package.open_study("tiny", store=(stack.folder / "store_url").read_text())
    assert len(opened.board().rows) >= 1
    assert package.doctor(store=opened.store) == []
    states = Counter(trial.state for trial in opened.trials())
    stack.wait_for(lambda: _trials_in_metrics(stack.metrics[0]) == states)
    assert stack.is_healthy("dashboard")
    request = urllib.request.Request(
        f"http://127.0.0.1:{stack.dashboard}/api/studies",
        headers={"Authorization": f"Bearer {VALUES['HPSEARCH_DASHBOARD_TOKEN']}"},
    )
    with urllib.request.urlopen(request) as answer:
        assert [study["study_name"] for study in json.load(answer)["study_summaries"]] == ["tiny"]


def _trials_in_metrics(port: str) -> dict[str, int]:
    """What Prometheus would read from the head: trials by state."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(r"^ray_hpsearch_trials_total\{(.*)\} ([\d.]+)$", text, re.MULTILINE)
    assert all('study="tiny"' in tags for tags, _ in found)
    return {re.findall(r'state="(\w+)"', tags)[0]: int(float(count)) for tags, count in found}
