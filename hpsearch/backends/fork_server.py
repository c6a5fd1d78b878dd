"""Processes for trials, forked from one that has imported torch and transformers while Ray was still starting.

Each of Ray's workers would import both for itself, 2.5 CPU-seconds each, and not before Ray is up. On the machine of
the launch a worker asks for a fork here instead, keeps it from trial to trial, and passes on what it says; the fork
dies with its worker, and the worker's trial is lost with its fork. A worker that gets no fork imports for itself.

What a worker sends, its environment first of all, is for its own user: the socket lies in a private folder (see
`scratch`), and both ends look who the other is before a byte is sent.

Nothing here may start a thread or touch a GPU before the fork: neither is there after it.
https://docs.pytorch.org/docs/stable/notes/multiprocessing.html (poison fork)
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from hpsearch.files.scratch import is_same_user
from hpsearch.records import Progress, TrialConfig, TrialResult

_BACKLOG = 1024
_ENDS_S = 1.0
"""What a server gets to end its forks; one that is still importing has none."""


def import_worker() -> Any:
    """`hpsearch.worker.run`, imported without looking for garbage among three thousand modules that come to stay."""
    if (worker := sys.modules.get("hpsearch.worker.run")) is None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        gc.disable()
        worker = import_module("hpsearch.worker.run")
        gc.freeze()
        gc.enable()
    return worker


@contextmanager
def fork_server(folder: Path) -> Iterator[str | None]:
    """Start a server that ends with this process; yields the socket to ask it at, below `folder`."""
    if sys.platform != "linux":  # elsewhere the system's own libraries may not survive a fork
        yield None
        return
    address = str(folder / "fork")
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(address)
        except OSError:  # the path is too long, for Ray's own sockets, too: Ray says so
            yield None
            return
        listener.listen(_BACKLOG)
        lifeline, ours = os.pipe()
        command = [sys.executable, "-P", "-m", __name__, str(listener.fileno()), str(lifeline)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path),
            "OMP_NUM_THREADS": "1",  # a trial sets its own number
        }
        server = subprocess.Popen(
            command,
            env=environment,
            pass_fds=(listener.fileno(), lifeline),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    os.close(lifeline)
    try:
        yield address
    finally:
        os.close(ours)
        try:
            server.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


class Fork:
    """A process of a server's, as a worker of Ray's has it. It takes over the worker's environment and output."""

    def __init__(self, address: str, environment: Mapping[str, str]) -> None:
        """Raises OSError when there is none to be had."""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(address)
            if not is_same_user(self._socket):
                raise PermissionError(f"another user listens at {address}")
            socket.send_fds(self._socket, [b"\n"], [1, 2])
            self._lines = self._socket.makefile("rw", encoding="utf-8")
            _, self._pid, can_use_gpus = self._ask(dict(environment), os.getcwd())
            if not can_use_gpus:
                raise OSError("the process that forks has used a GPU, so that its forks cannot")
        except BaseException:
            self._socket.close()
            raise

    def run_trial(self, config: TrialConfig) -> Generator[Progress, None, TrialResult]:
        """`worker.run_trial` in the fork. Raises ChildProcessError with what the trial raised, or when it is dead."""

        def pass_on(number: int, frame: FrameType | None) -> None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)

        in_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, pass_on) if in_main else None
        try:
            self._ask("run", config.model_dump_json())
            while True:
                kind, content = self._ask("next")
                if kind == "result":
                    return TrialResult.from_json(content)
                yield Progress.from_json(content)
        except GeneratorExit:
            self._ask("close")
            raise
        finally:
            if in_main:
                signal.signal(signal.SIGTERM, before)

    def _ask(self, *question: Any) -> list[Any]:
        with suppress(BrokenPipeError):  # what it was that ended the process can still be read
            self._lines.write(json.dumps(question) + "\n")
            self._lines.flush()
        while line := self._lines.readline():
            # What was being said at its death is no line of its own.
            with suppress(ValueError):
                kind, *content = json.loads(line)
                if kind in ("raised", "died"):
                    raise ChildProcessError(*content)
                return [kind, *content]
        raise ChildProcessError("the trial's process is gone, and with it the one that forks")


def serve(listener: socket.socket, lifeline: int) -> None:
    """Fork a process for each connection, end it when its connection ends, until `lifeline` ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with the launch, which has trials to bring to safety
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    worker = import_worker()
    if len(os.listdir("/proc/self/task")) > 1:  # somebody else's import has started a thread
        return
    connections: dict[int, socket.socket] = {}
    """By process."""
    poll = select.poll()
    for end in (listener.fileno(), woken, lifeline):
        poll.register(end, select.POLLIN)
    while True:
        ready = [end for end, _ in poll.poll()]
        if lifeline in ready:
            for pid in connections:
                os.kill(pid, signal.SIGKILL)
            return
        if woken in ready:
            os.read(woken, 4096)
            for pid, status in _ended(connections):
                connection = connections.pop(pid)
                with suppress(KeyError):
                    poll.unregister(connection)
                with connection, suppress(OSError):
                    connection.sendall(("\n" + json.dumps(["died", _how(status)]) + "\n").encode())
            continue  # a connection that was ready may be closed, and its number another's
        for pid, connection in connections.items():
            if connection.fileno() in ready:
                poll.unregister(connection)
                os.kill(pid, signal.SIGKILL)
        if listener.fileno() in ready:
            connection, _ = listener.accept()
            if not is_same_user(connection):
                connection.close()
                continue
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGCHLD, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                for other in (listener, *connections.values()):
                    other.close()
                for end in (woken, wake, lifeline):
                    os.close(end)
                _answer(connection, worker)
            connections[pid] = connection
            poll.register(connection, select.POLLRDHUP)


def _ended(pids: Mapping[int, Any]) -> list[tuple[int, int]]:
    """Those of the processes that have ended, with their status."""
    found = [os.waitpid(pid, os.WNOHANG) for pid in pids]
    return [(pid, status) for pid, status in found if pid]


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"the trial's process was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"the trial's process ended by itself, with status {os.waitstatus_to_exitcode(status)}"


def _answer(connection: socket.socket, worker: Any) -> None:
    """Be the process of one worker of Ray's; never returns."""
    status = 1
    try:
        _, outputs, *_ = socket.recv_fds(connection, 1, 2)
        for number, output in zip((1, 2), outputs, strict=True):
            os.dup2(output, number)
            os.close(output)
        _run_trials(connection, worker)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run_trials(connection: socket.socket, worker: Any) -> None:
    trial: Generator[Progress, None, TrialResult] | None = None
    with connection.makefile("rw", encoding="utf-8") as lines:

        def say(*answer: Any) -> None:
            lines.write(json.dumps(answer) + "\n")
            lines.flush()

        environment, folder = json.loads(lines.readline())
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        say("ready", os.getpid(), worker.can_use_gpus())
        for line in lines:
            asked, *content = json.loads(line)
            try:
                if asked == "run":
                    trial = worker.run_trial(TrialConfig.model_validate_json(content[0]), own_process=True)
                    say("runs")
                elif asked == "next":
                    assert trial is not None
                    say("progress", next(trial).to_json())
                else:
                    assert trial is not None
                    trial.close()
                    say("closed")
            except StopIteration as end:
                say("result", end.value.to_json())
            except Exception:
                say("raised", traceback.format_exc())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    os._exit(0)  # torch takes its time to leave
