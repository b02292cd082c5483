"""A server's steps on a GPU that does not exist: SGLang's tree and allocator, our pool, transfer and adder.

As SGLang's overlap schedule has it: pass N runs while the host orders pass N + 1, and only then learns which requests
pass N - 1 has ended; those run one pass longer, in slots that are free again. SGLang's own barriers after a pass are
left out, so what must be ordered here must be ordered by us.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from blocklora_kernels import scatter
from blocklora_kernels.ops import LoraLinear
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.batch.delta_adder import BatchKind, Overlap
from sglang_blocklora.batch.triton_adder import TritonAdder
from sglang_blocklora.memory import transfer
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.eviction import LRU
from sglang_blocklora.memory.loaded import LoadedAdapter
from sglang_blocklora.memory.pool import AdapterPool
from sglang_blocklora.memory.static_arena import StaticArena
from sglang_blocklora.memory.static_pool import StaticPool
from sglang_blocklora.memory.unified_pool import KVArena, UnifiedPool

from blocklora_testing.gpu.device import CUDA, VirtualGPU
from blocklora_testing.real_cache import digest, key_of, new_cache
from blocklora_testing.toy import ToyModel, host_only_images, write_adapter
from blocklora_testing.upstream import insert_params, matched_slots

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams

MODEL = ToyModel(layers=2)
RANKS = (2, 4, 6)
MAX_RANK = 8
MAX_RUNNING = 4
MAX_TOKENS = 64
GRAPHS: dict[BatchKind, tuple[int, ...]] = {"decode": (1, 2, MAX_RUNNING), "prefill": (8, 16)}
REAL = torch._C.DisableTorchFunction  # within it tensors are what they are: memory of the CPU


@dataclass(eq=False)
class Request:
    """One request: its tokens, what the tree holds of them, the slots that it has itself, and its lock."""

    key: str | None
    tokens: list[int]
    left: int
    matched: torch.Tensor
    own: list[torch.Tensor]
    node: Any
    receipt: Any


@dataclass
class Pass:
    """A forward pass: who runs in it, and the event after which the host has its tokens."""

    requests: list[Request]
    done: Any = field(default=None)


class Serving:
    """One scheduler. ``step`` orders a pass and then learns of the one before."""

    def __init__(
        self,
        gpu: VirtualGPU,
        patch: pytest.MonkeyPatch,
        *,
        seed: int = 0,
        page: int = 1,
        slots: int = 150,
        static: bool = False,
        overlap: Overlap = "off",
        ahead: int = 1,
        events: bool = False,
    ) -> None:
        """
        patch    lasts as long as this object is used
        slots    of the KV pool, or of the arena and the KV pool each (``static``)
        overlap  as ``TritonAdder`` has it
        ahead    passes that are ordered before the host learns of the one before them; SGLang's is 1
        events   KV events are taken after each pass
        """
        self.gpu, self.random, self.page, self.ahead = gpu, random.Random(seed), page, ahead
        patch.setattr(scatter, "scatter_kernel", _Scatter(self))
        patch.setattr(LoraLinear, "shrink", lambda linear, x, batch: self._lora(linear, batch, "shrink"))
        patch.setattr(LoraLinear, "expand_", lambda linear, out, batch, *_: self._lora(linear, batch, "expand"))
        patch.setattr(transfer, "PART_BYTES", 1600)  # images in many parts
        self.schedule, self.forward, self.results = (gpu.streams.Stream(CUDA) for _ in range(3))
        self.spec = MODEL.spec(0, 1, torch.float16)
        kv = [torch.empty(slots + page, 1, self.spec.row_width, dtype=torch.float16, device=CUDA) for _ in "kkvv"]
        self.kv = [gpu.by_rows(buffer.view(len(buffer), -1)) for buffer in kv]
        with torch.cuda.stream(self.schedule):
            # SGLang's other tree calls torch from Rust.
            self.cache = new_cache(page, slots, device="cuda", core="python", events=events)
        common = (3, host_only_images(), DecisionLog(None, 0))
        self.pool: AdapterPool
        if static:
            arena = StaticArena(MODEL.layers, slots, self.spec.row_width, torch.float16, CUDA)
            gpu.by_rows(arena._rows.view(-1, self.spec.row_width))
            self.pool = StaticPool(arena, *common, LRU(), transfer.Transfer(CUDA))
        else:
            self.pool = UnifiedPool(*common, transfer.Transfer(CUDA))
            self.pool.bind_arena(KVArena(kv[:2], kv[2:]), slots)
            self.pool.bind_cache(self.cache)
        self.adder = TritonAdder(self.spec, self.pool, MAX_RANK, CUDA, overlap, MAX_TOKENS)
        self.adder.compile()
        for kind, sizes in GRAPHS.items():
            self.adder.init_graphs(kind, sizes[-1])
            for size in sizes:
                self.adder.prepare_capture(kind, size)
        self.tokens = torch.empty(MAX_TOKENS, dtype=torch.int64, device=CUDA)
        self.answers = torch.empty(MAX_TOKENS, dtype=torch.int64, pin_memory=True)
        self.running: list[Request] = []
        self.in_flight: list[Pass] = []
        self.numbers: dict[str, int] = {}  # content hash -> what all its rows hold
        self.loaded = self.forwards = self.ended = self.events = 0
        gpu.synchronize()

    def load(self, contents: int) -> str:
        """Load an adapter, all of whose rows hold ``contents``; the same contents may have several names."""
        key = f"{self.loaded:032d}"
        self.loaded += 1
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), MODEL, rank=RANKS[contents % len(RANKS)], seed=contents)
            shard, image = load_shard(key, Path(folder), self.spec, MAX_RANK, pin_memory=True, known=True)
        image.fill_(contents)
        self.numbers[digest(str(contents))] = contents
        self.pool.add(
            key,
            LoadedAdapter(
                name=key,
                path="",
                shard=shard,
                slots=shard.slots,
                pinned=False,
                content_hash=digest(str(contents)),
                image_digest="",
            ),
            image,
        )
        return key

    def admit(self, key: str | None, tokens: list[int], answer: int) -> Request | None:
        """Bring the adapter in, lock what is cached and take slots for the rest; None where there is no room."""
        if not self.pool.bring_in({k for r in self.running for k in [r.key] if k} | ({key} if key else set())):
            return None
        found = self.cache.match_prefix(MatchPrefixParams(key=key_of(tokens, key)))
        matched = matched_slots(self.cache, found)
        receipt = self.cache.inc_lock_ref(found.last_device_node).to_dec_params()
        own = self._slots(len(tokens) - len(matched))
        if own is None:
            self.cache.dec_lock_ref(found.last_device_node, receipt)
            return None
        return Request(key, list(tokens), answer, matched, [own], found.last_device_node, receipt)

    def step(self, waiting: list[tuple[str | None, list[int], int]]) -> None:
        """Order one pass: a prefill of what of ``waiting`` fits, else a token of everybody; then learn of the last."""
        with torch.cuda.stream(self.schedule):
            admitted = []
            while waiting and len(self.running) < MAX_RUNNING:
                request = self.admit(*waiting[0])
                if request is None:
                    break
                waiting.pop(0)
                admitted.append(request)
                self.running.append(request)
            batch, counts = admitted, [max(len(r.tokens) - len(r.matched), 1) for r in admitted]
            if not admitted:
                batch = [request for request in self.running if self._grow(request)]
                counts = []
            if batch:
                self.in_flight.append(self._run(batch, counts or None))
            while len(self.in_flight) > (self.ahead if batch else 0):
                self._learn(self.in_flight.pop(0))
            self.events += len(self.cache.take_events())

    def idle(self) -> None:
        """Let everything end."""
        while self.running or self.in_flight:
            self.step([])

    def run(self, steps: int, names: list[str]) -> None:
        """Steps of random requests, some of them for new names of old contents; names come and go meanwhile.

        Some adapters are brought in for a request that is then not admitted. Everything has ended at the end.
        """
        waiting: list[tuple[str | None, list[int], int]] = []
        for _ in range(steps):
            dice = self.random.random()
            if dice < 0.1:
                names.append(self.load(self.random.randrange(6)))
            elif dice < 0.2 and len(names) > 3:
                gone = names.pop(self.random.randrange(len(names)))
                waiting = [one for one in waiting if one[0] != gone]
                self.pool.remove(gone)
            elif dice < 0.4:
                with torch.cuda.stream(self.schedule):
                    self.pool.bring_in({r.key for r in self.running if r.key} | {self.random.choice(names)})
                    if dice < 0.3:  # KV needs the room at once
                        self.cache.evict(EvictParams(num_tokens=self.cache.evictable_size()))
            elif dice < 0.42 and not self.running and not self.in_flight:
                self.flush()
            if len(waiting) < 5:
                prompt = [self.random.randrange(3)] * self.random.randrange(1, 12) + [self.random.randrange(50)]
                waiting.append((self.random.choice([None, *names]), prompt, self.random.randrange(1, 6)))
            self.step(waiting)
        self.idle()

    def flush(self) -> None:
        """What SGLang does when idle and asked to."""
        with torch.cuda.stream(self.schedule):
            self.cache.reset()
            self.cache.token_to_kv_pool_allocator.clear()

    def _slots(self, count: int) -> torch.Tensor | None:
        count = -(-max(count, 1) // self.page) * self.page
        allocator = self.cache.token_to_kv_pool_allocator
        if (shortfall := count - allocator.available_size()) > 0:
            self.cache.evict_for_alloc(EvictParams(num_tokens=shortfall))
        return allocator.alloc(count)

    def _grow(self, request: Request) -> bool:
        room = len(request.matched) + sum(map(len, request.own)) - len(request.tokens)
        if room < 1:
            slots = self._slots(1)
            if slots is None:
                return False
            request.own.append(slots)
        request.tokens.append(self.random.randrange(50))
        return True

    def _run(self, batch: list[Request], counts: list[int] | None) -> Pass:
        current = Pass(list(batch))
        with torch.cuda.stream(self.forward):
            self.forward.wait_stream(self.schedule)
            keys = [request.key for request in batch]
            self.pool.begin_step(key for key in keys if key)
            self.adder.prepare(keys, counts)
            for i, layer in enumerate(self.spec.layers):
                for j in range(len(layer)):
                    self.adder.start(i, j, self.tokens)
                    self.adder.add_delta_(i, j, self.tokens, self.tokens)
            self.gpu.launch("attention", self._kv_of(batch))
            done = torch.cuda.Event()
            done.record()
        with torch.cuda.stream(self.results):
            self.results.wait_event(done)
            self.answers.copy_(self.tokens, non_blocking=True)
            current.done = torch.cuda.Event()
            current.done.record()
        self.forwards += 1
        return current

    def _kv_of(self, batch: list[Request]) -> list[Any]:
        """KV that a pass reads and writes: its requests' cached tokens, and their own slots."""
        with REAL():
            read = [slot for request in batch for slot in request.matched.tolist()]
            own = [slot for request in batch for slots in request.own for slot in slots.tolist()]
            for plane in self.kv:
                plane[own] = -1.0
        parts = ((False, read), (True, own))
        return [self.gpu.access(plane, writes, rows) for plane in self.kv for writes, rows in parts]

    def _learn(self, done: Pass) -> None:
        done.done.synchronize()
        for request in done.requests:
            if request not in self.running:
                continue  # it had ended, and ran one pass longer
            request.left -= 1
            if request.left <= 0:
                self._end(request)

    def _end(self, request: Request) -> None:
        self.running.remove(request)
        self.ended += 1
        values = torch.cat([request.matched, *request.own])
        key = key_of(request.tokens, request.key).page_aligned(self.page)
        key = key[: len(values) // self.page * self.page]
        result = self.cache.insert(insert_params(key, values[: len(key)], len(request.matched)))
        kept = 0 if result.rotation_tail_declined else len(key)
        self.cache.token_to_kv_pool_allocator.free(values[max(kept, len(request.matched)) :])
        self.cache.dec_lock_ref(request.node, request.receipt)

    def _lora(self, linear: LoraLinear, batch: Any, name: str) -> None:
        """A launch: what it reads by the table, which must be the rows of the batch's adapters."""
        accesses = [self.gpu.access(t, False) for t in (batch.tiles, batch.tokens, linear.first_slots)]
        accesses += [self.gpu.access(t, False) for t in (linear.descriptors, linear.scalings)]
        accesses.append(self.gpu.access(batch.h, name == "shrink"))
        owners = dict(self.adder._entries._owners.values())
        for entry in batch.adapters.tolist():
            adapter = owners[entry].adapter
            with REAL():
                rows = linear.slots[entry, : adapter.shard.slots].tolist()
                for plane in linear.planes:
                    assert (plane[rows] == self.numbers[adapter.content_hash]).all(), "rows of another adapter"
            accesses.append(self.gpu.access(linear.slots[entry], False))
            accesses += [self.gpu.access(plane, False, self.rows_of(plane, rows)) for plane in linear.planes]
        self.gpu.launch(name, accesses)

    def rows_of(self, plane: torch.Tensor, slots: list[int]) -> list[int]:
        """Rows of the plane's memory, of which it may be a part."""
        with REAL():
            first = plane.storage_offset() // plane.shape[1]
        return [first + slot for slot in slots]


class _Scatter:
    """``scatter_kernel`` in torch; the planes' addresses must be the arena's."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._names = scatter.scatter_kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        return self._launch

    def _launch(self, *args: Any, **constants: int) -> None:
        given = dict(zip(self._names, args, strict=False)) | constants
        gpu, touched = self._serving.gpu, {}
        planes = [plane for layer in self._serving.pool.arena.planes for plane in layer] if given["count"] else []
        with REAL():
            words = given["p_rows"].view(-1, given["WORDS"])
            slots, addresses = given["p_slots"].tolist(), given["p_planes"].tolist()
            for index in range(given["count"]):
                row = given["first"] + index
                plane, slot = row // given["slots_each"], slots[row % given["slots_each"]]
                assert addresses[plane] == planes[plane].data_ptr()
                planes[plane].view(torch.int32)[slot] = words[index]
                touched.setdefault(plane, []).append(slot)
        accesses = [gpu.access(given[name], False) for name in ("p_planes", "p_slots", "p_rows")]
        for plane, rows in touched.items():
            accesses.append(gpu.access(planes[plane], True, self._serving.rows_of(planes[plane], rows)))
        gpu.launch("scatter", accesses)
