"""Checks that the installed SGLang is as we need it: what we use of it must look as a release's data file says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec
from sglang_blocklora import SGLANG_VERSIONS

from blocklora_patches.releases.look import has_attribute, parameters, resolve

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind of process uses of a release.

    symbols     dotted path -> names of parameters; None: it must only exist
    attributes  class -> attributes that its objects must have
    """

    symbols: dict[str, str | None]
    attributes: dict[str, list[str]]


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """What we use of one release, by the processes that use it.

    server    processes of a server or an engine
    frontend  a user's own process, in which the language runs: nothing of the server is imported there
    """

    server: Part
    frontend: Part


def file_of(release: str) -> Path:
    """Where the contract with ``release`` is, or would be."""
    return FOLDER / f"{release.replace('.', '_')}.json"


def read(release: str) -> Contract:
    """The contract with ``release``, which has one."""
    return msgspec.json.decode(file_of(release).read_bytes(), type=Contract)


def compared_with() -> str:
    """The release that the installed SGLang is taken for: itself, or the last one that is tested."""
    installed = version("sglang")
    return installed if installed in SGLANG_VERSIONS else SGLANG_VERSIONS[-1]


@cache
def check(part: Literal["server", "frontend"], accept_unknown: bool = False) -> None:
    """``SystemExit`` naming all of ``part`` that misfits in the installed SGLang.

    accept_unknown  go on with a release that was never tested, where nothing misfits; else that is a ``SystemExit`` too
    """
    installed, release = version("sglang"), compared_with()
    wrong = "".join(f"\n  {line}" for line in misfits(getattr(read(release), part)))
    tested = f"sglang-blocklora is tested with SGLang {', '.join(SGLANG_VERSIONS)}"
    instead = f"Install one of these (pip install sglang=={SGLANG_VERSIONS[-1]}), or start stock SGLang."
    if wrong and release == installed:
        raise SystemExit(
            f"sglang-blocklora does not fit the installed SGLang {installed} although its version is right (was it "
            f"edited?):{wrong}\n"
            f"Install it again (pip install --force-reinstall --no-deps sglang=={installed}) or start stock SGLang."
        )
    if wrong:
        raise SystemExit(f"{tested}, and does not fit the installed SGLang {installed}:{wrong}\n{instead}")
    if release != installed and not accept_unknown:
        raise SystemExit(
            f"{tested}, found {installed}. All that it uses looks there as in {release}; whether it does the same is "
            f"not known. {instead} To go on at your own risk: --accept-unknown-sglang."
        )
    if release != installed:
        logger.warning("%s; %s is unknown and taken for %s.", tested, installed, release)


def misfits(part: Part) -> Iterator[str]:
    """One line for each symbol or attribute of ``part`` that is not as expected."""
    for path, expected in part.symbols.items():
        try:
            found = resolve(path)
        except (ImportError, AttributeError) as error:
            yield f"{path}: expected, and not found ({error})"
            continue
        if expected is not None and (names := parameters(found)) != expected:
            yield f"{path}: expected parameters ({expected}), found {names if names is None else f'({names})'}"
    for path, names in part.attributes.items():
        try:
            owner = resolve(path)
        except (ImportError, AttributeError) as error:
            yield f"{path}: expected, and not found ({error})"
            continue
        if not isinstance(owner, type):
            yield f"{path}: expected a class, found {type(owner).__name__}"
            continue
        yield from (f"{path}.{name}: expected, and not found" for name in names if not has_attribute(owner, name))
