"""Checks that an SGLang release is as we need it: what we use of it must look as its data file says."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec

from blocklora_patches.releases.look import has_attribute, parameters, resolve

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


def releases() -> list[str]:
    """SGLang releases that have a contract."""
    return sorted(file.stem.replace("_", ".") for file in FOLDER.glob("*.json"))


@cache
def check(part: Literal["server", "frontend"]) -> None:
    """``SystemExit`` unless the installed SGLang has a contract, or naming all of ``part`` that misfits."""
    installed, known = version("sglang"), releases()
    if installed not in known:
        raise SystemExit(
            f"sglang-blocklora works with sglang=={' or '.join(known)} only, found {installed}. "
            f"Install that release (pip install sglang=={known[-1]}), or start stock SGLang."
        )
    wrong = list(misfits(getattr(read(installed), part)))
    if wrong:
        raise SystemExit(
            f"sglang-blocklora does not fit the installed SGLang {installed} although its version is right (was it "
            "edited?):\n  "
            + "\n  ".join(wrong)
            + f"\nInstall it again (pip install --force-reinstall --no-deps sglang=={installed}) or start stock SGLang."
        )


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
