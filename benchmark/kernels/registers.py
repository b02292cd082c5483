"""Registers, spills and shared memory of every tile of the table, compiled for a GPU that need not be present.

    python benchmark/kernels/registers.py [--arch 80 90 100] [--json]

Spills are read from ptxas' own report on the PTX that Triton emits; shared memory from Triton's metadata.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from blocklora_kernels import tile_table
from blocklora_kernels.division import ANY_VALUE
from blocklora_kernels.expand_kernel import expand_kernel
from blocklora_kernels.look_up_kernel import look_up_kernel
from blocklora_kernels.ops import GRANULE, NARROW, NARROW_OUTPUTS, NARROW_WARPS
from blocklora_kernels.shrink_kernel import shrink_kernel
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

FLOAT_POINTERS = ("p_h", "p_scalings", "p_weights")
DATA_POINTERS = ("p_x", "p_out", "p_k", "p_v")
LONG_POINTERS = ("p_ids",)
SHARED_MEMORY_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # per block, CUDA C++ Programming Guide


def compile_kernel(kernel: Any, constants: dict[str, int], dtype: str, arch: int, warps: int, stages: int) -> Any:
    """``kernel`` for compute capability ``arch`` as the launcher specialises it for aligned arguments."""
    names = kernel.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in DATA_POINTERS:
            signature[name] = f"*{dtype}"
        elif name in LONG_POINTERS:
            signature[name] = "*i64"
        elif name.startswith("p_"):
            signature[name] = "*fp32" if name in FLOAT_POINTERS else "*i32"
        else:
            signature[name] = "i32"
    aligned = [n for n in names if n not in constants and n not in ANY_VALUE]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def assemble(ptx: str, arch: int) -> dict[str, int]:
    """Registers per thread and bytes of spills, from ptxas."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = sm_arch_from_capability(arch)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"Used (\d+) registers", log)
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
    return {"registers": int(found.group(1)), "spill_bytes": int(stores) + int(loads)}


def launches(arch: int) -> list[tuple[Any, dict[str, int], int, int]]:
    """Kernel, constants, warps and stages of every tile of the table that a GPU of ``arch`` would use."""
    key, found = f"sm_{arch}", []
    for vector, experts in ((GRANULE, False), (1, False), (GRANULE, True)):
        common = {"WIDTH": 1024, "VECTOR": vector, "DEPENDENT": arch >= 90 and not experts, "EXPERTS": experts}
        for block, _, _, n, k, _, warps, stages in tile_table.SHRINK.get(key, tile_table.SHRINK["default"]):
            tile = {"BLOCK_T": block, "BLOCK_N": n, "BLOCK_K": k if vector > 1 else NARROW}
            warps = warps if vector > 1 else max(warps, NARROW_WARPS)
            found.append((shrink_kernel, common | tile, warps, stages))
        for block, _, _, o, r, _, warps, stages in tile_table.EXPAND.get(key, tile_table.EXPAND["default"]):
            o, r = (o, r) if vector > 1 else (NARROW_OUTPUTS, NARROW)
            tile = {"BLOCK_T": block, "BLOCK_N": 16, "BLOCK_O": o, "BLOCK_R": r}
            found.append((expand_kernel, common | tile | {"WEIGHTED": experts}, warps, stages))
    for block in sorted({tile[0] for tile in tile_table.SHRINK.get(key, tile_table.SHRINK["default"])}):
        found.append((look_up_kernel, {"WIDTH": 1024, "BLOCK_T": block, "BLOCK_N": NARROW}, NARROW_WARPS, 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    for arch in arguments.arch:
        for dtype in arguments.dtype:
            for kernel, constants, warps, stages in launches(arch):
                compiled = compile_kernel(kernel, constants, dtype, arch, warps, stages)
                row = {"kernel": kernel.__name__, "arch": arch, "dtype": dtype, "warps": warps, "stages": stages}
                row |= {
                    name: value for name, value in constants.items() if name.startswith(("BLOCK", "VECTOR", "EXPERTS"))
                }
                row |= assemble(compiled.asm["ptx"], arch) | {"shared_bytes": compiled.metadata.shared}
                row["dependent"] = "griddepcontrol" in compiled.asm["ptx"]
                row["shared_limit_bytes"] = SHARED_MEMORY_LIMIT_BYTES[arch]
                text = json.dumps(row) if arguments.json else "  ".join(f"{k} {v}" for k, v in row.items())
                sys.stdout.write(text + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
