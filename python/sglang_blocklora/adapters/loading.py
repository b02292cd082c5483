"""Loading on every TP rank or on none: what one rank found, and what all ranks make of it."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_blocklora.adapters.content_hash import content_hash, file_versions
from sglang_blocklora.adapters.errors import AdapterError, brief
from sglang_blocklora.adapters.shard import AdapterShard, load_shard
from sglang_blocklora.sharding.linears import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What one TP rank, or all of them together, made of an adapter.

    error         message of a refusal, or None
    slots         rows needed
    shard, image  stay on their rank
    image_digest  sha256 in hex of the image, which stays on its rank too
    content_hash  sha256 in hex of the adapter's files; TP rank 0 computes it, the only read that is not of its own part
    versions      of the files as they were before they were read
    """

    error: str | None
    slots: int
    shard: AdapterShard | None = None
    image: torch.Tensor | None = None
    image_digest: str = ""
    content_hash: str = ""
    versions: tuple[tuple[int, int, int], ...] = ()

    def to_tell(self) -> Outcome:
        """What the TP ranks tell each other."""
        return dataclasses.replace(self, shard=None, image=None)

    def rechecked(self, name: str, path: str) -> Outcome:
        """The outcome, refused where the files at ``path`` are not those of before.

        Asked once every TP rank has read its part: then all read the same bytes, or this refuses them.
        """
        try:
            same = file_versions(Path(path).resolve()) == self.versions
        except OSError:
            same = False
        if same:
            return self
        found = f"files in {path} that changed while they were read"
        error = AdapterError(name, found, "an adapter that stays as it is", "Load it again once it is written.")
        return Outcome(str(error), 0)

    def checked(self, name: str, reason: str | None) -> Outcome:
        """The outcome, refused with ``reason`` if there is one."""
        if reason is None:
            return self
        advice = "Start the server with a larger --adapter-memory-mb, or unload or unpin others."
        return Outcome(f"adapter {name!r}: {reason}. {advice}", 0)


def attempt(
    name: str,
    path: str,
    spec: ModelSpec,
    max_rank: int,
    root: str | None,
    *,
    pin_memory: bool = False,
    hash_contents: bool = True,
) -> Outcome:
    """Load this TP rank's shard of the adapter at ``path``; every failure becomes an outcome.

    root           the folder that ``path`` must lie under once links are followed, or None
    pin_memory     whether the image lies in page-locked memory
    hash_contents  whether TP rank 0 reads the whole adapter for its content hash; not for one that was loaded before
    A rank that raised instead would leave the others waiting for its answer for ever.
    """
    try:
        folder = _checked_folder(name, path, root)
        versions = file_versions(folder)
        known = not hash_contents
        shard, image = load_shard(name, folder, spec, max_rank, pin_memory=pin_memory, known=known)
        contents = content_hash(folder) if hash_contents and spec.tp_rank == 0 else ""
        return Outcome(None, shard.slots, shard, image, _digest(image), contents, versions)
    except AdapterError as error:
        return Outcome(str(error), 0)
    except Exception as error:
        logger.exception("adapter %r: loading failed on TP rank %d", name, spec.tp_rank)
        return Outcome(f"adapter {name!r}: {type(error).__name__} while loading on TP rank {spec.tp_rank}: {error}", 0)


def _digest(image: torch.Tensor) -> str:
    return hashlib.sha256(image.view(torch.uint8).numpy().data).hexdigest()


def _checked_folder(name: str, path: str, root: str | None) -> Path:
    folder = _real(name, Path(path))
    if root is not None and not folder.is_relative_to(root):
        raise AdapterError(
            name,
            f"path {path} (which is {folder})",
            f"a folder below --adapter-root {root}",
            "Move the adapter there; links that lead out of the root are not followed.",
        )
    if not os.path.isdir(folder):  # Path.is_dir raises where a part is too long
        raise AdapterError(
            name, f"no folder {folder}", "a local PEFT adapter folder", "Download the adapter and give its folder."
        )
    if root is not None:
        for file in folder.iterdir():
            real = _real(name, file)
            if not real.is_relative_to(root):
                raise AdapterError(
                    name,
                    f"{file}, a link to {real}",
                    f"files below --adapter-root {root}",
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


def merge(outcomes: Sequence[Outcome]) -> Outcome:
    """What all TP ranks decide, given every rank's outcome in rank order: the first refusal, else the largest size."""
    for outcome in outcomes:
        if outcome.error is not None:
            return outcome
    return Outcome(None, max(outcome.slots for outcome in outcomes), content_hash=outcomes[0].content_hash)
