"""What the documents name exists: files, headings that links lead to, modules of commands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from benchmark.record import REPOSITORY

DOCUMENTS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmark/**/*.md", "research/*.md")
    for path in REPOSITORY.glob(pattern)
    if path.name != "CHANGELOG.md"  # it tells of the past
)
ROOTS = ("python", "patches", "kernels", "testing", "test", "benchmark", "research", "examples", "docs", "deploy")


def prose(document: str) -> str:
    """The document without what raw results give, which tells of the commit it was measured at."""
    text = (REPOSITORY / document).read_text()
    return re.sub(r"<!-- begin (\S+) -->.*?<!-- end \1 -->", "", text, flags=re.DOTALL)


def files() -> list[str]:
    """Every file and folder of ours, from the repository's root; folders end with a slash."""
    found = [path for root in ROOTS for path in (REPOSITORY / root, *(REPOSITORY / root).rglob("*"))]
    found += REPOSITORY.glob("*.md")
    return [f"/{path.relative_to(REPOSITORY).as_posix()}{'/' if path.is_dir() else ''}" for path in found]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    """Whole paths, or the end of one: ``scheduling/order.py``."""
    names = re.findall(r"`(?:python )?((?:[\w.-]+/)*[\w-]+(?:\.py|\.md|\.sh|/))[^`]*`", prose(document))
    own = [name for name in names if not name.startswith("sglang/")]
    known = "".join(f"{name}\n" for name in files())
    assert [name for name in own if f"/{name}\n" not in known] == []


def headings(text: str) -> set[str]:
    """Anchors that GitHub gives the headings of a Markdown text."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = REPOSITORY / document
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in headings(target.read_text())):
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_of_commands_exist(document: str) -> None:
    modules = set(re.findall(r"python -m ([a-z]\w*(?:\.\w+)*)", prose(document)))
    ours = {module for module in modules if not module.startswith("sglang.")}
    assert {module for module in ours if importlib.util.find_spec(module) is None} == set()


def test_every_room_is_in_the_architecture() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text()
    roots = ("python/sglang_blocklora", "patches/blocklora_patches")
    rooms = {path.parent.name for root in roots for path in (REPOSITORY / root).glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in text} == set()


def test_a_stale_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    monkeypatch.setattr(f"{__name__}.REPOSITORY", tmp_path)
    (tmp_path / "python").mkdir()
    (tmp_path / "python/here.py").touch()
    (tmp_path / "page.md").write_text("`here.py` [this](#title)\n# Title\n")
    test_files_that_are_named_exist("page.md")
    test_links_lead_somewhere("page.md")
    for text, check in (("`gone/here.py`", test_files_that_are_named_exist), ("[x](#gone)", test_links_lead_somewhere)):
        (tmp_path / "page.md").write_text(text)
        with pytest.raises(AssertionError):
            check("page.md")
