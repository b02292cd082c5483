"""Runs the kernels in Triton's interpreter, in a process of its own.

``TRITON_INTERPRET`` must be set before triton is imported and then holds for the whole process, in which nothing can be
compiled any more. So the tests send their cases here: pickled requests on stdin, pickled answers on stdout.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

# Small tiles: many tiles, chunks, lanes and splits at sizes that the interpreter can afford.
SMALL_TILES = {
    "TILINGS": {"default": [(24, 16, 8), (None, 32, 2)]},
    "SHRINK": {"default": [(16, None, None, 16, 32, 4, 4, 1), (32, None, None, 16, 32, 2, 4, 1)]},
    "EXPAND": {"default": [(16, None, None, 32, 16, 2, 4, 1), (32, None, None, 32, 16, 2, 4, 1)]},
}


class Worker:
    """The process that holds the interpreter."""

    def __init__(self) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def run(self, case: Any, **options: Any) -> Any:
        """``out`` after the operations; see ``run_case`` for the options."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((as_request(case), options), self._process.stdin)
        self._process.stdin.flush()
        answer, error = pickle.load(self._process.stdout)
        assert error is None, error
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def as_request(case: Any) -> dict[str, Any]:
    """The case without its answer, descriptors packed, and the largest rank of a slice."""
    request = {name: value for name, value in vars(case).items() if name not in ("expected", "budget")}
    packed = [descriptor.pack() for descriptor in case.descriptors]
    return request | {"descriptors": packed, "rank": case.rank}


def use_tiles(small: bool) -> None:
    """Serve the small tiles of this file, or the project's own."""
    from blocklora_kernels import tile_table, tiles

    for name, table in (SMALL_TILES if small else ORIGINAL_TILES).items():
        setattr(tile_table, name, table)
    for function in vars(tiles).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def set_up(
    request: dict[str, Any], device: str = "cpu", dtype: Any = None, invariant: bool = False
) -> tuple[Any, Any, Any, Any]:
    """``LoraLinear``, ``BatchMetadata``, x and out of a case on ``device``, cast to ``dtype`` where given."""
    import torch
    from blocklora_kernels.batch import BatchMetadata
    from blocklora_kernels.ops import LoraLinear
    from blocklora_kernels.table import AdapterTable, pack_entry

    place = torch.device(device)
    slots, descriptors = request["slots"], np.array(request["descriptors"], np.int32)
    most_slots = max(len(own) for own in slots)
    table = AdapterTable(1, 1, len(slots), most_slots, place)
    for i, own in enumerate(slots):
        entry = pack_entry(descriptors[i][None, None], request["scalings"][i][None, None])
        table.write(i, torch.from_numpy(own).to(place, torch.int64), entry)
    planes = []
    for plane in request["planes"]:
        whole = np.full((plane.shape[0], plane.shape[1] + request["gap"]), np.nan, plane.dtype)
        whole[:, : plane.shape[1]] = plane
        planes.append(torch.from_numpy(whole).to(place, dtype)[:, : plane.shape[1]])
    linear = LoraLinear(
        planes,
        table.slots,
        table.first_slots,
        table.descriptors[0, 0],
        table.scalings[0, 0],
        request["in_features"],
        request["out_offsets"],
        debug=True,
    )
    x, out = (torch.from_numpy(request[name].copy()).to(place, dtype) for name in ("x", "out"))
    h_width, rank = max(1, int(descriptors[:, 0].max())), 64 if invariant else None
    batch = BatchMetadata(max(len(x), 1), max(len(slots), 1), h_width, place, invariant_rank=rank)
    return linear, batch, x, out


def run_case(
    request: dict[str, Any],
    small: bool = True,
    other_batches: tuple[np.ndarray, ...] = (),
    captured_rank: int | None = None,
    x_padding: int = 0,
    invariant: bool = False,
) -> np.ndarray:
    """Run shrink and expand on the case.

    small          use SMALL_TILES
    other_batches  adapters per token of batches that are run before, through the same metadata object
    captured_rank  launch as a graph does that was captured for batches of this rank
    x_padding      elements between the rows of x
    invariant      tiles that do not follow from the batch
    """
    import torch
    from blocklora_kernels.batch import Captured
    from blocklora_kernels.segments import Segments

    use_tiles(small)
    linear, batch, x, out = set_up(request, invariant=invariant)
    if x_padding:
        padded = torch.full((x.shape[0], x.shape[1] + x_padding), torch.nan, dtype=x.dtype)
        padded[:, : x.shape[1]] = x
        x = padded[:, : x.shape[1]]
    graph = None if captured_rank is None else Captured(len(x), captured_rank)

    def run(adapters: np.ndarray, out: torch.Tensor) -> None:
        batch.update(Segments.build(adapters), len(x), request["rank"], graph)
        if graph:
            batch.grid_tiles = batch.most_tiles(len(x))
        linear.add_delta_(out, x, batch)

    for adapters in other_batches:
        run(adapters, out.clone())
    batch.h.fill_(torch.nan)
    run(request["adapters"], out)
    return out.numpy()


def run_experts(
    request: dict[str, Any],
    experts: int,
    choices: int,
    shared_x: bool,
    weights: np.ndarray | None,
    captured_rank: int | None,
) -> np.ndarray:
    """Run shrink and expand on a case whose adapter ``a * experts + e`` is what adapter a has on expert e.

    shared_x  whether the ``choices`` rows of a token have one row of x, as an expert's first linear has
    """
    import torch
    from blocklora_kernels.batch import BatchMetadata, Captured
    from blocklora_kernels.descriptor import HEAD_FIELDS, MAX_SLICES, SLICE_FIELDS
    from blocklora_kernels.experts import ExpertBatch
    from blocklora_kernels.ops import ExpertDescriptors, LoraLinear
    from blocklora_kernels.segments import Segments
    from blocklora_kernels.table import ENTRY_FIELDS, AdapterTable, pack_entry

    use_tiles(small=True)
    place, packed = torch.device("cpu"), np.array(request["descriptors"], np.int32)
    adapters = len(request["slots"]) // experts
    table = AdapterTable(1, experts, adapters, sum(map(len, request["slots"])), place)
    for a in range(adapters):
        own, rows = range(a * experts, (a + 1) * experts), 0
        for number in own:  # an adapter's experts share its rows: each begins behind the one before
            starts = [3, *(HEAD_FIELDS + s * SLICE_FIELDS + 3 for s in range(MAX_SLICES))]
            packed[number, starts] += rows
            rows += len(request["slots"][number])
        slots = np.concatenate([request["slots"][number] for number in own])
        entry = pack_entry(packed[own][None], request["scalings"][own][None])
        table.write(a, torch.from_numpy(slots).long(), entry)
    linear = LoraLinear(
        [torch.from_numpy(plane) for plane in request["planes"]],
        table.slots,
        table.first_slots,
        table.descriptors[0, 0],
        table.scalings[0, 0],
        request["in_features"],
        request["out_offsets"],
        experts=ExpertDescriptors(experts, ENTRY_FIELDS),
        choices=choices if shared_x else 1,
    )
    x, out = (torch.from_numpy(request[name].copy()) for name in ("x", "out"))
    pairs = torch.from_numpy(request["adapters"]).view(-1, choices)
    owners = (pairs[:, 0] // experts).numpy()  # rounded down: -1 for none
    ids = torch.where(pairs >= 0, pairs % experts, torch.arange(choices) % experts)
    h_width = max(1, int(packed[:, 0].max()))
    batch = BatchMetadata(len(ids) + 3, adapters, h_width, place, owners=True)
    of_experts = ExpertBatch(len(ids) + 3, choices, experts, adapters, h_width, place)
    graph = None if captured_rank is None else Captured(len(ids) + 1, captured_rank)
    batch.update(Segments.build(owners), len(ids), request["rank"], graph)
    of_experts.h.fill_(torch.nan)
    of_experts.update(ids, batch.owners, batch.rank)
    linear.add_delta_(
        out, x[::choices] if shared_x else x, of_experts, None if weights is None else torch.from_numpy(weights)
    )
    return out.numpy()


def refuse_stray_reads() -> None:
    """Make every load of the interpreter fail that takes in a NaN: memory that a case does not own is full of them."""
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_masked_load

    def create_masked_load(self: Any, ptr: Any, mask: Any, *arguments: Any) -> Any:
        loaded = original(self, ptr, mask, *arguments)
        if loaded.data.dtype.kind == "f" and np.isnan(loaded.data[mask.data]).any():
            raise ValueError("a kernel read memory that is not part of the case")
        return loaded

    InterpreterBuilder.create_masked_load = create_masked_load


def multiply_row_by_row() -> None:
    """Make a row of a product the same whichever other rows there are, as tensor cores do and numpy does not."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        product = np.einsum("mk,kn->mn", a.data, b.data, dtype=acc.data.dtype)
        return TensorHandle(product + acc.data, acc.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to stderr
    while True:
        try:
            request, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            run = run_experts if "experts" in options else run_case
            answer = (run(request, **options), None)
        except Exception:
            answer = (None, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    from blocklora_kernels import tile_table

    ORIGINAL_TILES = {name: getattr(tile_table, name) for name in SMALL_TILES}
    refuse_stray_reads()
    multiply_row_by_row()
    serve()
