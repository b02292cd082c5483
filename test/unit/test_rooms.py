"""The folders of ``python/`` and ``patches/`` are rooms: they import one way only, and so do the three roots."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from benchmark.record import REPOSITORY

PACKAGES = {
    "kernels": REPOSITORY / "kernels/blocklora_kernels",
    "python": REPOSITORY / "python/sglang_blocklora",
    "patches": REPOSITORY / "patches/blocklora_patches",
}


def imported(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # ``from package import module`` names the module in the list
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(package: Path) -> dict[str, set[str]]:
    """Room -> rooms of the same package that it imports. A file beside the folders is a room of its own."""
    graph: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for name in imported(path):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if (
                top == package.name
                and other != room
                and (package / other).exists() | (package / f"{other}.py").exists()
            ):
                graph.setdefault(room, set()).add(other)
    return graph


@pytest.mark.parametrize("root", PACKAGES)
def test_no_room_imports_another_in_a_circle(root: str) -> None:
    graph = rooms(PACKAGES[root])
    assert graph or root == "kernels", "nothing was found"
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"rooms of {root}/ import in a circle: {' -> '.join(error.args[1])}")
    assert len(order) == len(set(order))


def test_the_ground_floor_knows_no_files_and_no_memory() -> None:
    assert rooms(PACKAGES["python"]).get("sharding", set()) == set()


RELEASE_ROOMS = ("releases", "porting", "doctor")  # the last one tells which it is
_ASKING = ("SGLANG_VERSIONS", "compared_with")


def asks_for_the_release(path: Path) -> list[str]:
    """What in a file of ours could tell SGLang's releases apart."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    found = [call for call in calls if [getattr(one, "value", None) for one in call.args] == ["sglang"]]
    found += [node for node in nodes if isinstance(node, ast.Attribute) and node.attr in ("__version__", "version")]
    asked = [ast.unparse(node) for node in found]
    names = {name.rpartition(".")[2] for name in imported(path)}
    return asked + sorted(name for name in names if name in _ASKING or name.startswith("v0_"))


def test_only_these_rooms_ask_which_release_sglang_is() -> None:
    """The others take what differs from ``releases/current.py``."""
    files = [path for root in ("python", "patches") for path in PACKAGES[root].rglob("*.py")]
    asking = {str(path.relative_to(REPOSITORY)): asks_for_the_release(path) for path in files}
    asking = {path: found for path, found in asking.items() if found}
    assert {path for path in asking if path.split("/")[2] not in RELEASE_ROOMS} == set()
    assert len(asking) > 3, "the question is not recognised any more"
