"""The command: what goes to which stream, in which form, with which exit code."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path

import pandas as pd
import pytest

import hpsearch as package
from tests.commands import run_command
from tests.conftest import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with a study that ran to its end, and what the command printed."""
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("launched")
    (folder / "tiny.yaml").write_text(TINY)
    return folder, run_command(["launch", "tiny.yaml"], folder=folder, environment=dict(os.environ))


def test_launch_prints_the_leaderboard_and_tells_its_progress_aside(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = launched
    assert done.returncode == 0
    assert done.stdout.startswith("rank")
    assert "validation would have chosen trial" in done.stdout
    assert "4 trials: 4 completed" in done.stdout
    lines = done.stderr.splitlines()
    assert lines[0].startswith("study tiny: 4 trials on in this process")
    assert any(line.startswith("trial 0 started: learning_rate=") for line in lines)
    assert any(line.startswith("trial 0 epoch 1/") for line in lines)
    assert any(line.startswith("trial 3 completed: ran its") for line in lines)
    assert "\x1b" not in done.stdout + done.stderr


def read(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run_command(arguments, folder=folder, environment={**os.environ, **env}, timeout_s=60)


def test_rank_in_every_form(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = launched
    found = json.loads(read(folder, "rank", "tiny", "--json").stdout)
    scores = [row["score"] for row in found["trials"]]
    assert scores == sorted(scores)
    assert found["validation_would_choose"] in [row["trial"] for row in found["trials"]]
    rows = list(csv.DictReader(io.StringIO(read(folder, "rank", "tiny", "--csv").stdout)))
    assert [float(row["score"]) for row in rows] == scores
    markdown = read(folder, "rank", "tiny", "--markdown").stdout.splitlines()
    assert markdown[0].startswith("| rank | trial | test perplexity |")
    assert len(markdown) == 6
    assert len(json.loads(read(folder, "rank", "tiny", "--top", "1", "--json").stdout)["trials"]) <= 2
    assert read(folder, "rank", "tiny", "--csv", "--json").returncode == 2


def test_show_draws_the_curve_and_says_why(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = launched
    shown = read(folder, "show", "tiny", "0", COLUMNS="80").stdout
    assert "completed: ran its" in shown
    assert "test perplexity" in shown
    assert "* best checkpoint" in shown
    assert "*" in shown.split("+---")[0]
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 160
    trial = json.loads(read(folder, "show", "tiny", "0", "--json").stdout)
    assert [point["evaluation"] for point in trial["points"]] == list(range(1, len(trial["points"]) + 1))


def test_best_and_studies(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = launched
    best = json.loads(read(folder, "best", "tiny", "--json").stdout)
    assert best["test_rank"] == 1
    assert f"perplexity {best['score']:.2f} (trial {best['trial']})" in read(folder, "studies").stdout
    assert json.loads(read(folder, "studies", "--json").stdout)["studies"][0]["name"] == "tiny"


def test_reading_commands_load_neither_torch_nor_ray(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = launched
    for command in (
        ["rank", "tiny"],
        ["show", "tiny", "0"],
        ["best", "tiny"],
        ["studies"],
        ["status", "tiny"],
        ["logs", "tiny", "0"],
    ):
        code = (
            f"import sys; sys.argv = ['hpsearch', *{command}]\nfrom hpsearch.cli.main import main\n"
            "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
            "print('loaded', sorted({'torch', 'ray', 'optuna', 'transformers'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "loaded []", done.stderr


def test_the_unmodified_dashboard_serves_the_study(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    import socket
    import time

    folder, _ = launched
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [Path(sys.executable).with_name("optuna-dashboard"), "--host", "127.0.0.1", "--port", str(port), "sqlite:///hpsearch.db"],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as answer:
                    (summary,) = json.load(answer)["study_summaries"]
                break
            except OSError:
                time.sleep(0.1)
        assert summary["study_name"] == "tiny"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies/{summary['study_id']}", timeout=30) as answer:
            study = json.load(answer)
        assert len(study["trials"]) == 4
        assert all(trial["state"] == "Complete" and trial["intermediate_values"] for trial in study["trials"])
        assert study["objective_names"] == ["validation loss (nats per token)"]
    finally:
        server.terminate()
        server.wait(30)


def test_check_and_dry_run_say_the_same(tiny: Path, hpsearch: Run) -> None:
    checked, dry = hpsearch("check", str(tiny)), hpsearch("launch", str(tiny), "--dry-run")
    assert checked.returncode == dry.returncode == 0
    assert checked.stdout == dry.stdout
    for word in ("first tries", "leakage", "to train", "resumes", "devices", "infinite"):
        assert word in checked.stdout
    assert json.loads(hpsearch("check", str(tiny), "--json").stdout)["store"] == "new"
    assert not (tiny.parent / "studies.db").exists()


def test_launch_as_json_lines(tiny: Path, hpsearch: Run) -> None:
    done = hpsearch("launch", str(tiny), "--json", "--trials", "1")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["event"] == "study"
    assert {event["event"] for event in events} >= {"trial_started", "point", "trial_ended", "leaderboard"}
    assert events[-1]["trials"][0]["test_rank"] == 1
    assert done.stderr == ""


def test_quiet_says_nothing_but_the_leaderboard(tiny: Path, hpsearch: Run) -> None:
    done = hpsearch("launch", str(tiny), "--quiet", "--trials", "1")
    assert done.stderr == ""
    assert done.stdout.startswith("rank")


def test_overrides_are_recorded_with_the_study(tiny: Path, hpsearch: Run) -> None:
    hpsearch("launch", str(tiny), "-q", "--trials", "1", "--set", "search.num_layers=2", "--name", "other")
    (row,) = json.loads(hpsearch("studies", "--json", "--store", f"sqlite:///{tiny.parent}/studies.db").stdout)[
        "studies"
    ]
    assert row["overrides"] == ["--set search.num_layers=2", "--name other", "--trials 1"]
    assert row["spec"]["search"]["num_layers"] == 2


@pytest.mark.parametrize(
    ("backend", "number", "code"),
    [
        ("inline", signal.SIGINT, 130),
        ("inline", signal.SIGTERM, 143),
        ("ray", signal.SIGTERM, 143),
        pytest.param("ray", signal.SIGINT, 130, marks=pytest.mark.nightly),
    ],
)
def test_a_signal_ends_cleanly_and_tells_how_to_go_on(
    tiny: Path, backend: str, number: signal.Signals, code: int
) -> None:
    command = [
        sys.executable,
        "-m",
        "hpsearch",
        "launch",
        str(tiny),
        "--backend",
        backend,
        "--set",
        "search.num_epochs=400",
        "--trials",
        "2",
    ]
    process = subprocess.Popen(command, cwd=tiny.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if " epoch 2/" in line:
            process.send_signal(number)
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, "".join(said) + err
    assert f"stopped by {number.name}. To resume:" in err
    assert f"hpsearch launch {tiny} --backend {backend}" in err
    with sqlite3.connect(tiny.parent / "studies.db") as plain:
        states = {row[0] for row in plain.execute("SELECT state FROM hpsearch_trials")}
        assert states == {"interrupted"}
        assert {row[0] for row in plain.execute("SELECT state FROM trials")} == {"WAITING"}
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(["launch", "gone.yaml"], 2, "Error: gone.yaml: no such study file", id="no file"),
        pytest.param(["launch", "bad.yaml"], 2, "bad.yaml:3:1: trails: unknown key 'trails'; did you mean 'budget.trials'?", id="unknown key"),
        pytest.param(["check", "{tiny}", "--set", "search.num_epochs={min: 3, max: 2}"], 2, "min (3) must be below max (2)", id="low over high"),
        pytest.param(["launch", "{tiny}", "--store", "sqlite:////nowhere/x.db"], 69, "there is no folder /nowhere", id="no place for a store"),
        pytest.param(["launch", "{tiny}", "--store", "postgresql://u@127.0.0.1:9/d"], 69, "u@127.0.0.1", id="no server"),
        pytest.param(["launch", "{tiny}", "--set", "folder=/proc/nowhere"], 74, "cannot write the tokenized data", id="no place for files"),
        pytest.param(["launch", "{tiny}", "--set", "model.architecture=gtp2"], 2, "knows no architecture 'gtp2'", id="architecture"),
        pytest.param(["launch", "{tiny}", "--backend", "ray", "--set", "resources.cpus_per_trial=999"], 75, "cpus_per_trial is 999", id="no such machine"),
        pytest.param(["launch", "{tiny}", "--backend", "slurm"], 2, "'slurm' is not one of 'ray', 'inline'", id="backend"),
        pytest.param(["launch", "{tiny}", "--trials", "0"], 2, "0 is not in the range", id="no trials"),
        pytest.param(["rank", "tiny"], 69, "there is no store at sqlite:///hpsearch.db", id="no store"),
        pytest.param(["launch", "{tiny}", "--set", "search.config.n_head=[5, 7]"], 2, "model: a gpt2 of these sizes cannot be built", id="model that cannot be"),
    ],
)  # fmt: skip
def test_what_is_wrong_gets_one_message_a_code_and_no_trace(
    tiny: Path, hpsearch: Run, arguments: list[str], code: int, message: str
) -> None:
    (tiny.parent / "bad.yaml").write_text("name: a\ntask: causal_lm\ntrails: 3\ndata: {corpus: python_docs}\n")
    done = hpsearch(*(argument.format(tiny=tiny) if argument == "{tiny}" else argument for argument in arguments))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tiny.parent.glob("*.db")), "nothing was changed"


def test_a_study_in_which_all_fails_says_so(tiny: Path, hpsearch: Run) -> None:
    done = hpsearch(
        "launch",
        str(tiny),
        "--trials",
        "2",
        "--set",
        "search.learning_rate={min: 1e29, max: 1e30, scale: log}",
        "--set",
        "training.gradient_clip=0",
    )
    assert done.returncode == 3
    assert "none can be ranked" in done.stderr
    assert "2 pruned (2 diverged)" in done.stdout


def test_logs_of_a_trial_say_what_its_worker_said(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = launched
    said = read(folder, "logs", "tiny", "1").stdout.splitlines()
    assert said[0].endswith("  1  attempt 1 begins")
    assert "evaluation 1 at epoch 1: train " in said[1]
    assert "ends as completed: ran its" in said[-1]
    lines = [json.loads(line) for line in read(folder, "logs", "tiny", "1", "--json", "--follow").stdout.splitlines()]
    assert [line["message"] for line in lines] == [line.split("  ", 2)[2] for line in said]
    assert set(lines[0]["facts"]) == {"host", "pid", "params"}
    assert lines[1]["facts"]["valid_loss"] > 0
    assert "it has trials 0 to 3" in read(folder, "logs", "tiny", "9").stderr


def test_tables_hold_what_the_study_holds(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = launched
    opened = package.open_study("tiny", store=f"sqlite:///{folder}/hpsearch.db")
    frames = {}
    for kind, load in (("csv", pd.read_csv), ("parquet", pd.read_parquet), ("json", pd.read_json)):
        done = read(folder, "export-data", "tiny", "--format", kind, "-o", f"data-{kind}")
        assert done.returncode == 0, done.stderr
        assert f"wrote data-{kind}/trials.{kind}" in done.stderr
        frames[kind] = {
            name: load(folder / f"data-{kind}" / f"{name}.{kind}") for name in ("trials", "curves", "scores")
        }
    for tables in frames.values():
        trials = opened.trials()
        assert tables["trials"]["trial"].tolist() == [trial.number for trial in trials]
        assert tables["trials"]["param_learning_rate"].tolist() == pytest.approx(
            [trial.params["learning_rate"] for trial in trials]
        )
        points = [point for trial in trials for point in opened.trial(trial.number).points]
        assert tables["curves"]["valid_loss"].tolist() == pytest.approx([point.valid_loss for point in points])
        best = opened.best
        assert best is not None
        scores = tables["scores"].query("metric == 'perplexity'").set_index("trial")["value"]
        assert scores[best.trial] == pytest.approx(best.score)
    assert read(folder, "export-data", "tiny", "-o", "tiny.yaml").returncode == 2


def test_watching_tells_how_each_trial_ended(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = launched
    done = read(folder, "watch", "tiny")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for trial in package.open_study("tiny", store=f"sqlite:///{folder}/hpsearch.db").trials():
        assert any(line.startswith(f"trial {trial.number} {trial.state}") for line in lines)
    assert lines[-1] == "driver  none: it is finished"
    assert read(folder, "watch", "nope").returncode == 2


def test_status_says_how_far_a_study_is(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = launched
    said = read(folder, "status", "tiny").stdout
    assert "4 of 4 have ended" in said
    assert "driver  none: it is finished" in said
    found = json.loads(read(folder, "status", "tiny", "--json").stdout)
    assert (found["budget"], found["states"], found["is_finished"]) == (4, {"completed": 4}, True)


def test_names_that_are_not_there_are_named(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = launched
    assert "studies in this store: tiny" in read(folder, "rank", "tinny").stderr
    assert "it has trials 0 to 3" in read(folder, "show", "tiny", "9").stderr
    assert read(folder, "show", "tiny", "9").returncode == 2


def test_debug_shows_where(hpsearch: Run) -> None:
    assert "Traceback" in hpsearch("--debug", "check", "gone.yaml").stderr


def test_every_command_has_help_and_the_exit_codes_are_documented(hpsearch: Run) -> None:
    whole = hpsearch("--help").stdout
    for command in ("launch", "check", "schema", "studies", "rank", "show", "best", "completion"):
        assert command in whole
        assert hpsearch(command, "--help").returncode == 0
    for code in ("0 ", "2 ", "3 ", "4 ", "69", "70", "74", "75", "129, 130, 143"):
        assert f"\n    {code}" in whole
    assert json.loads(hpsearch("schema").stdout)["title"] == "StudySpec"
    assert "_HPSEARCH_COMPLETE" in hpsearch("completion", "bash").stdout


def test_restart_puts_the_old_study_aside(tiny: Path, hpsearch: Run) -> None:
    assert hpsearch("launch", "tiny.yaml", "--trials", "1", "-q").returncode == 0
    changed = ["launch", "tiny.yaml", "--trials", "2", "--set", "seed=7"]
    refused = hpsearch(*changed)
    assert refused.returncode == 2
    assert "seed: 0 -> 7" in refused.stderr
    assert "--restart" in refused.stderr
    unasked = hpsearch(*changed, "--restart")
    assert unasked.returncode == 2
    assert "give --yes where nobody can answer" in unasked.stderr
    done = hpsearch(*changed, "--restart", "--yes")
    assert done.returncode == 0, done.stderr
    assert "the old study is kept as 'tiny.20" in done.stderr
    listed = json.loads(hpsearch("studies", "--json", "--store", f"sqlite:///{tiny.parent}/studies.db").stdout)
    names = [study["name"] for study in listed["studies"]]
    assert sorted(names)[0] == "tiny"
    assert len(names) == 2
    old = next(name for name in names if name != "tiny")
    board = hpsearch("rank", old, "--json", "--store", f"sqlite:///{tiny.parent}/studies.db")
    checkpoint = json.loads(board.stdout)["trials"][0]["checkpoint"]
    assert (Path(checkpoint) / "model.safetensors").is_file()
    assert hpsearch("doctor", "--store", f"sqlite:///{tiny.parent}/studies.db").stdout == "nothing is wrong\n"


def test_gc_and_doctor_say_what_they_would_do(tiny: Path, tmp_path: Path, hpsearch: Run) -> None:
    store = ("--store", f"sqlite:///{tmp_path}/studies.db")
    assert hpsearch("launch", "tiny.yaml", "--trials", "3", "-q").returncode == 0
    dry = hpsearch("gc", "tiny", "--keep", "1", "--dry-run", *store)
    assert "is not among the best 1" in dry.stdout
    assert dry.stdout.splitlines()[-1].endswith("MB would be removed")
    removed = json.loads(hpsearch("gc", "tiny", "--keep", "1", "--json", *store).stdout)["removed"]
    assert len(removed) == 2
    assert not any(Path(piece["folder"]).exists() for piece in removed)
    with sqlite3.connect(tmp_path / "studies.db") as plain:
        plain.execute("UPDATE hpsearch_leases SET beat = 3")
    sick = hpsearch("doctor", "tiny", *store)
    assert sick.returncode == 1
    assert "its lease is held by" in sick.stdout
    assert "1 of 1 can be repaired with --repair" in sick.stdout
    assert hpsearch("doctor", "--repair", *store).returncode == 0
    assert hpsearch("doctor", *store).stdout == "nothing is wrong\n"
