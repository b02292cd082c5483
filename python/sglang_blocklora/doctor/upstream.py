"""Checks the installed SGLang as a start does: its release, our contract with it, the hooks, and the flags."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, get_args

from blocklora_patches.releases import contract
from blocklora_patches.releases.fail_closed import fail_closed

from sglang_blocklora import SGLANG_VERSIONS, cpu_only, launch_server
from sglang_blocklora.doctor.finding import Asked, Finding, fault, ok, skipped
from sglang_blocklora.settings import Settings

Part = Literal["server", "frontend"]
PARTS: tuple[Part, ...] = get_args(Part)
CONTRACT, HOOKS, FLAGS, MEMORY = "contract", "hooks", "flags", "adapter memory"
AGAIN = "Install SGLang again (pip install --force-reinstall --no-deps sglang=={})."
ACCEPT = "--accept-unknown-sglang"
MISSING = "not installed"


def check(asked: Asked) -> Iterator[Finding]:
    """The release, both parts of the contract, hooks, flags, memory, in this order; after a misfit no more."""
    cpu_flags = cpu_only.prepare(launch_server.rank_count(asked.launch_flags))  # before SGLang is imported
    release = installed(ACCEPT in asked.launch_flags)
    yield release
    if release.found == MISSING:
        yield skipped(CONTRACT, "there is nothing to compare")
        return
    faults = int(release.result == "fault")
    for part in PARTS:
        for finding in misfits(part):
            faults += finding.result == "fault"
            yield finding
    if faults:
        yield skipped(HOOKS, "SGLang does not fit")
        yield skipped(FLAGS, "SGLang does not fit")
        yield skipped(MEMORY, "SGLang does not fit")
        return
    yield from start(asked, cpu_flags)


def installed(accept_unknown: bool) -> Finding:
    """Whether the release is one that is tested, or is accepted though it is not."""
    advice = f"pip install sglang=={SGLANG_VERSIONS[-1]}"
    try:
        found = version("sglang")
    except PackageNotFoundError:
        return fault("SGLang", MISSING, advice)
    if found in SGLANG_VERSIONS:
        return ok("SGLang", found)
    told = f"{found}; tested: {', '.join(SGLANG_VERSIONS)}"
    return (
        ok("SGLang", told) if accept_unknown else fault("SGLang", told, f"{advice}, or {ACCEPT} where nothing misfits")
    )


def misfits(name: Part) -> Iterator[Finding]:
    """What of the installed SGLang is not as the contract says of its release, or of the last one if it is unknown."""
    release = contract.compared_with()
    part, what = getattr(contract.read(release), name), f"{CONTRACT}, {name}"
    wrong = list(contract.misfits(part))
    yield from (fault(what, each, AGAIN.format(release)) for each in wrong)
    if not wrong:
        attributes = sum(map(len, part.attributes.values()))
        yield ok(what, f"{len(part.symbols)} symbols and {attributes} attributes are as expected")


def start(asked: Asked, cpu_flags: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """What may refuse a start with these flags before a weight is read."""
    try:
        settings, argv = launch_server.parse(asked.launch_flags)
    except SystemExit as refusal:
        yield skipped(HOOKS, "flags are refused")
        yield fault(FLAGS, str(refusal), "Drop or change what it names.")
        yield skipped(MEMORY, "flags are refused")
        return
    with settings.exported():
        advice = "Remove the plugin that it names, or install SGLang and sglang-blocklora again."
        yield attempt(HOOKS, put_hooks_in_place, "in place, and our plugin is called in every process", advice)
        if asked.model is None:
            yield skipped(FLAGS, "of ours they are understood; for the rest name a model (--model FOLDER)")
            yield skipped(MEMORY, "it is chosen for a model")
            return

        rehearsed: list[tuple[Settings, list[str]]] = []

        def rehearse() -> None:
            with fail_closed():
                from blocklora_patches.launch import rehearse
            rehearsed.append(rehearse(launch_server.with_defaults(argv, cpu_flags)))

        yield attempt(FLAGS, rehearse, "nothing is refused before weights are read", "Drop or change what it names.")
        yield ok(MEMORY, memory(*rehearsed[0])) if rehearsed else skipped(MEMORY, "flags are refused")


def memory(settings: Settings, reasons: Sequence[str]) -> str:
    """Where adapters would live; ``reasons`` are what decides against the KV cache's slots where the choice is ours."""
    if settings.adapter_memory != "static" and not reasons:
        return "unified: the KV cache's slots"
    size = f"static: an arena of {settings.adapter_memory_mb} MiB on each TP rank"
    return f"{size}, because the slots cannot hold adapters with {', '.join(reasons)}" if reasons else size


def put_hooks_in_place() -> None:
    """As a start does. ``SystemExit`` where one cannot be, or where SGLang would not call our plugin."""
    with fail_closed():
        from blocklora_patches import launch
    launch.put_hooks_in_place()
    launch.refuse_to_be_left_out()


def attempt(what: str, action: Callable[[], None], found: str, advice: str) -> Finding:
    """``found`` unless ``action`` is refused, in whatever way SGLang or we do that."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            action()
    except SystemExit as refusal:  # argparse writes what is wrong, and ends with a number
        last = told.getvalue().strip().rpartition("\n")[2]
        return fault(what, refusal.code if isinstance(refusal.code, str) else last, advice)
    except ValueError as error:
        return fault(what, str(error), advice)
    except Exception as error:
        return fault(what, f"{type(error).__name__}: {error}", advice)
    return ok(what, found)
