"""Rows of images reach an adapter's slots in all planes: in the interpreter, and compiled for a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sglang_blocklora.memory.static_arena import StaticArena

LAYERS, SLOTS = 3, 40


def check(dtype: torch.dtype, width: int, own: list[int], spare: int, part_rows: int) -> None:
    """Write an image part by part; the arena is what ``write`` of the CPU path makes of it.

    spare      slots that the adapter has beyond its image (whole pages, and what other TP ranks need)
    part_rows  rows of a part: parts end within planes
    """
    from blocklora_kernels.scatter import RowScatter

    found, expected = (StaticArena(LAYERS, SLOTS, width, dtype, torch.device("cpu")) for _ in range(2))
    for arena in (found, expected):
        arena._rows.fill_(-1)
    image = torch.arange(LAYERS * 2 * len(own) * width).view(LAYERS, 2, len(own), width).to(dtype)
    slots = torch.tensor([*own, *range(SLOTS - spare, SLOTS)])
    expected.write(slots, image)
    scatter, rows = RowScatter(found.planes), image.view(-1, width)
    scatter.compile(slots, rows[:1])
    assert (found._rows == -1).all(), "nothing was to be written"
    for first in range(0, len(rows), part_rows):
        scatter.write(slots, rows[first : first + part_rows].contiguous(), first, len(own))
    assert torch.equal(found._rows, expected._rows)


def check_all() -> None:
    check(torch.float16, 1024, [7, 3, 30, 31, 4], 2, 7)
    check(torch.float32, 8, [9], 0, 1)
    check(torch.bfloat16, 264, list(range(20)), 3, 1000)
    check(torch.bfloat16, 128, list(range(5, 25))[::-1], 0, 13)


def test_in_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen before triton is imported."""
    code = (
        "import importlib.util as u, sys\n"
        "spec = u.spec_from_file_location('scatter_checks', sys.argv[1]); module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module); module.check_all()\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code, __file__], env=environment, check=True)


def test_rows_that_do_not_start_on_16_bytes_are_refused() -> None:
    from blocklora_kernels.scatter import RowScatter

    shifted = torch.empty(LAYERS * 20 + 1)[1:].view(LAYERS, 20)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        RowScatter([(shifted, shifted)])


COMPILE = """
import sys
sys.path.insert(0, sys.argv[1])
from registers import assemble
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from blocklora_kernels.scatter import BLOCK_ROWS, BLOCK_WORDS, scatter_kernel as kernel

names, constants = kernel.arg_names, {"WORDS": 512, "BLOCK_R": BLOCK_ROWS, "BLOCK_W": BLOCK_WORDS}
types = {"p_planes": "*i64", "p_slots": "*i64", "p_rows": "*i32"}
aligned = [*types, "row_stride"]
source = ASTSource(
    fn=kernel,
    signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
    constexprs={(names.index(name),): value for name, value in constants.items()},
    attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
)
ptx = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
print(assemble(ptx, 90)["spill_bytes"])
print(ptx)
"""


def test_compiled_for_sm_90_it_moves_16_bytes_a_thread() -> None:
    folder = Path(__file__).parents[2] / "benchmark" / "kernels"
    command = [sys.executable, "-c", COMPILE, str(folder)]
    spills, ptx = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n", 1)
    assert spills == "0"
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
    stores = re.findall(r"st\.global\S*", ptx)
    assert stores
    assert all(store.endswith(".v4.b32") for store in stores), stores
