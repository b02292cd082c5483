"""The device: a torch function mode under which tensors made for "cuda" are CPU tensors that say otherwise.

Data are real, so what is computed can be looked at. What a GPU would do with each call is recorded: which stream reads
and writes what, where the host would wait, what is allocated. Streams run as they are asked, one after the other; the
trace says what else could have happened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from blocklora_testing.gpu.streams import Streams
from blocklora_testing.gpu.trace import HOST, Access, Buffer, Trace, where

CUDA = torch.device("cuda", 0)
GETTERS = {torch.Tensor.device.__get__: CUDA, torch.Tensor.is_cuda.__get__: True, torch.Tensor.is_cpu.__get__: False}
# What gives the host a value, or a shape, that only the device knows.
WAITING = {
    *("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"),
    *("nonzero", "unique", "unique_consecutive", "masked_select", "bincount", "equal", "repeat_interleave"),
}
# Makers of tensors that give memory, not values of other tensors.
MAKERS = {
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "tensor",
    "empty_like",
    "zeros_like",
    "new_empty",
    "empty_strided",
}


class VirtualGPU(TorchFunctionMode):
    """One GPU; as a context it takes the place of ``torch.cuda``.

    lost  waits and ``record_stream``s that are left out, by a part of their line of code: planted faults
    """

    def __init__(self, lost: Collection[str] = ()) -> None:
        super().__init__()
        self.trace = Trace()
        self.streams = Streams(self.trace, lost)
        self.allocations: list[Buffer] = []  # on the device, in order
        self._buffers: dict[int, tuple[StorageWeakRef, Buffer]] = {}  # by storage
        self._count = 0

    @contextmanager
    def on(self) -> Iterator[VirtualGPU]:
        """As a GPU machine is to the code under test."""
        streams = self.streams
        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(torch.cuda, "Stream", streams.Stream)
            patch.setattr(torch.cuda, "Event", streams.Event)
            patch.setattr(torch.cuda, "stream", streams.stream)
            patch.setattr(torch.cuda, "current_stream", lambda device=None: streams.current)
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
            properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
            patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
            patch.setattr(torch.Tensor, "record_stream", self._record_stream)  # its own takes no stand-in
            yield self

    def synchronize(self) -> None:
        """The host waits for everything, as at the end of a start."""
        for clock in list(self.trace.clocks.values()):
            self.trace.host_knows(dict(clock))

    def live_bytes(self) -> int:
        """Device memory that is allocated now."""
        self._collect()
        return sum(buffer.size_bytes for _, buffer in self._buffers.values() if buffer.place == "device")

    def live(self) -> list[Buffer]:
        """Device memory that is allocated now, in the order of allocation."""
        self._collect()
        return [buffer for _, buffer in self._buffers.values() if buffer.place == "device"]

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory whose contents nobody looks at, of any size."""
        return self._add(torch.empty(shape, dtype=dtype, device="meta"), "device")

    def buffer_of(self, tensor: torch.Tensor) -> Buffer | None:
        """The memory of a tensor on the device or in page-locked memory; None for other host memory."""
        known = self._buffers.get(tensor.untyped_storage()._cdata)
        return known[1] if known else None

    def by_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Tell accesses to this memory apart by rows of ``tensor`` [rows, W], all of its memory."""
        buffer = self.buffer_of(tensor)
        assert buffer is not None
        buffer.row_bytes = tensor.stride(0) * tensor.element_size()
        return tensor

    def launch(self, name: str, accesses: Iterable[Access]) -> None:
        """A kernel on the current stream."""
        self._collect()
        self.trace.run(name, self.streams.current.number, accesses)

    def access(self, tensor: torch.Tensor, writes: bool, rows: Iterable[int] | None = None) -> Access:
        """All of a tensor on the device, or some rows of memory that is told apart by rows."""
        buffer = self.buffer_of(tensor)
        assert buffer is not None, "a kernel was given memory of the host"
        if rows is not None:
            return Access(buffer, writes, rows=frozenset(rows))
        size = tensor.element_size()
        first = tensor.storage_offset() * size
        spans = ((length - 1) * abs(step) for length, step in zip(tensor.shape, tensor.stride(), strict=True))
        stop = first + (sum(spans) + 1) * size if tensor.numel() else first
        if buffer.row_bytes is None:
            return Access(buffer, writes, first, stop)
        return Access(buffer, writes, rows=frozenset(range(first // buffer.row_bytes, -(-stop // buffer.row_bytes))))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._get(func, args)
        self._collect()
        if name in MAKERS:
            return self._make(func, name, args, kwargs)
        if name == "pin_memory":
            return self._add(args[0].clone(), "pinned")
        if name in ("to", "cpu", "cuda"):
            return self._to(func, name, args, kwargs)
        if name in ("copy_", "__setitem__"):
            return self._copy(func, name, args, kwargs)
        return self._compute(func, name, args, kwargs)

    def _get(self, func: Any, args: Any) -> Any:
        buffer = self.buffer_of(args[0])
        if func == torch.Tensor.is_pinned and buffer is not None:
            return buffer.place == "pinned"
        if buffer is not None and buffer.place == "device":
            for getter, answer in GETTERS.items():
                if func == getter:
                    return answer
        return func(*args)

    def _make(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        like = next((a for a in args if isinstance(a, torch.Tensor)), None)
        own = self.buffer_of(like) if like is not None else None
        device = kwargs.pop("device", CUDA if own is not None and own.place == "device" else None)
        pinned = kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        if device is not None and torch.device(device).type == "cuda":
            if name == "tensor":
                self._wait("values copied from pageable memory")
            made = self._add(made, "device")
            self._run(name, [], [made])
            return made
        return self._add(made, "pinned") if pinned else made

    def _to(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        source = args[0]
        wanted = {"cpu": torch.device("cpu"), "cuda": CUDA}.get(name)
        rest = [CUDA if isinstance(a, torch.Tensor) and self._on_device(a) else a for a in args[1:]]
        for given in (*rest, kwargs.get("device")):
            if isinstance(given, str | torch.device) and wanted is None:
                wanted = torch.device(given)
        dtypes = [a for a in (*rest, kwargs.get("dtype")) if isinstance(a, torch.dtype)]
        changed = source.dtype if not dtypes else dtypes[0]
        was, goes = self._on_device(source), self._on_device(source) if wanted is None else wanted.type == "cuda"
        if was == goes:
            moved = source.to(changed, copy=kwargs.get("copy", False))
            if moved is source or not was:
                return moved
            moved = self._add(moved, "device")
            self._run("to", [source], [moved])
            return moved
        if goes:
            return self._copy_in(self._add(torch.empty_like(source, dtype=changed), "device"), source, kwargs)
        self._wait("values copied to the host")
        self._run("to the host", [source], [])
        self._host_knows()
        return source.to(changed, copy=True)

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "__setitem__":
            target, index, source = args
            with self:
                part = target[index]
            if not isinstance(source, torch.Tensor):
                func(*args)
                self._run("fill", [], [part] if self._on_device(part) else [])
                return None
            if part.untyped_storage()._cdata != target.untyped_storage()._cdata:
                return self._compute(func, name, args, kwargs)
            self._copy_between(part, source, {})
            return None
        rest = {"non_blocking": args[2]} if len(args) > 2 else kwargs
        return self._copy_between(args[0], args[1], rest)

    def _copy_between(self, target: torch.Tensor, source: torch.Tensor, kwargs: Any) -> torch.Tensor:
        to_device, from_device = self._on_device(target), self._on_device(source)
        if to_device and not from_device:
            return self._copy_in(target, source, kwargs)
        if from_device and not to_device:
            pinned = self.buffer_of(target)
            if pinned is None or not kwargs.get("non_blocking") or source.dtype != target.dtype:
                self._wait("values copied to the host")
                self._run("copy to the host", [source], [])
                self._host_knows()
            else:
                self._run("copy to the host", [source], [target])
            return target.copy_(source)
        if to_device:
            self._run("copy", [source], [target])
        return target.copy_(source)

    def _copy_in(self, target: torch.Tensor, source: torch.Tensor, kwargs: Any) -> torch.Tensor:
        """From the host to the device."""
        pinned = self.buffer_of(source)
        straight = source.dtype == target.dtype and source.is_contiguous() and target.is_contiguous()
        if pinned is None:
            self._wait("copied from pageable memory")
        elif not kwargs.get("non_blocking"):
            self._wait("a copy that blocks the host")
        elif not straight:
            self._wait("a copy that is converted or gathered in pageable memory first")
        self._run("copy from the host", [source] if pinned else [], [target])
        return target.copy_(source)

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if self._on_device(tensor)]
        if not on_device:
            for tensor in tensors:
                if name in ("numpy", "tolist") and self.buffer_of(tensor) is not None:
                    # What follows numpy() is written through it.
                    self.trace.run(name, HOST, [self.access(tensor, name == "numpy")])
            return func(*args, **kwargs)
        if name in WAITING or (name == "__getitem__" and _has_mask(args[1])):
            self._wait(name)
            self._run(name, on_device, [])
            self._host_knows()
            result = func(*args, **kwargs)
            return self._add(result, "device") if isinstance(result, torch.Tensor) else result
        strangers = [t for t in tensors if not self._on_device(t) and t.dim()]
        if strangers and name not in ("__getitem__", "__len__", "size", "stride"):
            raise RuntimeError(f"{name}: expected all tensors on one device, found cuda:0 and cpu")
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__iadd__", "__imul__", "__isub__")
        written = [args[0]] if in_place else [t for t in tree_leaves(kwargs.get("out")) if t is not None]
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        for tensor in new:
            self._add(tensor, "device")
        if new or written:  # else a view, a shape, or a number the host has
            self._run(name, on_device, [*new, *written])
        return result

    def _add(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._count += 1
        stream = self.streams.current.number
        buffer = Buffer(self._count, place, storage.nbytes(), stream, where())
        self._buffers[storage._cdata] = (StorageWeakRef(storage), buffer)
        if place == "device":
            self.allocations.append(buffer)
        return tensor

    def _run(self, name: str, read: Iterable[torch.Tensor], written: Iterable[torch.Tensor]) -> None:
        accesses = [self.access(tensor, False) for tensor in read] + [self.access(t, True) for t in written]
        self.trace.run(name, self.streams.current.number, accesses)

    def _wait(self, what: str) -> None:
        self.trace.find("wait", f"the host waits ({what})")

    def _host_knows(self) -> None:
        """The host has waited for the current stream."""
        self.trace.host_knows(self.streams.current.clock)

    def _on_device(self, tensor: torch.Tensor) -> bool:
        buffer = self.buffer_of(tensor)
        return buffer is not None and buffer.place == "device"

    @property
    def _record_stream(self) -> Any:
        def record_stream(tensor: torch.Tensor, stream: Any) -> None:
            buffer = self.buffer_of(tensor)
            assert buffer is not None
            if not self.streams.is_lost():
                buffer.recorded.add(stream.number)

        return record_stream

    def _collect(self) -> None:
        """Notice what has been freed."""
        for key in [key for key, (reference, _) in self._buffers.items() if reference.expired()]:
            self.trace.freed(self._buffers.pop(key)[1])


def _has_mask(index: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(index))
