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
