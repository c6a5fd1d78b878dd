"""What a device computes fast in is told by what it can do."""

from __future__ import annotations

import pytest
import torch

from hpsearch.spec.settings import RunSettings
from hpsearch.training import devices
from hpsearch.training.steps import precision

CPU = torch.device("cpu")


@pytest.fixture
def cpu_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has bfloat16 instructions, whatever this machine's has."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": True, "avx512_bf16": True})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    devices.cpu_flags.cache_clear()
    yield
    devices.cpu_flags.cache_clear()


@pytest.mark.usefixtures("cpu_with")
@pytest.mark.parametrize(
    ("limit", "expected"),
    [("", True), ("DEFAULT", True), ("AVX512_CORE_BF16", True), ("AVX512_CORE_AMX_FP16", True), ("AVX2", False),
     ("AVX512_CORE_VNNI", False), ("AVX512_CORE", False), ("AVX2_VNNI_2", False)],
)  # fmt: skip
def test_bfloat16_is_native_only_where_its_instructions_may_be_used(
    monkeypatch: pytest.MonkeyPatch, limit: str, expected: bool
) -> None:
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert devices.has_bfloat16(CPU) is expected
    assert precision(RunSettings(), CPU) == {"model": "float32", "muon": "float32"}  # the same on every machine


def test_a_cpu_without_the_instructions_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    devices.cpu_flags.cache_clear()
    assert precision(RunSettings(), CPU) == {"model": "float32", "muon": "float32"}
    assert precision(RunSettings(precision="bfloat16"), CPU)["model"] == "bfloat16"
    assert devices.describe_cpu()["instructions"] == ["avx2"]
    devices.cpu_flags.cache_clear()


@pytest.mark.parametrize(("capability", "expected"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_that_emulates_bfloat16_trains_in_float32(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    formats = precision(RunSettings(), torch.device("cuda", 0))
    assert formats == dict.fromkeys(("model", "muon"), "bfloat16" if expected else "float32")
