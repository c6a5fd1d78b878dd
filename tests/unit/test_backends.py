"""Where trials go: how many fit, on what, and what is refused before anything starts."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpsearch.backends import Placement
from hpsearch.backends.ray import cluster as ray_cluster
from hpsearch.backends.ray.bridge import Bridge
from hpsearch.backends.ray.cluster import _in_this_folder
from hpsearch.backends.ray.placement import place_on
from hpsearch.errors import ClusterError, UsageError
from hpsearch.spec.load import load_study
from tests.examples import read_examples

STUDY = "name: s\ntask: causal_lm\ndata: {corpus: python_docs}\n"


def place(tmp_path: Path, resources: str, *nodes: dict[str, float], **node: float) -> Placement:
    file = tmp_path / "s.yaml"
    file.write_text(f"{STUDY}resources: {resources}\n")
    return place_on(load_study(file), nodes or [node])


@pytest.mark.parametrize(
    ("resources", "cluster", "parallel", "gpus"),
    [
        pytest.param("{}", {"CPU": 2}, 2, 0, id="one trial a CPU"),
        pytest.param("{cpus_per_trial: 3}", {"CPU": 8}, 2, 0, id="as many as fit"),
        pytest.param("{parallel: 1}", {"CPU": 8}, 1, 0, id="fewer on request"),
        pytest.param("{parallel: 99}", {"CPU": 8}, 8, 0, id="never more than fit"),
        pytest.param("{}", {"CPU": 16, "GPU": 4}, 4, 1, id="one trial a GPU"),
        pytest.param("{gpus_per_trial: 0.25}", {"CPU": 16, "GPU": 1}, 4, 0.25, id="four trials on a GPU"),
        pytest.param("{gpus_per_trial: 0}", {"CPU": 3, "GPU": 1}, 3, 0, id="GPUs left alone"),
    ],
)
def test_trials_are_placed(
    tmp_path: Path, resources: str, cluster: dict[str, float], parallel: int, gpus: float
) -> None:
    placement = place(tmp_path, resources, **cluster)
    assert (placement.parallel, placement.gpus_per_trial) == (parallel, gpus)
    assert f"{parallel} at a time" in placement.where


def test_what_the_machine_lacks_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="gpus_per_trial is 1, but no node of Ray has more than 0 GPU"):
        place(tmp_path, "{gpus_per_trial: 1}", CPU=2)
    with pytest.raises(ClusterError, match="cpus_per_trial is 9, but no node of Ray has more than 2 CPU"):
        place(tmp_path, "{cpus_per_trial: 9}", CPU=2)


def test_a_ray_that_does_not_come_up_leaves_nothing_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes: list[subprocess.Popen[bytes]] = []

    def init(**options: Any) -> None:
        nodes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", options["_temp_dir"]]))
        if len(nodes) == 1:
            raise RuntimeError("The current node timed out during startup.")

    # No Ray fails to start when it is asked to.
    monkeypatch.setattr(ray_cluster.ray, "init", init)
    monkeypatch.setattr(ray_cluster.ray, "shutdown", lambda: None)
    notes: list[str] = []
    ray_cluster._start(tmp_path, notes.append)
    first, second = nodes
    try:
        assert notes == ["Ray did not start (The current node timed out during startup.); trying again"]
        assert first.poll() is not None
        assert second.poll() is None
    finally:
        for node in nodes:
            node.kill()
            node.wait()


def test_no_trial_lies_on_two_nodes(tmp_path: Path) -> None:
    nodes = ({"CPU": 3, "memory": 20e9}, {"CPU": 3, "memory": 20e9}, {"CPU": 8, "memory": 9e9})
    assert place(tmp_path, "{cpus_per_trial: 2}", *nodes).parallel == 1 + 1 + 4
    assert place(tmp_path, "{memory_gb_per_trial: 10}", *nodes).parallel == 2 + 2 + 0
    with pytest.raises(ClusterError, match="no node of Ray has all at once"):
        place(tmp_path, "{cpus_per_trial: 6, memory_gb_per_trial: 10}", *nodes)


def test_a_trial_on_several_gpus_has_a_process_for_each(tmp_path: Path) -> None:
    nodes = ({"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 2}, {"CPU": 8})
    on_one = place(
        tmp_path, "{gpus_per_trial: 2, cpus_per_trial: 6, custom_per_trial: {}, memory_gb_per_trial: null}", *nodes
    )
    assert on_one.parallel == 1 + 1, "CPUs for one trial on each node"
    assert on_one.bundles == [{"CPU": 3, "GPU": 1}] * 2
    assert "6 CPU and 2 GPU each in 2 processes" in on_one.where
    assert place(tmp_path, "{gpus_per_trial: 2}", *nodes).parallel == 2 + 1
    assert place(tmp_path, "{gpus_per_trial: 4}", *nodes).parallel == 1
    assert place(tmp_path, "{gpus_per_trial: 3, across_nodes: true}", *nodes).parallel == 2
    for resources, message in (
        ("{gpus_per_trial: 6}", "is 6, but no node of Ray has more than 4 GPU; resources.across_nodes: true lets"),
        ("{gpus_per_trial: 7}", "is 7, but no node of Ray has more than 4 GPU$"),
        ("{gpus_per_trial: 7, across_nodes: true}", "is 7, but all nodes of Ray have no more than 6 GPU"),
    ):
        with pytest.raises(ClusterError, match=message):
            place(tmp_path, resources, *nodes)


def test_a_trial_goes_where_its_kind_of_gpu_is(tmp_path: Path) -> None:
    nodes = ({"CPU": 8, "GPU": 4, "accelerator_type:A100": 1}, {"CPU": 8, "GPU": 2, "accelerator_type:H100": 1})
    assert place(tmp_path, "{}", *nodes).parallel == 6
    assert place(tmp_path, "{accelerator_type: H100}", *nodes).parallel == 2
    assert place(tmp_path, "{accelerator_type: H100, gpus_per_trial: 0.5}", *nodes).parallel == 4


def test_a_job_is_told_what_lies_in_its_own_folder(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(STUDY)

    def told(store: str | None, folder: str | None) -> str:
        return _in_this_folder(load_study(file, store=store, folder=folder))

    assert told(None, None) == "the store (HPSEARCH_STORE) and the run folder (HPSEARCH_FOLDER) lie"
    assert told("postgresql://u@h/db", None) == "the run folder (HPSEARCH_FOLDER) lies"
    assert told("sqlite:////shared/s.db", "/shared/runs") == ""


def test_what_tune_pickles_holds_no_study(tmp_path: Path) -> None:
    class Secret:
        def __reduce__(self) -> str:
            raise AssertionError("the run was pickled")

    bridge = Bridge(Secret(), place(tmp_path, "{}", CPU=2))  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(bridge)).run is None


def test_a_folder_with_links_out_of_it_is_not_sent_away(tmp_path: Path) -> None:
    from hpsearch.backends.ray.jobs import _refuse_links

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "same.json").symlink_to(model / "config.json")
    _refuse_links(model, "model.pretrained")
    (tmp_path / "id_rsa").write_text("private")
    (model / "vocab.txt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UsageError, match=r"data\.files: .*vocab\.txt is a link to .*id_rsa, outside of"):
        _refuse_links(model, "data.files")


def test_files_that_are_sent_to_a_cluster_hold_the_same_text_there(tmp_path: Path) -> None:
    from hpsearch.backends.ray.jobs import _pack

    names = [f"{number:02}.txt" for number in range(30)]
    for name in names:
        (tmp_path / name).write_text("\n\n".join(f"file {name} paragraph {place}" for place in range(9)))
    (tmp_path / "s.yaml").write_text(f"name: s\ntask: causal_lm\ndata: {{files: {json.dumps(names)}}}\n")
    here = load_study(tmp_path / "s.yaml")
    package = tmp_path / "package"
    package.mkdir()
    overrides = _pack(here, package)
    assert sum(map(len, overrides)) < 200, "more names than fit into a command are sent as a pattern"
    (package / "s.yaml").write_bytes((tmp_path / "s.yaml").read_bytes())
    there = load_study(package / "s.yaml", overrides=[one.removeprefix("--set=") for one in overrides])
    assert read_examples(there) == read_examples(here)
