"""What the doctor finds of packages, devices and memory."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from blocklora_testing.findings import told
from packaging.specifiers import SpecifierSet
from sglang_blocklora.doctor import devices, free_memory, versions
from sglang_blocklora.doctor.finding import Asked
from sglang_blocklora.settings import Settings

GIB = 2**30


# Versions


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Packages that are installed, to be changed."""
    there = {"sglang-blocklora": "0.1", "sglang": "0.5.21", "torch": "2.13.0+cpu", "triton": "3.9.0"}
    needs = {
        "sglang": ["torch==2.13.0", "flashinfer_python[cu13]==0.6.18", "torch==1.0; extra == 'old'"],
        "torch": ["triton>=3.8"],
    }

    def find(name: str) -> str:
        if name not in there:
            raise PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(versions, "version", find)
    monkeypatch.setattr(versions, "requires", lambda name: find(name) and needs[name])
    monkeypatch.setattr(versions, "metadata", lambda name: find(name) and {"Requires-Python": ">=3.11"})
    return there


def test_versions_that_fit(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(versions.check(Asked()))
    assert {finding.result for finding in found.values()} == {"ok", "skipped"}
    assert found["flashinfer-python"].found == found["sglang-kernel"].found == "only a GPU uses it"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    installed["sglang-kernel"] = "0.4.7"
    found = told(versions.check(Asked()))
    assert found["sglang-kernel"].result == "ok"
    assert found["flashinfer-python"].found == "not installed"
    assert found["flashinfer-python"].advice == "pip install 'flashinfer-python==0.6.18'"


@pytest.mark.parametrize(
    ("name", "version", "advice"),
    [
        ("torch", "2.11.0", "pip install 'torch==2.13.0'"),
        ("torch", None, "pip install 'torch==2.13.0'"),
        ("triton", "3.7.1", "pip install 'triton>=3.8'"),
        ("sglang-blocklora", None, "Install it into this Python"),
    ],
)
def test_a_version_that_does_not_fit(installed: dict[str, str], name: str, version: str | None, advice: str) -> None:
    if version is None:
        del installed[name]
    else:
        installed[name] = version
    found = told(versions.check(Asked()))[name]
    assert found.result == "fault"
    assert found.advice.startswith(advice)
    assert (version or "not installed") in found.found


def test_another_python_is_a_fault() -> None:
    assert versions.python(SpecifierSet(">=3.11")).result == "ok"
    assert versions.python(SpecifierSet(">=4")).result == "fault"


# Devices


def test_without_driver_and_device_cuda_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "none")
    assert told(devices.check(Asked()))["CUDA"].result == ("skipped" if not torch.cuda.is_available() else "ok")


@pytest.mark.parametrize(
    ("cuda", "advice"), [(None, "Install torch's build for CUDA"), ("13.0", "driver for CUDA 13.0")]
)
def test_a_driver_without_a_device_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str | None, advice: str
) -> None:
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@x)  Fri\nGCC 12\n"
    )
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    found = told(devices.check(Asked()))["CUDA"]
    assert found.result == "fault"
    assert "driver 580.65.06" in found.found
    assert advice in found.advice
    assert ("CUDA_VISIBLE_DEVICES='7'" in found.found) == (cuda is not None)


def test_another_kind_of_device_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    assert devices.without_cuda(None).result == "fault"
    assert "xpu" in devices.without_cuda(None).found


def test_an_old_device_and_too_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    seen = SimpleNamespace(name="T4", major=7, minor=5, total_memory=16 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: seen)
    found = told(devices.check(Asked(tp=2)))
    assert found["devices"].result == found["device 0"].result == "fault"
    assert "T4, compute capability 7.5, 16.0 GiB" in found["device 0"].found
    assert "devices" not in told(devices.check(Asked(tp=1)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_torch_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here torch cannot make a tensor there, as it could not run a kernel."""
    seen = SimpleNamespace(name="B", major=12, minor=0, total_memory=GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: seen)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel image\nmore")))
    assert devices.device(0).result == "fault"
    assert devices.device(0).found.endswith(": no kernel image")


# Memory


def test_host_memory_is_that_of_the_container(tmp_path: Path) -> None:
    machine = free_memory.available(tmp_path)
    assert machine > 0
    (tmp_path / "memory.max").write_text("max\n")
    assert abs(free_memory.available(tmp_path) - machine) < 4 * GIB
    (tmp_path / "memory.max").write_text("100000000\n")
    (tmp_path / "memory.current").write_text("70000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 20000000\n")
    assert free_memory.available(tmp_path) == 50_000_000


def test_too_little_memory_is_a_fault(tmp_path: Path) -> None:
    settings = Settings(adapter_host_memory_gb=8)
    assert free_memory.host(settings, 2, 16 * GIB).result == "ok"
    short = free_memory.host(settings, 2, 15 * GIB)
    assert short.result == "fault"
    assert "--adapter-host-memory-gb 3.8" in short.advice
    assert free_memory.device(1, 60 * GIB, 80 * GIB).result == "ok"
    assert free_memory.device(1, 30 * GIB, 80 * GIB).result == "fault"
    assert free_memory.weights(tmp_path, 2, GIB).result == "skipped"
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(3 * GIB)  # a hole
    assert free_memory.weights(tmp_path, 2, 2 * GIB).result == "ok"
    assert free_memory.weights(tmp_path, 2, GIB).result == "fault"


def test_memory_is_that_of_the_flags_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "available", lambda: 10 * GIB)
    flags = ("--adapter-host-memory-gb", "6", "--dp-size", "2")
    assert told(free_memory.check(Asked(flags=flags)))["host memory"].result == "fault"
    assert told(free_memory.check(Asked(flags=flags[:2])))["host memory"].result == "ok"
    assert told(free_memory.check(Asked(flags=(*flags[:1], "much"))))["host memory"].result == "skipped"
