"""Takes adapters that come as tensors: safetensors bytes, or what an engine's own script gives.

Over HTTP nothing is unpickled unless the server was told to trust it. What came is kept as a folder
(``adapters/spool.py``) and loaded from there as any other.
"""

from __future__ import annotations

import asyncio
import hashlib
import pickle
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec
import safetensors.torch
import torch
from sglang.srt.managers.io_struct import LoRAUpdateOutput
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from sglang_blocklora.adapters.spool import Incoming, SpoolFull
from sglang_blocklora.adapters.weights_file import WeightsFile
from sglang_blocklora.settings import Settings

from blocklora_patches.http.adapters import Adapters

# Weights are written and hashed in pieces of this size, in a thread: the event loop goes on with others.
PIECE_BYTES = 2**22
# Where weights that come alone carry their adapter_config.json.
CONFIG_KEY = "adapter_config"
SAFETENSORS = "safetensors"
# What bytes that are no adapter do to an unpickler.
UNPICKLING = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
BUCKET = "flattened_bucket"


class NotTaken(ValueError):
    """What came is no adapter."""


class Brought(msgspec.Struct, kw_only=True):
    """SGLang's body of ``/load_lora_adapter_from_tensors``, and ours in the last field.

    serialized_named_tensors  one entry of safetensors bytes where ``load_format`` is ``safetensors``; otherwise
                              SGLang's own form, one for each TP rank
    expected_checksums        sha256 in hex of each tensor's bytes
    load_inplace              vLLM's word for an update of an adapter that is loaded
    """

    lora_name: str
    config_dict: dict[str, Any]
    serialized_named_tensors: Sequence[bytes]
    load_format: str | None = None
    pinned: bool = False
    added_tokens_config: dict[str, int] | None = None
    expected_checksums: dict[str, str] | None = None
    load_inplace: bool = False


class Weights(msgspec.Struct, kw_only=True):
    """An adapter as it came: safetensors bytes, and what to do with them."""

    name: str
    config: dict[str, Any]
    data: bytes
    pinned: bool
    update: bool


async def read_body(client: Any) -> bytes:
    """A request's body. Raises ``NotTaken`` where it is longer than any adapter that could be kept."""
    limit = int(Settings.required().adapter_spool_gb * 2**30 * 2)  # base64 takes four bytes for three
    pieces, size = [], 0
    async for piece in client.stream():
        size += len(piece)
        if size > limit:
            raise NotTaken(f"The body is longer than {limit} bytes. See --adapter-spool-gb.")
        pieces.append(piece)
    return b"".join(pieces)


def decode(body: bytes) -> Brought:
    """A request's JSON, whose bytes are base64. Raises ``NotTaken``."""
    try:
        return msgspec.json.decode(body, type=Brought)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise NotTaken(f"The body is no adapter: {error}.") from error


def from_upstream(obj: Any, *, trusted: bool) -> Weights:
    """What a request of SGLang's or ours brings. Raises ``NotTaken``.

    trusted  whether it comes from the engine's own script
    """
    name = obj.lora_name
    if obj.added_tokens_config:
        raise NotTaken(f"adapter {name!r}: found added_tokens_config; expected none. New tokens are not supported.")
    if obj.load_format == SAFETENSORS:
        data = _only(name, obj.serialized_named_tensors)
    elif trusted or Settings.required().adapter_trust_pickle:
        data = safetensors.torch.save(_unpickled(name, obj.serialized_named_tensors, obj.load_format))
    else:
        raise NotTaken(
            f"adapter {name!r}: found tensors in SGLang's serialised form, a pickle, which can run code here; expected "
            f"safetensors bytes. Send serialized_named_tensors=[base64 of safetensors.torch.save(tensors)] with "
            f'load_format="{SAFETENSORS}", or PUT the bytes to /adapters/NAME (docs/rollouts.md); a server that shall '
            "trust its clients is started with --adapter-trust-pickle."
        )
    if obj.expected_checksums is not None:
        _check_sums(name, data, obj.expected_checksums)
    update = getattr(obj, "load_inplace", False)
    return Weights(name=name, config=obj.config_dict, data=data, pinned=bool(obj.pinned), update=update)


async def load(adapters: Adapters, weights: Weights) -> LoRAUpdateOutput:
    """Load an adapter whose bytes are here; SGLang's answer."""

    async def pieces() -> AsyncIterator[memoryview]:
        for start in range(0, len(weights.data), PIECE_BYTES):
            yield memoryview(weights.data)[start : start + PIECE_BYTES]

    return await receive(adapters, weights.name, pieces(), weights.config, weights.pinned, weights.update)


async def receive(
    adapters: Adapters,
    name: str,
    pieces: AsyncIterator[bytes | memoryview],
    config: Mapping[str, Any] | None,
    pinned: bool,
    update: bool,
) -> LoRAUpdateOutput:
    """Load an adapter whose safetensors bytes come in ``pieces``; SGLang's answer.

    config  its adapter_config.json; None: it is in the file's metadata
    """
    refusal = adapters.reason_not_to_name(name)  # asked again when all has come
    if refusal is not None:
        return LoRAUpdateOutput(success=False, error_message=refusal)
    try:
        with adapters.spool.receive() as incoming:
            await take(incoming, pieces)
            if config is None:
                config = await asyncio.to_thread(_config_inside, name, incoming)
            return await adapters.load_received(name, incoming, config, pinned, update)
    except (SpoolFull, NotTaken) as error:
        return LoRAUpdateOutput(success=False, error_message=f"{error}")
    except OSError as error:
        message = f"adapter {name!r}: its tensors cannot be kept ({error.strerror or error}). See --adapter-spool-dir."
        return LoRAUpdateOutput(success=False, error_message=message)


async def take(incoming: Incoming, pieces: AsyncIterator[bytes | memoryview]) -> None:
    """Write and hash all of ``pieces``, while the next ones come."""
    writing: asyncio.Future[Any] = asyncio.gather()
    waiting: list[bytes | memoryview] = []
    size = 0
    try:
        async for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size >= PIECE_BYTES:
                await writing
                writing = _taken(incoming, waiting)
                waiting, size = [], 0
    finally:
        await writing
    await _taken(incoming, waiting)


def _taken(incoming: Incoming, pieces: Sequence[bytes | memoryview]) -> asyncio.Future[Any]:
    return asyncio.gather(asyncio.to_thread(incoming.write, pieces), asyncio.to_thread(incoming.hash, pieces))


def _config_inside(name: str, incoming: Incoming) -> dict[str, Any]:
    try:
        file = WeightsFile(incoming.written())
    except ValueError as error:
        raise NotTaken(
            f"adapter {name!r}: found a body that cannot be read ({error}); expected a whole safetensors "
            "file. Send safetensors.torch.save(tensors, metadata)."
        ) from error
    file.close()
    try:
        return msgspec.json.decode(file.metadata.get(CONFIG_KEY, ""), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise NotTaken(
            f"adapter {name!r}: found no {CONFIG_KEY} in the file's metadata ({error}); expected the text of "
            f'adapter_config.json. Send safetensors.torch.save(tensors, {{"{CONFIG_KEY}": json.dumps(config)}}).'
        ) from error


def _only(name: str, payloads: Sequence[bytes]) -> bytes:
    if len(payloads) != 1:
        raise NotTaken(
            f"adapter {name!r}: found {len(payloads)} entries of serialized_named_tensors; expected one. Every TP rank "
            "takes its part of the same bytes."
        )
    return payloads[0]


def _unpickled(name: str, payloads: Sequence[bytes], load_format: str | None) -> dict[str, torch.Tensor]:
    """The tensors of SGLang's serialised form. Each TP rank's copy is opened, as its sender waits for that; all are
    equal.
    """
    try:
        found, *_ = [MultiprocessingSerializer.deserialize(payload) for payload in payloads]
        if load_format == BUCKET:
            bucket = FlattenedTensorBucket(flattened_tensor=found["flattened_tensor"], metadata=found["metadata"])
            found = dict(bucket.reconstruct_tensors())
        return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in dict(found).items()}
    except UNPICKLING as error:
        raise NotTaken(f"adapter {name!r}: its tensors cannot be deserialised: {error!r}") from error


def _check_sums(name: str, data: bytes, expected: Mapping[str, str]) -> None:
    found = {
        key: hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().data).hexdigest()
        for key, tensor in safetensors.torch.load(data).items()
    }
    wrong = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    if wrong:
        raise NotTaken(
            f"adapter {name!r}: {len(wrong)} of {len(expected)} tensors are not those of expected_checksums, the first "
            f"is {wrong[0]!r}. Send it again."
        )
