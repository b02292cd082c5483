"""Tells with every answer which contents of an adapter gave it, and refuses requests that demand others.

An adapter's version is the beginning of its content hash. Which one answers is decided where a request gets its
adapter's id, and stays.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.adapters.content_hash import version

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http import answers

# Of requests: the version that must answer. Of answers: those that did, in the order of the prompts.
HEADER = "X-Adapter-Version"
FIELD = "adapter_version"


class VersionConflict(answers.Refusal):
    """Answered with a 409 and the version that is current."""

    def __init__(self, demanded: str, current: str | None) -> None:
        told = "the base model, which has none" if current is None else f"version {current}"
        detail = f"The request demands adapter version {demanded}; it would be answered by {told}."
        super().__init__(409, detail, {HEADER: current} if current is not None else None)


def decided(request: Any, hashes: Sequence[str | None]) -> None:
    """It is decided who answers an HTTP request. Raises ``VersionConflict`` where it demands others.

    hashes  content hashes of the adapters, None for the base model; a request demands a version or a full hash
    """
    demanded = request.headers.get(HEADER)
    for content_hash in hashes if demanded is not None else ():
        if content_hash is None or demanded.lower() not in (content_hash, version(content_hash)):
            raise answers.refused(request, VersionConflict(demanded, content_hash and version(content_hash)))
    _note(request, [version(one) for one in hashes if one is not None])


def note(request: Any, loaded: str | None) -> None:
    """Have the answer to a load carry the version that was loaded."""
    _note(request, [] if loaded is None else [loaded])


def _note(request: Any, versions: Sequence[str]) -> None:
    if versions:
        request.state.blocklora_versions = ", ".join(dict.fromkeys(versions))
        answers.add_header(request, HEADER, request.state.blocklora_versions)


async def told(pieces: AsyncIterator[Any], content_hash: str) -> AsyncIterator[Any]:
    """``pieces`` of the answer to one prompt, each with the version that gave it."""
    async with aclosing(pieces):  # type: ignore[type-var]
        async for piece in pieces:
            piece["meta_info"][FIELD] = version(content_hash)
            yield piece


async def _handle_request(original: Any, self: Any, request: Any, raw_request: Any) -> Any:
    answer = await original(self, request, raw_request)
    versions = getattr(raw_request.state, "blocklora_versions", None)
    if versions and "metadata" in getattr(type(answer), "model_fields", ()):
        answer.metadata = {**(answer.metadata or {}), FIELD: versions}
    return answer


HOOKS = (
    Hook(
        "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
        _handle_request,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream's answers tell the base model's version only.",
        retire_when="upstream puts more of meta_info into OpenAI's answers",
    ),
)
