"""Loading on every TP rank or on none: what one rank found, and what all ranks make of it."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_blocklora.adapters.content_hash import content_hash, file_versions
from sglang_blocklora.adapters.errors import AdapterError, brief
from sglang_blocklora.adapters.files import unreadable
from sglang_blocklora.adapters.shard import AdapterShard, load_shard
from sglang_blocklora.adapters.spooled import named_as_spooled, spooled_hash
from sglang_blocklora.sharding.linears import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a TP rank tells the others of an adapter that it read, and what all of them make of it together.

    error         message of a refusal, or None
    slots         rows needed
    content_hash  sha256 in hex of the adapter's files, where it was asked for
    """

    error: str | None = None
    slots: int = 0
    content_hash: str = ""


@dataclass(frozen=True, kw_only=True)
class LocalShard:
    """What a TP rank read, which stays there: the shard, its packed image [layers, 2, slots, W], the image's sha256.

    Of an adapter that came as tensors, the content hash stands for that sha256.
    """

    shard: AdapterShard
    image: torch.Tensor
    image_digest: str


# What one TP rank found: what it tells, and what it keeps where that is no refusal.
Found = tuple[Report, LocalShard | None]


def read_adapter(
    name: str,
    path: str,
    spec: ModelSpec,
    max_rank: int,
    root: str | None,
    *,
    pin_memory: bool = False,
    hash_contents: bool = True,
) -> Found:
    """Read this TP rank's part of the adapter at ``path``. Never raises: every failure becomes a report.

    root           the folder that ``path`` must lie under once links are followed, or None
    pin_memory     whether the image lies in page-locked memory
    hash_contents  whether the whole adapter is read for its content hash; not for one that was loaded before
    Files that change meanwhile are a refusal. A rank that raised instead would leave the others without its answer.
    """
    try:
        folder = _checked_folder(name, path, root)
        versions = file_versions(folder)
        shard, image = load_shard(name, folder, spec, max_rank, pin_memory=pin_memory, known=not hash_contents)
        spooled = spooled_hash(folder)  # of bytes that nobody changes
        contents = (spooled or content_hash(folder)) if hash_contents else ""
        if file_versions(folder) != versions:
            raise _changed(name, path)
        local = LocalShard(shard=shard, image=image, image_digest=spooled or _digest(image))
        return Report(slots=shard.slots, content_hash=contents), local
    except AdapterError as error:
        return Report(error=str(error)), None
    except OSError as error:  # between two looks at it: each of them tells by itself what is missing
        gone = AdapterError(
            name, f"{path} that went away while it was read ({error.strerror})", "a folder that stays", "Load it again."
        )
        return Report(error=str(gone)), None
    except Exception as error:
        logger.exception("adapter %r: loading failed on TP rank %d", name, spec.tp_rank)
        message = f"adapter {name!r}: {type(error).__name__} while loading on TP rank {spec.tp_rank}: {error}"
        return Report(error=message), None


def merge(name: str, path: str, reports: Sequence[Report]) -> Report:
    """What all TP ranks decide, given every rank's report in rank order.

    The first refusal, else the largest size. Ranks that read other contents than TP rank 0 are a refusal too: the files
    were written while they were read.
    """
    for report in reports:
        if report.error is not None:
            return report
    if len({report.content_hash for report in reports}) > 1:
        return Report(error=str(_changed(name, path)))
    return Report(slots=max(report.slots for report in reports), content_hash=reports[0].content_hash)


def _changed(name: str, path: str) -> AdapterError:
    found = f"files in {path} that changed while they were read"
    return AdapterError(name, found, "an adapter that stays as it is", "Load it again once it is written.")


def _digest(image: torch.Tensor) -> str:
    return hashlib.sha256(image.view(torch.uint8).numpy().data).hexdigest()


def _checked_folder(name: str, path: str, root: str | None) -> Path:
    if "://" in path:
        raise AdapterError(
            name,
            f"the URL {path}",
            "a folder: --lora-paths takes nothing else",
            "Load it by a request, or name it below an --adapter-dir (docs/sources.md).",
        )
    folder = _real(name, Path(path))
    if named_as_spooled(folder) and not os.path.isdir(folder):
        raise AdapterError(
            name,
            f"no folder {folder}",
            "what came as tensors, on the node of every TP rank",
            "With several nodes give --adapter-spool-dir a file system that all of them reach.",
        )
    if root is not None and not folder.is_relative_to(root):
        raise AdapterError(
            name,
            f"path {path} (which is {folder})",
            f"a folder below --adapter-root {root}",
            "Move the adapter there; links that lead out of the root are not followed.",
        )
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
        files = list(folder.iterdir()) if is_folder and root is not None else []
    except PermissionError as error:
        raise unreadable(name, folder, error) from error
    except OSError:  # missing, or a name that is too long
        is_folder = False
    if not is_folder:
        raise AdapterError(
            name, f"no folder {folder}", "a local PEFT adapter folder", "Download the adapter and give its folder."
        )
    if root is not None:
        for file in files:
            real = _real(name, file)
            if not real.is_relative_to(root):
                raise AdapterError(
                    name,
                    f"{file}, a link to {real}",
                    f"files below {root} (--adapter-root, or an --adapter-dir)",
                    "Copy the file into the adapter's folder.",
                )
    return folder


def _real(name: str, path: Path) -> Path:
    """``path`` with links followed, whether or not there is something."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # NUL, half a surrogate pair, a loop of links
        raise AdapterError(
            name, f"a path that cannot be: {brief(str(path))}", "a path of a folder", "Give another path."
        ) from error
