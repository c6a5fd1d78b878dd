"""A Ray cluster of three nodes with a token: joined, submitted to, looted of a node; and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import hpsearch as package
from tests.commands import HPSEARCH, run_command
from tests.conftest import TINY, alive_nodes, command_of, kill_all
from tests.object_store import BUCKET, ObjectStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
TOKEN = "5ca1ab1e" * 8
PATIENCE_S = 150.0
SERIAL = TINY.replace("backend: inline\n", "").replace("gpus_per_trial: 0", "gpus_per_trial: 0, parallel: 1")


@dataclass
class Cluster:
    """A head and two more nodes on this machine, each with a folder of its own for Ray's files."""

    root: Path
    objects: ObjectStore
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port, self.http = _free_port(), _free_port()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "HPSEARCH_"))},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_AUTH_MODE": "token",
            "HPSEARCH_FOLDER": str(self.root / "shared"),
            "HPSEARCH_CACHE": str(self.root / "cache"),
            **self.objects.environment,
            "COLUMNS": "160",
        }
        head = f"--head --port {self.port} --dashboard-host 127.0.0.1 --dashboard-port {self.http} --num-gpus 2"
        self.start(*head.split(), "--ray-client-server-port", str(_free_port()))
        self.wait_for(lambda: self.run("jobs").returncode == 0)
        self.start("--address", self.address, "--resources", '{"fast": 1}')
        self.start("--address", self.address)
        self.wait_for(lambda: self.count() == 3)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def start(self, *arguments: str, inside: Sequence[str] = ()) -> None:
        """Another node, inside another command if so. Nodes that shared their files would tidy up each other's."""
        folder = self.root / str(len(self.nodes))
        agent = ["--dashboard-agent-listen-port", str(_free_port())]
        command = [*inside, "ray", "start", "--num-cpus", "2", *arguments, "--temp-dir", str(folder), *agent, "--block"]
        with (self.root / f"node-{len(self.nodes)}.txt").open("wb") as log:
            node = subprocess.Popen(
                command, env={**self.environment, "RAY_health_check_period_ms": "500"}, stdout=log, stderr=log
            )
        self.nodes.append(node)

    def run(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """The command, as somebody who has the token and the cluster's address."""
        given = {"RAY_API_SERVER_ADDRESS": self.url, **environment}
        return run_command(arguments, folder=cwd or Path.cwd(), environment={**self.environment, **given})

    def count(self) -> int:
        return alive_nodes(self.url, TOKEN)

    def wait_for(self, what: Callable[[], Any]) -> Any:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if found := what():
                return found
            time.sleep(0.3)
        raise AssertionError("waited in vain: " + "".join(file.read_text() for file in self.root.glob("node-*.txt")))

    def kill(self, node: int) -> None:
        """The machine of a node is gone."""
        top = psutil.Process(self.nodes[node].pid)
        kill_all([*top.children(recursive=True), top])
        self.nodes[node].wait()

    def end(self) -> None:
        for node in range(len(self.nodes)):
            if self.nodes[node].poll() is None:
                self.kill(node)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return port if not 10002 <= port <= 19999 else _free_port()  # where Ray's workers listen


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    root = Path(tempfile.mkdtemp(prefix="hps-c-"))  # short: Ray's sockets live below it
    made = objects = None
    try:
        objects = ObjectStore()
        made = Cluster(root, objects)
        yield made
    finally:
        if made is not None:
            made.end()
        if objects is not None:
            objects.end()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(SERIAL)
    return file


def board(folder: Path, name: str = "tiny") -> list[tuple[Any, ...]]:
    opened = package.open_study(name, store=f"sqlite:///{folder}.db")
    return [(row.trial, row.score, row.params) for row in opened.board().rows]


@pytest.mark.nightly
def test_one_study_file_runs_everywhere_with_the_same_result(cluster: Cluster, study: Path, tmp_path: Path) -> None:
    def store(where: str) -> str:
        return f"sqlite:///{tmp_path}/{where}.db"

    study.write_text(SERIAL.replace("budget: {trials: 4}", "budget: {trials: 2}"))
    inline = cluster.run("launch", "study.yaml", "--backend=inline", "--store", store("inline"), cwd=tmp_path)
    assert inline.returncode == 0, inline.stderr
    joined = cluster.run("launch", "study.yaml", "--store", store("joined"), "--address", cluster.address, cwd=tmp_path)
    assert joined.returncode == 0, joined.stderr
    assert "on Ray on 3 nodes (6 CPUs, 2 GPUs), 1 at a time" in joined.stderr
    folder = f"{BUCKET}/{tmp_path.name}"
    submitted = cluster.run("submit", "study.yaml", "--store", store("submitted"), "--folder", folder, cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr + submitted.stdout
    models = [key for key in cluster.objects.keys(tmp_path.name) if key.endswith("model.safetensors")]
    assert len(models) == 2, "in the object store that the nodes share"
    assert "trial 0 completed" in submitted.stdout
    assert "INFO" not in submitted.stderr
    plain = subprocess.run(
        ["ray", "job", "submit", "--address", cluster.url, "--working-dir", ".", "--runtime-env-json",
         json.dumps({"env_vars": {"HPSEARCH_STORE": store("plain")}, "excludes": ["*.db*"]}),
         "--", "hpsearch", "launch", "study.yaml"],
        cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert plain.returncode == 0, plain.stdout + plain.stderr
    results = {where: board(tmp_path / where) for where in ("inline", "joined", "submitted", "plain")}
    assert len(results["inline"]) == 2
    for where, rows in results.items():
        assert rows == results["inline"], where


def test_a_job_is_listed_asked_after_and_stopped(cluster: Cluster, study: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/long.db"
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"a{number} b{number} c{number} d " * 30}) + "\n" for number in range(60))
    )
    options = ["--set=search.num_epochs=400", "--set=data={files: text.jsonl}", "--store", store]
    done = cluster.run("submit", "study.yaml", "--job-id", "long", "--detach", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = cluster.run("submit", "study.yaml", "--job-id", "long", "--detach", *options, cwd=tmp_path)
    assert again.returncode == 2
    assert "there is a job long at" in again.stderr
    cluster.wait_for(lambda: " epoch 2/400" in cluster.run("logs", "long").stdout)
    listed = json.loads(cluster.run("jobs", "--json").stdout)["jobs"]
    (job,) = [job for job in listed if job["id"] == "long"]
    assert (job["status"], job["study"], job["store"]) == ("RUNNING", "tiny", store)
    asked = cluster.run("status", "long", "--store", store)
    assert "job     long: RUNNING" in asked.stdout, asked.stderr
    assert "1 running" in asked.stdout
    assert "driver  " in asked.stdout
    assert cluster.run("stop", "long").returncode == 0
    followed = cluster.run("logs", "long", "--follow")
    assert followed.returncode != 0
    assert "stopped by SIGTERM. To resume:" in followed.stdout
    opened = package.open_study("tiny", store=store)
    assert [trial.state for trial in opened.trials()] == ["interrupted"]
    missing = cluster.run("logs", "nope")
    assert missing.returncode == 2
    assert "no job nope" in missing.stderr


def test_the_password_of_a_submitted_store_lies_nowhere_in_the_cluster(
    cluster: Cluster, study: Path, tmp_path: Path
) -> None:
    store = "postgresql://somebody:canary4711@127.0.0.1:1/studies"
    command = ["submit", "study.yaml", "--job-id", "secret", "--detach"]
    done = cluster.run(*command, cwd=tmp_path, HPSEARCH_STORE=store)
    assert done.returncode == 0, done.stderr
    said = cluster.wait_for(lambda: "127.0.0.1" in (log := cluster.run("logs", "secret").stdout) and log)
    assert "canary" not in said
    listed = cluster.run("jobs", "--json").stdout
    assert "somebody:***@127.0.0.1:1" in listed, "it is masked where it is shown"
    assert "canary" not in listed
    cluster.run("stop", "secret")
    files = [file for file in cluster.root.rglob("*") if file.is_file() and not file.is_symlink()]
    assert any(file.name == "study.yaml" for file in files), "what was submitted lies there"
    assert [file for file in files if b"canary" in file.read_bytes()] == []


@pytest.mark.faults
def test_trials_of_a_lost_node_go_on_elsewhere(cluster: Cluster, study: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/lost.db"
    study.write_text(SERIAL.replace(", parallel: 1", ""))
    command = ["launch", "study.yaml", "--store", store, "--address", cluster.address, "--json"]
    overrides = ["--set=search.num_epochs=60", "--set=prune={overfit: false, unpromising: none}", "--trials=6"]
    with (tmp_path / "events.jsonl").open("w") as events, (tmp_path / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            [*HPSEARCH, *command, *overrides], cwd=tmp_path, stdout=events, stderr=errors,
            env=cluster.environment, text=True,
        )  # fmt: skip

    def on_the_last_node() -> set[int]:
        below = psutil.Process(cluster.nodes[2].pid).children(recursive=True)
        workers = {child.pid for child in below if "Trainable" in command_of(child)}
        found = set()
        for file in (cluster.root / "shared").glob("tiny-*/trial-*/pulse.json"):
            try:
                if json.loads(file.read_text())["pid"] in workers:
                    found.add(int(file.parent.name.split("-")[1]))
            except (OSError, ValueError):
                continue
        return found

    try:
        victims = cluster.wait_for(on_the_last_node)
        cluster.kill(2)
        assert process.wait(250) == 0, (tmp_path / "errors.txt").read_text()
    finally:
        process.kill()
        process.wait()
        cluster.start("--address", cluster.address)
    trials = package.open_study("tiny", store=store).trials()
    assert [(trial.number, trial.state) for trial in trials] == [(n, "completed") for n in range(6)]
    for number in victims:
        assert (trials[number].attempt, trials[number].worker_deaths) == (2, 0), "no fault of the trial"
    assert package.doctor(store=store) == []
    cluster.wait_for(lambda: cluster.count() == 3)


def test_trials_share_gpus_and_go_where_their_resources_are(cluster: Cluster, study: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/gpus.db"
    resources = "--set=resources={gpus_per_trial: 0.5, cpus_per_trial: 1}"
    command = ["launch", "study.yaml", "--trials=2", "--store", store, "--address", cluster.address]
    done = cluster.run(*command, resources, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 at a time, 1 CPU and 0.5 GPU each" in done.stderr, "as many as the CPUs beside the GPUs take"
    seen = {trial.provenance["visible_gpus"] for trial in package.open_study("tiny", store=store).trials()}
    assert seen <= {"0", "1"}
    assert seen
    fast = "--set=resources={gpus_per_trial: 0, custom_per_trial: {fast: 1}}"
    done = cluster.run(*command, "--name", "fast", fast, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 at a time" in done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_trial_on_several_gpus_has_a_process_for_each(
    cluster: Cluster, study: Path, tmp_path: Path, nodes: int
) -> None:
    """Here on CPUs, which Ray is told are GPUs. Each process takes its part of the sampled batch size."""

    def launched(name: str, gpus: int, *options: str) -> package.Study:
        store = f"sqlite:///{tmp_path}/{name}.db"
        done = cluster.run(
            "launch", "study.yaml", "--trials=2", "--store", store, "--address", cluster.address,
            "--set=search.learning_rate={min: 1e-3, max: 1e-2, scale: log}",  # rounding grows with larger ones
            f"--set=resources.gpus_per_trial={gpus}", *options, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"1 at a time, {max(1, gpus)} CPU" in done.stderr
        return package.open_study("tiny", store=store)

    alone = launched("alone", 0)
    if nodes == 1:
        together = launched("together", 2)
    else:
        cluster.start("--address", cluster.address, "--num-gpus", "1")
        try:
            cluster.wait_for(lambda: cluster.count() == 4)
            together = launched("spread", 3, "--set=resources.across_nodes=true")
        finally:
            cluster.kill(3)
            cluster.nodes.pop()
            cluster.wait_for(lambda: cluster.count() == 3)
    for one, several in zip(alone.trials(), together.trials(), strict=True):
        assert several.state == one.state == "completed"
        assert several.provenance["processes"] == 1 + nodes
        curves = [
            [(point.train_loss, point.valid_loss) for point in opened.trial(one.number).points]
            for opened in (alone, together)
        ]
        assert curves[0] == [pytest.approx(point, abs=1e-4) for point in curves[1]]


@pytest.mark.nightly
def test_a_trial_that_loses_one_of_its_processes_goes_on(cluster: Cluster, study: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/lost.db"
    launched = subprocess.Popen(
        [*HPSEARCH, "launch", "study.yaml", "--name=loses", "--trials=1", "--store", store,
         "--address", cluster.address, "--set=resources.gpus_per_trial=2", "--set=search.num_epochs=60",
         "--set=prune.overfit=false"],
        env=cluster.environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def follower() -> psutil.Process | None:
        log = "".join(file.read_text() for file in (cluster.root / "shared").glob("loses-*/logs/trial-00000.jsonl"))
        if "evaluation 10 " not in log:
            return None
        family = psutil.Process(cluster.nodes[0].pid).children(recursive=True)
        return next((child for child in family if "_Follower" in command_of(child)), None)

    cluster.wait_for(follower).kill()
    _, said = launched.communicate(timeout=200)
    assert launched.returncode == 0, said
    assert "process 1 of 2 ended" in said
    (trial,) = package.open_study("loses", store=store).trials()
    assert (trial.state, trial.attempt, trial.worker_deaths) == ("completed", 2, 1)


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        pytest.param(["launch", "study.yaml", "--address", "{address}", "--set=resources.gpus_per_trial=1", "--set=resources.cpus_per_trial=3"], {}, 75, "cpus_per_trial is 3, but no node of Ray has more than 2 CPU", id="more than a node has"),
        pytest.param(["launch", "study.yaml", "--address", "{address}", "--set=resources.gpus_per_trial=3"], {}, 75, "gpus_per_trial is 3, but no node of Ray has more than 2 GPU", id="more GPUs than a node has"),
        pytest.param(["launch", "study.yaml", "--address", "{address}", "--set=resources.accelerator_type=H100"], {}, 75, "accelerator_type is H100, but no node", id="no such GPU"),
        pytest.param(["launch", "study.yaml", "--address", "127.0.0.1:1"], {}, 75, "there is no Ray at 127.0.0.1:1: Connection refused", id="no cluster"),
        pytest.param(["launch", "study.yaml", "--address", "ray://127.0.0.1:1"], {}, 2, "hpsearch submit STUDY --address", id="Ray client"),
        pytest.param(["launch", "study.yaml"], {"RAY_ADDRESS": "http://127.0.0.1:1"}, 2, "RAY_ADDRESS", id="a job address for a launch"),
        pytest.param(["launch", "study.yaml", "--address", "{address}"], {"RAY_AUTH_TOKEN": "f" * 64}, 75, "RAY_AUTH_TOKEN", id="wrong token for a launch", marks=pytest.mark.faults),
        pytest.param(["submit", "study.yaml"], {"RAY_AUTH_TOKEN": "f" * 64}, 75, "the token in RAY_AUTH_TOKEN is not the cluster's", id="wrong token"),
        pytest.param(["submit", "study.yaml"], {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}, 75, "asks for a token: give it in RAY_AUTH_TOKEN", id="no token"),
        pytest.param(["submit", "study.yaml", "--address", "http://127.0.0.1:1"], {}, 75, "there is no Ray cluster that takes jobs at http://127.0.0.1:1", id="no cluster for a job"),
        pytest.param(["submit", "study.yaml", "--address", "127.0.0.1:1"], {}, 2, "jobs are submitted to http://HEAD:8265", id="no http"),
        pytest.param(["submit", "study.yaml", "--job-id", "../x"], {}, 2, "job id '../x': expected letters", id="hostile job id"),
        pytest.param(["submit", "study.yaml", "--set=search.num_layers={min: 3, max: 2}"], {}, 2, "min (3) must be below max (2)", id="bad study"),
        pytest.param(["submit", "gone.yaml"], {}, 2, "no such study file", id="no study"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_and_nothing_starts(
    cluster: Cluster,
    study: Path,
    tmp_path: Path,
    arguments: list[str],
    environment: dict[str, str],
    code: int,
    message: str,
) -> None:
    before = cluster.run("jobs", "--json").stdout
    given = [
        argument.format(address=cluster.address) if "{address}" in argument else argument for argument in arguments
    ]
    done = cluster.run(*given, cwd=tmp_path, **environment)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr + done.stdout
    assert cluster.run("jobs", "--json").stdout == before
    assert not list(tmp_path.glob("*.db"))


def test_nodes_with_other_versions_are_named(cluster: Cluster, study: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m, hpsearch.cli.main as c\n"
        "real = m.version\n"
        "m.version = lambda name: '0.0.1' if name == 'torch' else real(name)\n"
        "c.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "launch", "study.yaml", "--address", cluster.address],
        env=cluster.environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 75
    assert "nodes of the cluster cannot run this study" in done.stderr
    assert done.stderr.count(", and 0.0.1 here") == 3
    assert not list(tmp_path.glob("*.db"))


@pytest.mark.nightly
def test_a_node_that_does_not_reach_the_folder_is_named(cluster: Cluster, study: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart"
    apart.mkdir()
    hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(apart)]
    if subprocess.run([*hidden, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a folder can be hidden from a process by root only")
    cluster.start("--address", cluster.address, inside=hidden)
    try:
        cluster.wait_for(lambda: cluster.count() == 4)
        done = cluster.run("launch", "study.yaml", "--address", cluster.address, "--folder", str(apart), cwd=tmp_path)
        assert done.returncode == 75
        assert f"does not reach {apart}; give a shared --folder, or HPSEARCH_FOLDER" in done.stderr
        assert done.stderr.count("does not reach") == 1
        assert not list(tmp_path.glob("*.db"))
    finally:
        cluster.kill(len(cluster.nodes) - 1)
        cluster.wait_for(lambda: cluster.count() == 3)


def test_a_launch_that_is_stopped_leaves_the_cluster_alone(cluster: Cluster, study: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*HPSEARCH, "launch", "study.yaml", "--address", cluster.address,
         "--store", f"sqlite:///{tmp_path}/stopped.db", "--set=search.num_epochs=400"],
        cwd=tmp_path, env=cluster.environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if " epoch 1/" in line:
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert cluster.count() == 3
    assert not list((cluster.root / "shared").glob(".tune-*")), "nothing is left in the shared folder"
