"""What CUDA graphs would capture, and its replay with other batches. A script that is run twice:

    python -m blocklora_testing.kernels.replays capture FOLDER    # kernels compiled for an H100, launches recorded
    python -m blocklora_testing.kernels.replays replay FOLDER     # in Triton's interpreter, TRITON_INTERPRET=1

The first captures every graph of a server with a ``TritonAdder``, checks that random batches find all addresses and
constants as they were captured and that none has a kernel compiled, and writes the launches down. The second runs
exactly these, programs and arguments, for random batches: nothing outside of the launch's tensors is touched, each
element is written once, and outputs are what dense float64 algebra says. Both then plant faults, one after another, and
print of each whether it was found.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocklora_kernels import ops, tiles
from blocklora_kernels.batch import BatchMetadata, Captured
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.batch.triton_adder import TritonAdder
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.eviction import LRU
from sglang_blocklora.memory.loaded import LoadedAdapter
from sglang_blocklora.memory.static_arena import StaticArena
from sglang_blocklora.memory.static_pool import StaticPool
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import JITFunction

from blocklora_testing.kernels import worker
from blocklora_testing.toy import ToyModel, host_only_images, write_adapter

CPU = torch.device("cpu")
MODEL = ToyModel(layers=1, hidden=64, heads=32, kv_heads=16, intermediate=96)
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 5},
    "large": {"rank": 40},
    "n2": {"rank": 6, "nblocks": 2},
    "n4": {"rank": 12, "nblocks": 4, "targets": ("q_proj", "v_proj", "o_proj", "down_proj")},
    "n12": {"rank": 12, "nblocks": 12, "targets": ("down_proj",)},
}
PROCESSORS = 3
GRAPHS = {"decode": (20, 8, 4, 1), "prefill": (64, 40)}  # as upstream captures them, the largest first
Key = tuple[str, int, int, str]  # kind and tokens of a graph, linear, kernel


class Server:
    """A TP rank's adder over a pool that holds all adapters, and their dense deltas."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        worker.use_tiles(small=True)
        tiles.processors = lambda device: PROCESSORS
        self.spec = spec = MODEL.spec(1, 2, dtype)
        arena = StaticArena(MODEL.layers, 1000, spec.row_width, spec.dtype, CPU)
        pool = StaticPool(arena, len(ADAPTERS), host_only_images(), DecisionLog(None, 0), LRU())
        self.deltas = {}
        for seed, (name, options) in enumerate(ADAPTERS.items()):
            self.deltas[name] = write_adapter(folder / name, MODEL, seed=seed, **options)
            shard, image = load_shard(name, folder / name, spec, 64)
            adapter = LoadedAdapter(
                name=name, path="", shard=shard, slots=shard.slots, pinned=False, content_hash="", image_digest=""
            )
            pool.add(name, adapter, image)
        if not pool.bring_in(ADAPTERS):
            raise AssertionError("the arena is too small for all adapters")
        pool.begin_step(ADAPTERS)
        self.adder = TritonAdder(spec, pool, 64, CPU)
        for kind, sizes in GRAPHS.items():
            self.adder.init_graphs(kind, sizes[0])

    def activations(self, tokens: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Index, input and base output of each linear."""
        generator = torch.Generator().manual_seed(tokens)
        for index, linear in enumerate(self.spec.layers[0]):
            x = torch.randn(tokens, linear.inputs.length, generator=generator).to(self.spec.dtype)
            yield index, x, torch.randn(tokens, linear.out_offsets[-1], generator=generator).to(self.spec.dtype)

    def expected(self, index: int, keys: list[str | None], x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``out`` with every token's dense delta, float64. Tokens after the last key are padding."""
        linear, expected = self.spec.layers[0][index], out.double()
        for module, source in linear.sources.items():
            (slice_index,) = source.slices
            rows, (start, stop) = linear.outputs[slice_index], linear.out_offsets[slice_index : slice_index + 2]
            for t, key in enumerate(keys):
                if key is not None and module in self.deltas[key]:
                    delta = self.deltas[key][module]
                    part = delta[rows.start : rows.stop, linear.inputs.start : linear.inputs.stop]
                    expected[t, start:stop] += part @ x[t].double()
        return expected


def random_batches(seed: int, count: int) -> Iterator[tuple[str, list[str | None], list[int] | None]]:
    """Kind, adapter of each request, and its tokens."""
    rng = np.random.default_rng(seed)
    names = [*ADAPTERS, None]
    for _ in range(count):
        used = rng.permutation(len(names))[: rng.integers(1, len(names) + 1)]
        if rng.random() < 0.6:
            yield "decode", [names[i] for i in rng.choice(used, rng.integers(1, GRAPHS["decode"][0] + 1))], None
        else:
            counts = rng.multinomial(rng.integers(21, GRAPHS["prefill"][0] + 1) - 5, [0.2] * 5) + 1
            yield "prefill", [names[i] for i in rng.choice(used, 5)], counts.tolist()


def capture(folder: Path) -> None:
    from blocklora_testing.kernels.no_gpu import record_launches

    launches = record_launches()
    server = Server(folder, torch.bfloat16)
    captured: dict[Key, Any] = {}

    def run(kind: str, tokens: int) -> dict[Key, Any]:
        found = {}
        for index, x, out in server.activations(tokens):
            del launches[:]
            server.adder.add_delta_(0, index, out, x)
            for launch in launches:
                found[kind, tokens, index, launch.kernel] = replace(launch, arguments=_plain(launch.arguments))
        return found

    def check() -> None:
        for kind, keys, counts in random_batches(0, 100):
            server.adder.prepare(keys, counts)
            tokens = sum(counts) if counts else len(keys)
            size = min(size for size in GRAPHS[kind] if size >= tokens)
            for key, launch in run(kind, size).items():
                if launch.arguments != captured[key].arguments:
                    raise AssertionError(f"captured with {captured[key].arguments}, now {launch.arguments}")

    def serve() -> None:
        """Batches of every size and adapter, with graphs and without."""
        with changed(JITFunction, "_do_compile", _refuse_to_compile):
            for kind, keys, counts in random_batches(5, 20):
                for repeats in (1, 2, 60):
                    many = counts and [repeats * n for n in counts]
                    server.adder.prepare(keys if counts else keys * repeats, many)
                    run(kind, sum(many) if many else repeats * len(keys))

    with changed(tiles, "token_classes", lambda arch, most: (24,)):
        server.adder.compile()
    tell({"tiles that are not compiled at start-up": nullcontext()}, serve)
    server.adder.compile()
    serve()
    for kind, sizes in GRAPHS.items():
        for tokens in sizes:
            server.adder.prepare_capture(kind, tokens)
            captured |= run(kind, tokens)
    server.adder.reset()
    if run("decode", 1):
        raise AssertionError("something is launched in the graphs without adapters")
    check()
    with (folder / "launches.pickle").open("wb") as file:
        pickle.dump(captured, file)
    graphs, batch = server.adder._graphs["decode"], server.adder._graphs["decode"].batch
    tell(
        {
            "a captured buffer that is replaced": changed(
                graphs, "batch", BatchMetadata(batch.max_tokens, batch.max_segments, batch.h_width, CPU)
            ),
            "tiles of the batch, not of the graph": changed(graphs, "that_holds", lambda n: Captured(40, 8)),
        },
        check,
    )


def _refuse_to_compile(*args: Any) -> None:
    raise AssertionError("a kernel is compiled while the server runs")


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Numbers, and the addresses of tensors that must not move: all but the linear's input and output."""
    return {
        name: value.data_ptr() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
        if name not in ("p_x", "p_out")
    }


class Replayer:
    """Runs captured launches for the batch that the adder was given last."""

    def __init__(self, folder: Path) -> None:
        self.server = Server(folder, torch.float32)
        with (folder / "launches.pickle").open("rb") as file:
            self.captured: dict[Key, Any] = pickle.load(file)
        for kind, sizes in GRAPHS.items():
            for tokens in sizes:
                self.server.adder.prepare_capture(kind, tokens)
        self.written: list[np.ndarray] = []
        self.owned: list[tuple[int, int]] = []  # addresses and bytes of what a launch may touch
        self._watch_memory()

    def check(self, kind: str, keys: list[str | None], counts: list[int] | None) -> None:
        """``AssertionError`` unless the replay writes each element once and ``out`` as float64 algebra has it."""
        self.server.adder.prepare(keys, counts)
        per_token = [key for key, n in zip(keys, counts or [1] * len(keys), strict=True) for _ in range(n)]
        if kind == "decode" and not any(keys):
            return  # replays a graph in which nothing of ours was captured
        size = min(size for size in GRAPHS[kind] if size >= len(per_token))
        self.server.adder._graphs[kind].batch.h.fill_(torch.nan)
        for index, x, out in self.server.activations(size):
            expected = self.server.expected(index, per_token, x, out)
            for kernel in ("shrink_kernel", "expand_kernel"):
                self._launch(self.captured[kind, size, index, kernel], kind, index, x, out)
            torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-3)

    def _launch(self, launch: Any, kind: str, index: int, x: torch.Tensor, out: torch.Tensor) -> None:
        linear, batch = self.server.adder._linears[0][index], self.server.adder._graphs[kind].batch
        tensors = {"p_x": x, "p_out": out, "p_h": batch.h, "p_k": linear.planes[0], "p_v": linear.planes[1]}
        tensors |= {"p_tiles": batch.tiles, "p_tokens": batch.tokens, "p_slots": linear.slots}
        tensors |= {"p_first_slots": linear.first_slots, "p_descriptors": linear.descriptors}
        tensors |= {"p_scalings": linear.scalings}
        kernel = getattr(ops, launch.kernel)
        self.written.clear()
        self.owned = sorted((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors.values())
        kernel[(launch.programs,)](**launch.arguments | {n: tensors[n] for n in kernel.arg_names if n in tensors})
        _, times = np.unique(np.concatenate([*self.written, np.empty(0, np.uint64)]), return_counts=True)
        if len(times) and times.max() > 1:
            raise AssertionError(f"{launch.kernel}: an element was written {times.max()} times")

    def _watch_memory(self) -> None:
        """Note what is written, and refuse what is outside of the launch's tensors."""
        from triton.runtime.interpreter import InterpreterBuilder

        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def create_masked_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._check_owned(ptrs.data[mask.data])
            return load(builder, ptrs, mask, *rest)

        def create_masked_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._check_owned(ptrs.data[mask.data])
            self.written.append(ptrs.data[mask.data].astype(np.uint64).ravel())
            return store(builder, ptrs, value, mask, *rest)

        InterpreterBuilder.create_masked_load = create_masked_load
        InterpreterBuilder.create_masked_store = create_masked_store

    def _check_owned(self, addresses: np.ndarray) -> None:
        starts, sizes = np.array(self.owned, np.uint64).T
        places = np.searchsorted(starts, addresses.astype(np.uint64), side="right") - 1
        if (places < 0).any() or (addresses.astype(np.uint64) - starts[places] >= sizes[places]).any():
            raise AssertionError("an address outside of the launch's tensors")


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _programs(change: Callable[[np.ndarray], np.ndarray]) -> Any:
    """Programs are told of another number of them than run."""
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_get_num_programs

    def create_get_num_programs(builder: Any, axis: int) -> Any:
        handle = original(builder, axis)
        handle.data = change(handle.data)
        return handle

    return changed(InterpreterBuilder, "create_get_num_programs", create_get_num_programs)


def _argument(replayer: Replayer, kernel: str, name: str, change: Callable[[int], int]) -> Any:
    """One argument of a kernel was captured as another number."""
    captured = {
        key: replace(launch, arguments=launch.arguments | {name: change(launch.arguments[name])})
        if launch.kernel == kernel
        else launch
        for key, launch in replayer.captured.items()
    }
    return changed(replayer, "captured", captured)


def faults(replayer: Replayer) -> dict[str, Any]:
    """What is wrong -> the context in which it is."""
    adder = replayer.server.adder
    batch = adder._graphs["decode"].batch
    last = {name: ADAPTERS_SHIFTED[name] for name in ADAPTERS}
    entries = adder._entries.of
    return {
        "a program less than the others count on": _programs(lambda x: x + 1),
        "two programs take the same work": _programs(lambda x: np.maximum(x // 2, 1)),
        "metadata of another batch": changed(batch, "update", lambda *args: None),
        "metadata in a buffer that was not captured": changed(batch, "_buffer", batch._buffer.clone()),
        "tiles of another size than captured": _argument(replayer, "shrink_kernel", "BLOCK_T", lambda n: n // 2),
        "kernels that do not agree on the splits": _argument(replayer, "expand_kernel", "shares", lambda n: 4 * n),
        "another capacity of tiles": _argument(replayer, "expand_kernel", "max_tiles", lambda n: n + 1),
        "rows of h taken for narrower": _argument(replayer, "expand_kernel", "h_stride", lambda n: n // 2),
        "entries of other adapters": changed(
            adder._entries,
            "of",
            lambda keys, resident: (lambda found: {k: found[last[k]] for k in keys})(entries(set(ADAPTERS), resident)),
        ),
    }


ADAPTERS_SHIFTED = dict(zip(ADAPTERS, [*list(ADAPTERS)[1:], next(iter(ADAPTERS))], strict=True))


def replay(folder: Path) -> None:
    replayer = Replayer(folder)
    for batch in random_batches(1, 16):
        replayer.check(*batch)
        print(f"right: {batch}")

    def check() -> None:
        for batch in random_batches(3, 6):
            replayer.check(*batch)

    tell(faults(replayer), check)


def tell(planted: dict[str, Any], check: Callable[[], None]) -> None:
    """Print of each fault whether ``check`` fails in its context."""
    for name, fault in planted.items():
        try:
            with fault:
                check()
        except (AssertionError, InterpreterError) as error:
            print(f"found: {name} ({str(error).splitlines()[0][:100]})")
        else:
            print(f"missed: {name}")


if __name__ == "__main__":
    {"capture": capture, "replay": replay}[sys.argv[1]](Path(sys.argv[2]))
