"""Reads parts of a safetensors file, with ``pread``.

Not through a memory map: there a file that is cut short while it is read (a trainer that saves over it) is not an error
but a SIGBUS, which ends the server.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import torch

from sglang_blocklora.adapters.errors import brief
from sglang_blocklora.adapters.files import open_regular

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LENGTH_BYTES = 8  # of the header's length, little endian
MAX_HEADER_BYTES = 8 * 2**20  # an entry takes about 150 bytes: 50,000 tensors
# Rows shorter than a page are read whole: the file system reads whole pages whatever is asked of it.
PAGE_BYTES = 4096


class StoredTensor(NamedTuple):
    """``dtype`` is the format's name (a key of ``DTYPES``, or one that cannot be read); ``start`` is a file offset."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class _Entry(msgspec.Struct):
    """What the header says of one tensor; offsets count from the header's end."""

    dtype: str
    shape: Annotated[list[int], msgspec.Meta(max_length=8)]
    data_offsets: tuple[int, int]


class WeightsFile:
    """``tensors`` by name and ``metadata``, from the header. Holds a file descriptor until ``close``.

    Raises ``OSError`` for what cannot be read, ``ValueError`` for what is no safetensors file or not a whole one;
    safetensors itself takes no more.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path)
        try:
            self.tensors = self._header(os.fstat(self._file).st_size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._file)

    def _header(self, file_bytes: int) -> dict[str, StoredTensor]:
        length = int.from_bytes(self._read_bytes(0, LENGTH_BYTES), "little")
        if length > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {file_bytes}")
        try:
            entries = msgspec.json.decode(self._read_bytes(LENGTH_BYTES, length), type=dict[str, msgspec.Raw])
            metadata = entries.pop("__metadata__", msgspec.Raw(b"{}"))
            self.metadata = msgspec.json.decode(metadata, type=dict[str, str])
            header = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in entries.items()}
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"the header cannot be understood ({error})") from error
        first = LENGTH_BYTES + length
        stored = {name: _stored(name, entry, first) for name, entry in header.items()}
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
            if entry.data_offsets[0] != end:
                raise ValueError(f"the header's entry of {brief(name)} does not start where the one before it ends")
            end = entry.data_offsets[1]
        if first + end != file_bytes:
            raise ValueError(f"the header's tensors end at byte {first + end} of a file of {file_bytes} bytes")
        return stored

    def read(self, name: str, rows: slice | None, columns: slice | None) -> torch.Tensor:
        """Part of a matrix [rows, columns]; half-open ranges within its shape, None for all."""
        stored = self.tensors[name]
        dtype = DTYPES[stored.dtype]
        height, width = stored.shape
        top, bottom = (rows.start, rows.stop) if rows else (0, height)
        left, right = (columns.start, columns.stop) if columns else (0, width)
        row_bytes, piece_bytes = width * dtype.itemsize, (right - left) * dtype.itemsize
        if piece_bytes == row_bytes or row_bytes < PAGE_BYTES:
            data = self._read_bytes(stored.start + top * row_bytes, (bottom - top) * row_bytes)
            return _tensor(data, dtype).view(bottom - top, width)[:, left:right]
        data = bytearray((bottom - top) * piece_bytes)
        for row in range(bottom - top):
            piece = memoryview(data)[row * piece_bytes : (row + 1) * piece_bytes]
            self._fill(piece, stored.start + (top + row) * row_bytes + left * dtype.itemsize)
        return _tensor(data, dtype).view(bottom - top, right - left)

    def _read_bytes(self, start: int, count: int) -> bytearray:
        data = bytearray(count)
        self._fill(memoryview(data), start)
        return data

    def _fill(self, data: memoryview, start: int) -> None:
        """Read as many bytes as ``data`` takes, from file offset ``start``."""
        done = 0
        while done < len(data):
            got = os.preadv(self._file, [data[done:]], start + done)
            if got == 0:
                raise OSError(f"the file ends at byte {start + done}, {len(data) - done} bytes early")
            done += got


def _tensor(data: bytearray, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _stored(name: str, entry: _Entry, first: int) -> StoredTensor:
    """A header's entry, checked; ``first`` is the file offset of the first tensor's bytes."""
    start, stop = entry.data_offsets
    size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else stop - start
    if not (0 <= start <= stop and min(entry.shape, default=0) >= 0 and size == stop - start):
        raise ValueError(f"the header's entry of {brief(name)} contradicts itself")
    return StoredTensor(entry.dtype, tuple(entry.shape), first + start)
