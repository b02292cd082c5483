"""The doctor finds what is wrong with a machine, says what to do, and is not ended by a check that is."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blocklora_kernels.ops import LoraLinear
from blocklora_testing.findings import told
from sglang_blocklora.doctor import __main__ as command
from sglang_blocklora.doctor import child, kernels, ranks, streams
from sglang_blocklora.doctor.finding import Asked


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
