"""Every tile of the table compiles for GPUs that need not be present: no spills, shared memory within limits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmark" / "kernels" / "registers.py"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_spills(arch):
    # A process of its own: a process that imported triton under TRITON_INTERPRET could not compile.
    command = [sys.executable, str(SCRIPT), "--json", "--arch", str(arch), "--dtype", "bf16", "fp16"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert {(row["kernel"], row["dtype"]) for row in rows} == {
        (kernel, dtype) for kernel in ("shrink_kernel", "expand_kernel", "look_up_kernel") for dtype in ("bf16", "fp16")
    }
    assert any(row.get("EXPERTS") for row in rows)
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["dependent"] == (arch >= 90 and not row.get("EXPERTS", True)), "expand launched while shrink ends"
        assert row["shared_bytes"] <= row["shared_limit_bytes"], row
