"""The doctor finds what is wrong with a machine, says what to do, and is not ended by a check that is."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blocklora_kernels.ops import LoraLinear
from packaging.specifiers import SpecifierSet
from sglang_blocklora.doctor import __main__ as command
from sglang_blocklora.doctor import child, devices, free_memory, kernels, model, ranks, streams, versions
from sglang_blocklora.doctor.finding import Asked, Finding
from sglang_blocklora.settings import Settings

GIB = 2**30
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}


def told(findings: Iterable[Finding]) -> dict[str, Finding]:
    """Findings by what they are about; of the fault alone is told what to do."""
    by_what = {finding.what: finding for finding in findings}
    assert all((finding.result == "fault") == bool(finding.advice) for finding in by_what.values())
    return by_what


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """``module(name, code)``: one that children can import; ``code`` is the body of its ``check``."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    head = "from sglang_blocklora.doctor.finding import fault, ok, skipped\ndef check(asked):\n"

    def write(name: str, code: str) -> str:
        (tmp_path / f"{name}.py").write_text(head + textwrap.indent(textwrap.dedent(code), "    "))
        return name

    return write


# A check's code -> what is told of it, beside what it had found before.
BROKEN = {
    "import os; os.abort()": "ended with SIGABRT: noise",
    "raise RuntimeError('no such device')": "ended with exit status 1: RuntimeError: no such device",
    "import sys; sys.exit(3)": "ended with exit status 3: noise",
    "import time; time.sleep(600)": "did not end within 2 s",
    "import subprocess; subprocess.run(['sleep', '600'])": "did not end within 2 s",
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_check_that_crashes_or_hangs_is_a_line_of_the_table(module: Callable[[str, str], str], code: str) -> None:
    name = module("broken", f"print('noise', flush=True)\nyield ok('before', 'it was found')\n{code}")
    found = told(child.run(name, Asked(), 2))
    assert [*found] == ["before", "broken"]
    assert found["broken"].result == "fault"
    assert found["broken"].found == BROKEN[code]
    again = shlex.split(found["broken"].advice.partition(": ")[2])
    assert again[1:4] == ["-m", "sglang_blocklora.doctor.child", "broken"]


def test_what_is_asked_reaches_a_check(module: Callable[[str, str], str]) -> None:
    asked = Asked(model="/m", tp=2, rank=3, nblocks=4, flags=("--dtype", "float32"))
    (found,) = child.run(module("asking", "yield ok('asked', repr(asked))"), asked, 30)
    assert found.found == repr(asked)
    assert asked.launch_flags == ["--model-path", "/m", "--tp-size", "2", "--dtype", "float32"]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("faulty", [False, True])
def test_the_exit_status_and_both_forms(
    module: Callable[[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    faulty: bool,
    as_json: bool,
) -> None:
    second = "yield fault('b', 'torn', 'mend it')" if faulty else "yield skipped('b', 'none here')"
    checks = {module("first", "yield ok('a', 'whole')"): 30, module("second", second): 30}
    monkeypatch.setattr(command, "CHECKS", checks)
    assert command.main(["--json"] if as_json else []) == faulty
    printed = capsys.readouterr().out
    if not as_json:
        first, *rest = printed.splitlines()
        assert first.split() == ["a", "ok", "whole"]
        assert [line.split() for line in rest] == (
            [["b", "fault", "torn"], ["->", "mend", "it"], [], ["1", "fault"]]
            if faulty
            else [["b", "skipped", "none", "here"], [], ["no", "faults"]]
        )
        return
    answer = json.loads(printed)
    assert answer.keys() == {"faults", "findings"}
    assert answer["faults"] == faulty
    assert [finding.keys() for finding in answer["findings"]] == [{"what", "result", "found", "advice"}] * 2
    assert [finding["result"] for finding in answer["findings"]] == ["ok", "fault" if faulty else "skipped"]
    assert [finding["advice"] for finding in answer["findings"]] == [None, "mend it" if faulty else None]


def test_the_command_line() -> None:
    argv = ["--model", "m", "--tp", "2", "--nblocks", "2", "--", "--adapter-memory", "static", "--pp-size", "2"]
    asked, as_json = command.parse(argv)
    assert asked == Asked(model="m", tp=2, nblocks=2, flags=("--adapter-memory", "static", "--pp-size", "2"))
    assert not as_json
    for wrong in (["--tp", "0"], ["--adapter-memory", "static"], ["--rank", "x"]):
        with pytest.raises(SystemExit) as end:
            command.parse(wrong)
        assert end.value.code == 2


def test_every_check_is_there_and_torch_is_not_needed_to_begin() -> None:
    code = "import sys; sys.modules['torch'] = None; import sglang_blocklora.doctor.__main__ as m; print(*m.CHECKS)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    files = {path.stem for path in Path(command.__file__).parent.glob("*.py") if "def check(" in path.read_text()}
    assert set(result.stdout.split()) == {f"sglang_blocklora.doctor.{name}" for name in files}


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


# Kernels


def added(factor: float, spill: float = 0.0) -> Callable[..., None]:
    """Stands in for the kernels: adds ``factor`` times the right delta, and ``spill`` to every token."""

    def add_delta_(self: LoraLinear, out: torch.Tensor, x: torch.Tensor, batch: Any) -> None:
        problem = batch.problem
        for index, scaling in enumerate(problem._scalings):
            tokens = torch.from_numpy(batch.wanted == index)
            deltas = [scaling * x[tokens].double() @ a.T @ b.T for a, b in problem._adapters[index].dense]
            out[tokens] += (factor * torch.cat(deltas, dim=1)).to(out.dtype)
        out += spill

    return add_delta_


@pytest.mark.parametrize(
    ("factor", "spill", "result"),
    [(1.0, 0.0, "ok"), (1.001, 0.0, "fault"), (float("nan"), 0.0, "fault"), (1.0, 1e-3, "fault")],
)
def test_kernels_that_compute_wrong_are_found(
    monkeypatch: pytest.MonkeyPatch, factor: float, spill: float, result: str
) -> None:
    make = kernels.make

    def made(*arguments: Any) -> Any:
        problem = make(*arguments)
        problem.batch.problem = problem
        return problem

    monkeypatch.setattr(kernels, "make", made)
    monkeypatch.setattr(LoraLinear, "add_delta_", added(factor, spill))
    from sglang_blocklora.doctor.problem import Problem

    monkeypatch.setattr(Problem, "describe", lambda self, wanted: setattr(self.batch, "wanted", wanted))
    found = told(kernels.numbers("cpu", torch.float32, [kernels.DECODE]))
    assert [finding.result for finding in found.values()] == [result] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the device there")
def test_the_real_kernels_in_the_interpreter(module: Callable[[str, str], str]) -> None:
    """As they are, and with one adapter's scaling wrong in the table that they read."""
    code = """
        import torch
        from sglang_blocklora.doctor import kernels
        yield from kernels.check(asked)
        make = kernels.make
        def made(*arguments):
            problem = make(*arguments)
            problem.linear.scalings[2] *= 1.01
            return problem
        kernels.make = made
        yield from kernels.numbers("cpu", torch.float32, [kernels.DECODE])
    """
    found = list(child.run(module("planted", code), Asked(), 300))
    assert [finding.result for finding in found] == ["ok", "ok", "skipped", "fault", "fault"], found


def test_a_graph_is_judged_by_the_same_numbers() -> None:
    assert kernels.judge("CUDA graph", 2.0**-7, torch.bfloat16, "").result == "ok"
    assert kernels.judge("CUDA graph", 2.0**-5, torch.bfloat16, "").result == "fault"
    assert kernels.judge("CUDA graph", float("nan"), torch.bfloat16, "").result == "fault"


# Streams


def test_rows_that_change_too_early_or_too_late_are_faults() -> None:
    old = torch.full((4, streams.SLOTS, 8), streams.OLD)
    new = old.clone()
    new[:, : streams.COPIED] = streams.NEW
    assert streams.judge(old, new, True).result == "ok"
    for before, after, went_on, text in (
        (new, new, True, "under a running"),
        (old, old, True, "did not see"),
        (old, new, False, "the host waited"),
    ):
        assert streams.judge(before, after, went_on).result == "fault"
        assert text in streams.judge(before, after, went_on).found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_streams_are_skipped_without_a_gpu() -> None:
    assert [finding.result for finding in streams.check(Asked())] == ["skipped"]


# Ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="nccl is used there")
def test_two_ranks_reach_each_other() -> None:
    found = told(child.run("sglang_blocklora.doctor.ranks", Asked(), 120))
    assert {what: finding.result for what, finding in found.items()} == {
        "TP group, gloo": "ok",
        "TP group, store": "ok",
    }


def test_what_ranks_did_not_receive_is_a_fault() -> None:
    good = [(1, [3.0], None), (0, [3.0], [0, 1])]
    assert [finding.result for finding in ranks.judge("group", good)] == ["ok", "ok"]
    assert [finding.result for finding in ranks.judge("group", [(1, [1.0, 3.0], None), good[1]])] == ["fault", "ok"]
    assert [finding.result for finding in ranks.judge("group", [good[0], (0, [3.0], [1, 0])])] == ["ok", "fault"]
    assert [finding.result for finding in ranks.judge("group", [good[0], (0, [3.0], None)])] == ["ok", "fault"]


def test_a_group_that_does_not_form_is_a_fault() -> None:
    (found,) = ranks.exchanged("no such backend", 1)
    assert found.result == "fault"
    assert "no such backend" in found.found


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


# The model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return tmp_path


def test_what_an_adapter_costs(folder: Path) -> None:
    """Llama-3.1-8B, plain, rank 16: 40 M parameters (docs/kernels.md), A of column layers whole on each rank."""
    found = told(model.check(Asked(model=str(folder), tp=1)))
    assert found["adapted linears"].found == "qkv_proj, o_proj, gate_up_proj, down_proj of 32 layers"
    parameters = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)) * 32
    slots = found["an adapter of rank 16"].found.split()[0]
    per_slot = 2 * 1024 * 32
    assert parameters <= int(slots) * per_slot <= parameters * 1.03
    assert f"{int(slots) * per_slot * 2 / 2**20:.1f} MiB on each of 1 TP ranks (plain LoRA, bfloat16)" in (
        found["an adapter of rank 16"].found
    )


def test_blocks_and_data_type_count(folder: Path) -> None:
    def mebibytes(**options: Any) -> float:
        found = told(model.check(Asked(model=str(folder), tp=8, rank=16, **options)))["an adapter of rank 16"]
        return float(found.found.split(" slots, ")[1].split()[0])

    assert mebibytes(nblocks=8) < mebibytes() / 4
    assert mebibytes(flags=("--dtype", "float32")) == pytest.approx(2 * mebibytes(), abs=0.2)


@pytest.mark.parametrize(
    ("asked", "what", "part"),
    [
        ({"nblocks": 3}, "an adapter of rank 16", "rank 16 is no multiple of nblocks 3"),
        ({"rank": 48, "nblocks": 3}, "an adapter of rank 48", "is no multiple of nblocks 3"),
        (
            {"flags": ("--adapter-memory", "static", "--adapter-memory-mb", "50")},
            "an adapter of rank 16",
            "the arena has 50 MiB",
        ),
    ],
)
def test_an_adapter_that_cannot_be_served(folder: Path, asked: dict[str, Any], what: str, part: str) -> None:
    found = told(model.check(Asked(model=str(folder), **asked)))[what]
    assert found.result == "fault"
    assert part in found.found


def test_a_tp_size_that_divides_nothing_is_a_fault_on_a_gpu(folder: Path) -> None:
    base = model.BaseSizes.read(folder)
    assert [finding.result for finding in model.cost(base, Asked(tp=3), on_gpu=True)] == ["fault"]
    assert [finding.result for finding in model.cost(base, Asked(tp=3), on_gpu=False)] == ["ok"]
    assert [finding.result for finding in model.cost(base, Asked(tp=4), on_gpu=True)] == ["ok"]


def test_models_that_are_not_served(folder: Path) -> None:
    assert told(model.check(Asked()))["base model"].result == "skipped"
    assert told(model.check(Asked(model=str(folder / "none"))))["base model"].result == "fault"
    (folder / "config.json").write_text(json.dumps(MODEL | {"architectures": ["DeepseekV3ForCausalLM"]}))
    found = told(model.check(Asked(model=str(folder))))["base model"]
    assert found.result == "fault"
    assert "DeepseekV3ForCausalLM is not served" in found.found
