"""The device that a process trains on: which one it is, how much memory it has, and which number formats it is fast in.

What is fast is decided by what a device can do, never by its type: a CPU without bfloat16 instructions takes 10 to 30
times as long for a product in bfloat16 as for one in float32, and a GPU before compute capability 8.0 emulates it, too.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hpsearch.training.memory import CONTEXT_BYTES

_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
"""Of x86 CPUs, and of ARM's."""
_SHOWN_FLAGS = ("avx2", "avx512_f", *_BFLOAT16_FLAGS)
_ISA_WITH_BFLOAT16 = ("DEFAULT", "ALL", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10")
"""Values of ONEDNN_MAX_CPU_ISA that leave the matrix products their bfloat16 instructions, or begin such a value."""


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU that this process was given, if there is one."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    # By its number: some of torch.cuda takes no other name.
    return torch.device("cuda", torch.cuda.current_device())


def has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 run on instructions of their own, so that they are faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    return limit.upper().startswith(_ISA_WITH_BFLOAT16) and any(cpu_flags()[name] for name in _BFLOAT16_FLAGS)


def use_memory(device: torch.device, share: float | None) -> None:
    """Begin to measure the peak, and keep this process to its share of a device that it has not for itself."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        total = torch.cuda.get_device_properties(device).total_memory
        most = 1.0 if share is None or share >= 1 else max(0.0, share - CONTEXT_BYTES / total)
        torch.cuda.set_per_process_memory_fraction(most, device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes of tensors at the worst moment since `use_memory`, and bytes of the device; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory,
    }


def gpu_names() -> list[str]:
    """The GPUs that this process sees."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@cache
def cpu_flags() -> dict[str, bool]:
    """Which of the instructions that decide a trial's speed this machine's CPU has."""
    found = torch.cpu.get_capabilities()
    return {name: bool(found.get(name)) for name in _SHOWN_FLAGS}


@cache
def cpu_name() -> str:
    """The model of this machine's CPU, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def describe_cpu() -> dict[str, Any]:
    """The CPU's model and flags as JSON: what a speed on it depends on."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return {
        "cpu": cpu_name(),
        "instructions": [name for name, has in cpu_flags().items() if has],
        **({"ONEDNN_MAX_CPU_ISA": limit} if limit else {}),
    }
