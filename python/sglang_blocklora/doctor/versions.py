"""Checks the versions of Python and of packages against what those that need them ask for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from sglang_blocklora.doctor.finding import Asked, Finding, fault, ok, skipped

OURS = "sglang-blocklora"


def check(asked: Asked) -> Iterator[Finding]:
    """Nothing is imported but torch, which says whether there is a device for what only a GPU uses."""
    try:
        needed = SpecifierSet(metadata(OURS)["Requires-Python"])
    except PackageNotFoundError:
        advice = "Install it into this Python (pip install .): SGLang's processes find it by its entry point."
        yield fault(OURS, f"not installed in {sys.prefix}", advice)
        return
    yield ok(OURS, version(OURS))
    yield python(needed)
    yield package("torch", "sglang")
    yield package("triton", "torch")
    import torch

    for name in ("flashinfer-python", "sglang-kernel"):
        if torch.accelerator.is_available():
            yield package(name, "sglang")
        else:
            yield skipped(name, "only a GPU uses it")


def python(needed: SpecifierSet) -> Finding:
    """Whether this Python is one that ``needed`` admits."""
    found = sys.version.partition(" ")[0]
    if needed.contains(found, prereleases=True):
        return ok("Python", found)
    return fault("Python", f"{found}; {OURS} needs {needed}", "Use another Python.")


def package(name: str, needed_by: str) -> Finding:
    """Whether ``name`` is there in a version that the package ``needed_by`` asks for."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return fault(name, "not installed", f"pip install '{name}{asked_for(name, needed_by)}'")
    wanted = asked_for(name, needed_by)
    if wanted.contains(found, prereleases=True):
        return ok(name, found)
    return fault(name, f"{found}; {needed_by} {version(needed_by)} needs {wanted}", f"pip install '{name}{wanted}'")


def asked_for(name: str, needed_by: str) -> SpecifierSet:
    """Versions of ``name`` that ``needed_by`` asks for; any where it does not, or is not installed."""
    try:
        all_needed = map(Requirement, requires(needed_by) or ())
    except PackageNotFoundError:
        return SpecifierSet()
    for one in all_needed:
        if canonicalize_name(one.name) == name and (one.marker is None or one.marker.evaluate({"extra": ""})):
            return one.specifier
    return SpecifierSet()
