"""What another user of the machine can reach of a launch: nothing but what Ray documents, and that asks for a token."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hpsearch.files.scratch import is_same_user, private_folder
from tests.conftest import command_of
from tests.faults.harness import Study

pytestmark = pytest.mark.slow
SECRET = "s3cret-in-the-environment"
STRANGER = 65534
"""A user id that is not this process's: nobody's."""

PROBE = """
import json, os, socket, stat, sys
os.setgroups([]); os.setgid({user}); os.setuid({user})
found = []
for top in json.loads(sys.argv[1]):
    for place, folders, files in os.walk(top):
        for name in [*folders, *files]:
            path = os.path.join(place, name)
            try:
                status = os.lstat(path)
            except OSError:
                continue
            if stat.S_ISLNK(status.st_mode) or status.st_mtime < float(sys.argv[2]):
                continue
            if stat.S_ISSOCK(status.st_mode):
                with socket.socket(socket.AF_UNIX) as client:
                    try:
                        client.connect(path)
                        found.append(path)
                    except OSError:
                        pass
            elif os.access(path, os.R_OK if not stat.S_ISDIR(status.st_mode) else os.W_OK):
                found.append(path)
for pid in json.loads(sys.argv[3]):
    try:
        open(f"/proc/{{pid}}/environ", "rb").read()
        found.append(f"environment of {{pid}}")
    except OSError:
        pass
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Study, subprocess.Popen[str], float]]:
    """A launch that trains, with a secret in its environment."""
    began = time.time() - 1
    # Its processes are the same from test to test: none of its trials comes to its end meanwhile.
    endless = ["search.num_epochs=400"]
    study = Study(folder=tmp_path_factory.mktemp("launched") / "study", trials=2, pace=1.0, overrides=endless)
    study.clock = {"AWS_SECRET_ACCESS_KEY": SECRET}
    try:
        process = study.launch()
        study.wait_for_epochs(2, process)
        yield study, process, began
    finally:
        study.end()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_reaches_no_file_socket_or_environment_of_a_launch(
    launched: tuple[Study, subprocess.Popen[str], float],
) -> None:
    _, process, began = launched
    pids = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    assert SECRET.encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
    tops = [tempfile.gettempdir(), "/dev/shm", "/var/tmp"]
    arguments = [json.dumps(tops), str(began), json.dumps(pids)]
    said = subprocess.run(
        [sys.executable, "-S", "-c", PROBE.format(user=STRANGER), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    # What tests of other processes leave in the temporary folder meanwhile is none of this launch's.
    ours = [path for path in json.loads(said.stdout) if "hps-" in path or not path.startswith(tempfile.gettempdir())]
    assert [path for path in ours if "/hps-t-" not in path and "/hps-pg-" not in path] == []


def test_the_ports_of_a_launch_are_rays_own_and_its_server_asks_for_a_token(
    launched: tuple[Study, subprocess.Popen[str], float],
) -> None:
    _, process, _ = launched
    children = psutil.Process(process.pid).children(recursive=True)
    commands = [command_of(child) for child in children]
    assert any("raylet" in command for command in commands)
    assert not any("monitor.py" in command for command in commands), "what nobody asks"
    ours = [child for child in children if "fork_server" in command_of(child)]
    assert len(ours) > 1, "the server and the forks that train"
    assert [child.pid for child in ours if child.net_connections("inet")] == []
    token = {
        variable.partition(b"=")[2]
        for child in ours
        for variable in Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0")
        if variable.startswith(b"RAY_AUTH_TOKEN=")
    }
    assert len(token) == 1
    assert len(token.pop()) == 64


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_worker_sends_nothing_to_a_socket_of_another_user(tmp_path: Path) -> None:
    from hpsearch.backends.fork_server import Fork

    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    address = str(tmp_path / "fork")
    listen = (
        f"import os, socket\nos.setgid({STRANGER}); os.setuid({STRANGER})\n"
        f"listener = socket.socket(socket.AF_UNIX); listener.bind({address!r}); listener.listen()\n"
        "print('ready', flush=True)\nconnection, _ = listener.accept()\nprint(connection.recv(4096), flush=True)"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", listen], stdout=subprocess.PIPE, text=True) as thief:
        assert thief.stdout is not None
        assert thief.stdout.readline() == "ready\n"
        with pytest.raises(PermissionError, match="another user listens"):
            Fork(address, {"PASSWORD": SECRET})
        assert thief.stdout.readline() == "b''\n"


def test_a_socket_tells_its_users_apart() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert is_same_user(ours)


def test_a_private_folder_is_the_users_alone_whatever_is_made_of_what_is_below() -> None:
    with private_folder("test-") as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()


def test_the_folder_of_a_killed_process_is_collected_by_the_next(tmp_path: Path) -> None:
    code = "import time\nfrom hpsearch.files.scratch import private_folder\nwith private_folder('test-') as folder:\n    print(folder, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        folder = Path(child.stdout.readline().strip())
        with private_folder("test-"):
            assert folder.is_dir()  # its process lives
        child.send_signal(signal.SIGKILL)
    with private_folder("test-"):
        assert not folder.exists()


def test_a_temporary_folder_with_too_long_a_name_is_refused_by_name(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    study = Study(folder=tmp_path / "study", trials=1, clock={"TMPDIR": str(long)})
    assert study.finish() == 2
    said = study.errors().read_text()
    assert "TMPDIR" in said
    assert str(long) in said
    assert "trying again" not in said
