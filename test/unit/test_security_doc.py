"""docs/security.md: every promise names what shows it, and all of that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/security.md").read_text()
NODE = re.compile(r"test/[\w/]+\.py(?:::\w+)*")
MAKE = re.compile(r"`make ([\w-]+)`")


def rows() -> list[list[str]]:
    """Cells of the tables' rows whose last column tells what shows them."""
    found = []
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE):
        table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
        if table and table[0][-1] == "shown by":
            found += table[2:]
    return found


def test_every_promise_names_what_shows_it() -> None:
    assert len(rows()) > 10
    unshown = [row for row in rows() if not NODE.search(row[-1]) and not MAKE.search(row[-1])]
    assert unshown == []


@pytest.mark.parametrize("node", sorted(set(NODE.findall(TEXT))))
def test_a_test_that_is_named_exists(node: str) -> None:
    file, *names = node.split("::")
    place: ast.AST = ast.parse((ROOT / file).read_text())
    for name in names:
        inside = {one.name: one for one in place.body if isinstance(one, ast.FunctionDef | ast.ClassDef)}  # type: ignore[attr-defined]
        assert name in inside, f"{file} has no {name}"
        place = inside[name]


@pytest.mark.parametrize("target", sorted(set(MAKE.findall(TEXT))))
def test_a_make_target_that_is_named_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
