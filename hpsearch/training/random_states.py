"""The random states of a process: seeded, written into a checkpoint, and read from it again."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def torch_states(device: torch.device, gather: Callable[[bytes], list[bytes]]) -> dict[str, Tensor]:
    """The random states of torch in all processes of a run, which `gather` brings together."""
    kinds = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        kinds["cuda"] = torch.cuda.get_rng_state(device)
    return {
        _name(kind, rank): torch.frombuffer(bytearray(content), dtype=torch.uint8)
        for kind, state in kinds.items()
        for rank, content in enumerate(gather(state.numpy().tobytes()))
    }


def python_states() -> dict[str, Any]:
    """The random states of Python and NumPy in this process, as JSON."""
    numpy_state = np.random.get_state(legacy=False)
    words = numpy_state["state"]
    return {
        "random_python": random.getstate(),
        "random_numpy": {**numpy_state, "state": {**words, "key": words["key"].tolist()}},
    }


def restore(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, rank: int, device: torch.device) -> None:
    """Go back to the states of a checkpoint. One that had fewer processes has none of torch for the others."""
    if (name := _name("torch", rank)) in tensors:
        torch.set_rng_state(tensors[name])
    if (name := _name("cuda", rank)) in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors[name], device)
    version, internal, gauss = facts["random_python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = facts["random_numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})


def _name(kind: str, rank: int) -> str:
    return f"random.{kind}.{rank}" if rank else f"random.{kind}"
