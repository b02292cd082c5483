"""Names of adapters in folders, and one load for many requests. Nothing here imports SGLang."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import torch
from blocklora_testing.toy import ToyModel, write_adapter
from hypothesis import given
from hypothesis import strategies as st
from sglang_blocklora import launch_server
from sglang_blocklora.adapters.loading import read_adapter
from sglang_blocklora.naming.folders import AdapterFolders
from sglang_blocklora.naming.single_flight import SingleFlight
from sglang_blocklora.settings import Settings


def make_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    for place in ("one/sql", "one/both", "two/both", "two/legal", "two/nested/deep", "outside"):
        make_adapter(tmp_path / place)
    (tmp_path / "one" / "empty").mkdir()
    (tmp_path / "one" / "file").write_text("")
    make_adapter(tmp_path / "one" / ".hidden")
    (tmp_path / "one" / "alias").symlink_to("sql")
    (tmp_path / "one" / "escape").symlink_to(tmp_path / "outside")
    (tmp_path / "one" / "loop").symlink_to("loop")
    (tmp_path / "one" / "self").symlink_to(".")
    return [tmp_path / "one", tmp_path / "two"]


def test_names_are_folders_directly_below_a_root_and_the_first_root_wins(roots: list[Path]) -> None:
    one, two = roots
    assert AdapterFolders(roots).all() == {
        "alias": one / "sql",
        "both": one / "both",
        "legal": two / "legal",
        "sql": one / "sql",
    }
    assert AdapterFolders(roots[::-1]).find("both") == two / "both"
    assert AdapterFolders(()).all() == {}


NOBODY = """.. ../outside ../one/sql /etc sql/ ./sql nested/deep nested .hidden escape loop self empty file nobody ~"""


@pytest.mark.parametrize("name", [*NOBODY.split(), "", ".", "sql\0", "\0", "x" * 5000, "\ud800", "sql/../sql"])
def test_other_names_are_nobody(roots: list[Path], name: str) -> None:
    assert AdapterFolders(roots).find(name) is None


def test_absolute_paths_are_no_names_even_inside(roots: list[Path]) -> None:
    assert AdapterFolders(roots).find(str(roots[0] / "sql")) is None


@given(st.text())
def test_no_name_raises_or_leaves_the_roots(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.getbasetemp() / "names"
    root.mkdir(exist_ok=True)
    found = AdapterFolders([root]).find(name)
    assert found is None or found.parent == root.resolve()


def test_a_root_that_went_and_a_name_that_no_answer_can_carry_hide_no_others(roots: list[Path]) -> None:
    before = AdapterFolders(roots).all()
    make_adapter(Path(os.fsdecode(os.fsencode(roots[0]) + b"/\xff")))
    assert before
    assert AdapterFolders([*roots, roots[0] / "gone"]).all() == before


def test_an_adapter_that_comes_later_is_found(roots: list[Path]) -> None:
    folders = AdapterFolders(roots)
    assert folders.find("new") is None
    make_adapter(roots[1] / "new")
    assert folders.find("new") == roots[1] / "new"


def test_folders_are_settings_and_must_be_reachable(roots: list[Path]) -> None:
    flags = [f"--adapter-dir={root}" for root in roots]
    settings, _ = launch_server.parse([*flags, "--adapter-root", str(roots[0].parent)])
    with settings.exported():
        active = Settings.active()
    assert active == settings
    assert active is not None
    assert active.adapter_folders.find("legal") == roots[1] / "legal"
    with pytest.raises(SystemExit, match="nowhere is not a folder"):
        launch_server.parse(["--adapter-dir", "/nowhere"])
    with pytest.raises(SystemExit, match="is not below --adapter-root"):
        launch_server.parse(["--adapter-root", str(roots[0]), "--adapter-dir", str(roots[1])])


def test_nothing_below_a_root_leads_out_of_it(tmp_path: Path) -> None:
    """A file that is a link would read what others keep: an adapter below a root keeps to that root."""
    model = ToyModel(layers=1)
    one, two, outside = (tmp_path / name for name in ("one", "two", "outside"))
    for folder in (one / "sound", one / "linked", two / "other", outside):
        write_adapter(folder, model, targets=("q_proj", "o_proj"))
    weights = one / "linked" / "adapter_model.safetensors"
    weights.unlink()
    (one / "inner").symlink_to("sound")

    def error(path: Path, settings: Settings) -> str | None:
        return read_adapter("x", str(path), model.spec(0, 1, torch.float32), 64, settings.root_of(str(path)))[0].error

    dirs = Settings(adapter_dirs=(str(one), str(two)))
    for target, allowed in ((one / "sound", True), (two / "other", False), (outside, False)):
        weights.symlink_to(target / "adapter_model.safetensors")
        for path in (one / "linked", one / ".." / "one" / "linked"):
            found = error(path, dirs)
            assert (found is None) == allowed
            assert allowed or (found is not None and f"files below {one}" in found)
        assert error(one / "linked", Settings()) is None, "no root was given"
        weights.unlink()
    assert error(one / "inner", dirs) is None
    assert error(outside, dirs) is None, "without --adapter-root an admin loads from anywhere"
    assert "a folder below --adapter-root" in str(error(outside, Settings(adapter_roots=(str(one),))))


class Load:
    """A load that ends when it is told to."""

    def __init__(self) -> None:
        self.runs = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> int:
        self.runs += 1
        await self.go.wait()
        if self.error:
            raise self.error
        return self.runs


def test_many_askers_cause_one_run_and_later_ones_another() -> None:
    async def main() -> None:
        flight, load, other = SingleFlight(), Load(), Load()
        askers = [asyncio.create_task(flight.run("a", load)) for _ in range(20)]
        asker_of_other = asyncio.create_task(flight.run("b", other))
        await asyncio.sleep(0)
        load.go.set()
        assert await asyncio.gather(*askers) == [1] * 20
        assert not asker_of_other.done()
        other.go.set()
        assert await asker_of_other == 1
        assert await flight.run("a", load) == 2

    asyncio.run(main())


def test_whoever_asks_when_a_run_has_just_ended_begins_another() -> None:
    """Before the event loop has told anybody that it ended."""

    async def main() -> None:
        flight, load = SingleFlight(), Load()
        load.go.set()
        found: list[int] = []

        async def ask() -> None:
            found.append(await flight.run("a", load))
            found.append(await flight.run("a", load))

        await asyncio.gather(ask(), ask())
        assert load.runs == 2
        assert sorted(found) == [1, 1, 2, 2]

    asyncio.run(main())


def test_a_failure_reaches_every_asker_and_is_forgotten() -> None:
    async def main() -> None:
        flight, load = SingleFlight(), Load()
        load.error = ValueError("broken")
        load.go.set()
        for outcome in await asyncio.gather(*(flight.run("a", load) for _ in range(3)), return_exceptions=True):
            assert isinstance(outcome, ValueError)
        load.error = None
        assert await flight.run("a", load) == 2

    asyncio.run(main())


def test_an_asker_that_goes_away_does_not_stop_the_others() -> None:
    async def main() -> None:
        flight, load = SingleFlight(), Load()
        first, second = (asyncio.create_task(flight.run("a", load)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        load.go.set()
        assert await second == 1
        assert first.cancelled()

    asyncio.run(main())
