"""What a trial takes of the nodes of a Ray cluster, and how many fit on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from hpsearch.backends import Placement
from hpsearch.errors import ClusterError
from hpsearch.spec.study import StudySpec
from hpsearch.training.memory import SMALLEST_SHARE


def place_on(spec: StudySpec, nodes: Sequence[Mapping[str, float]]) -> Placement:
    """What a trial takes and how many fit on nodes with these resources. Raises ClusterError when none does."""
    wanted = spec.resources
    gpus = sum(node.get("GPU", 0) for node in nodes)
    is_given = not isinstance(wanted.gpus_per_trial, str)
    gpus_per_trial = float(wanted.gpus_per_trial) if is_given else (1.0 if gpus else 0.0)
    processes = wanted.processes
    cpus = max(1, wanted.cpus_per_trial // processes)
    needs = {"gpus_per_trial": ("GPU", gpus_per_trial), "cpus_per_trial": ("CPU", float(processes * cpus))}
    if wanted.memory_gb_per_trial:
        needs["memory_gb_per_trial"] = ("memory", 1e9 * wanted.memory_gb_per_trial)
    each = {name: amount / processes for name, amount in needs.values() if amount}
    if wanted.accelerator_type:
        # Ray gives a node one of it, and asks for a crumb: what counts is that it is there.
        needs["accelerator_type"] = (f"accelerator_type:{wanted.accelerator_type}", 0.001)
        each[f"accelerator_type:{wanted.accelerator_type}"] = 0.001
    needs |= {f"custom_per_trial.{name}": (name, amount) for name, amount in wanted.custom_per_trial.items()}
    is_spread = wanted.across_nodes and processes > 1
    for setting, (name, amount) in needs.items():
        there = [node.get(name, 0.0) for node in nodes]
        most = sum(there) if is_spread else max(there, default=0.0)
        if amount > most:
            given = wanted.accelerator_type if setting == "accelerator_type" else f"{amount:g}"
            has = "all nodes of Ray have no more than" if is_spread else "no node of Ray has more than"
            raise ClusterError(
                f"resources.{setting} is {given}, but {has} {most:g} {name}" + _advice(setting, spec, gpus)
            )
    bundles = [{**each, **wanted.custom_per_trial}, *[each] * (processes - 1)]
    fit = _fit(bundles, nodes, across_nodes=is_spread)
    if not fit:
        raise ClusterError(f"no node of Ray has all at once that a trial asks for: {_total(bundles)}")
    parallel = fit if wanted.parallel == "auto" else min(wanted.parallel, fit)
    is_packed = wanted.gpus_per_trial == "packed" and gpus > 0
    share = f"{processes * cpus} CPU" + (f" and {gpus_per_trial:g} GPU" if gpus_per_trial else "")
    where = "on this machine" if len(nodes) == 1 else f"on {len(nodes)} nodes"
    total = sum(node.get("CPU", 0) for node in nodes)
    return Placement(
        parallel=parallel,
        cpus_per_process=cpus,
        gpus_per_trial=gpus_per_trial,
        bundles=bundles,
        across_nodes=is_spread,
        is_packed=is_packed,
        where=f"Ray {where} ({total:g} CPUs, {gpus:g} GPUs), {parallel} at a time, {share} each"
        + (f" in {processes} processes" if processes > 1 else "")
        + (", and more once their memory is known" if is_packed else ""),
    )


def capacity(place: Placement, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials could run at once; of those that are packed, if none took more than a crumb of a GPU."""
    bundles = [{**place.bundles[0], "GPU": SMALLEST_SHARE}] if place.is_packed else place.bundles
    return _fit(bundles, nodes, across_nodes=place.across_nodes)


def _advice(setting: str, spec: StudySpec, gpus: float) -> str:
    if setting == "gpus_per_trial" and 1 < spec.resources.processes <= gpus:
        return "; resources.across_nodes: true lets a trial use those of several"
    return ""


def _total(bundles: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _fit(bundles: Sequence[Mapping[str, float]], nodes: Iterable[Mapping[str, float]], *, across_nodes: bool) -> int:
    """How many trials with these bundles fit on the nodes, none of them on two unless they may."""

    def count(resources: Mapping[str, float], node: Mapping[str, float]) -> int:
        return min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in resources.items())

    if across_nodes:
        # What only the first process takes is left to Ray to place.
        return sum(count(bundles[-1], node) for node in nodes) // len(bundles)
    return sum(count(_total(bundles), node) for node in nodes)
