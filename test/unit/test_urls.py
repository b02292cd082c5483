"""URLs of adapters in one spelling each; what lies below which."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_blocklora.settings import Settings
from sglang_blocklora.sources.urls import BadURL, is_below, is_url, located, place


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("/a/b", "/a/b"),
        ("relative", "relative"),
        ("file:///a/b", "/a/b"),
        ("S3://bucket/a/", "s3://bucket/a"),
        ("hf://team/repo@main/sub", "hf://team/repo@main/sub"),
        ("https://host:8000/a", "https://host:8000/a"),
    ],
)
def test_one_spelling(written: str, expected: str) -> None:
    assert located(written) == expected == located(expected)


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3://b//a",
        "s3://b/../a",
        "s3://b/./a",
        "https://h/%2e%2e/a",
        "https://h/a?x=1",
        "https://h/a#x",
        "https://user:secret@h/a",
        "s3://b/a\\..\\c",
        "simplecache::s3://b/a",
        "s3://b/a::file:///etc",
        "s3://b/a b",
        "s3://b/a\n",
        "s3://b/\ud800",
    ],
)
def test_what_could_lead_elsewhere_is_no_url_of_an_adapter(url: str) -> None:
    if not is_url(url):
        assert "::" in url, "a path, and no file system of fsspec's"
        return
    with pytest.raises(BadURL) as refused:
        located(url)
    assert "secret" not in str(refused.value)


def test_below_is_part_by_part() -> None:
    assert is_below("s3://b/a/x", ["s3://b/a"])
    assert is_below("s3://b/a", ["s3://c", "s3://b/a"])
    assert not is_below("s3://b/ab", ["s3://b/a"])
    assert not is_below("s3://b", ["s3://b/a"])
    assert not is_below("https://b/a", ["http://b/a"])
    assert is_below("hf://team/repo@v2/x", ["hf://team/repo"])
    assert is_below("hf://team/repo@v2", ["hf://team"])
    assert not is_below("hf://team/repo@v2", ["hf://team/repo@v1"])
    assert not is_below("hf://team/repo", ["hf://team/repo@v1"])
    assert not is_below("s3://b/a@x/c", ["s3://b/a"])


parts = st.lists(st.text(st.sampled_from("ab.@/%:\\ "), min_size=0, max_size=6), max_size=4).map("/".join)


@given(parts, parts)
def test_what_is_allowed_begins_with_the_root_and_has_no_way_up(root: str, rest: str) -> None:
    try:
        top, url = located(f"s3://{root}"), located(f"s3://{root}/{rest}")
    except BadURL:
        return
    assert is_below(url, [top])
    assert not {"", ".", ".."} & set(url.removeprefix("s3://").split("/"))


def test_settings_hold_urls_to_prefixes(tmp_path: Path) -> None:
    inside = Settings(adapter_roots=("s3://b/a", str(tmp_path)), adapter_dirs=("s3://b/a/c", str(tmp_path / "x")))
    assert inside.may_fetch("s3://b/a/z")
    assert not inside.may_fetch("s3://b/z")
    assert inside.adapter_urls == ("s3://b/a/c",)
    assert inside.adapter_folders.roots == (tmp_path / "x",)
    assert inside.root_of(str(tmp_path / "y")) == str(tmp_path)
    assert inside.root_of("/elsewhere") == "s3://b/a", "nothing on the disk is below it"
    by_name = Settings(adapter_dirs=("hf://team",))
    assert by_name.may_fetch("hf://team/repo")
    assert not by_name.may_fetch("hf://others/repo")
    assert not Settings().may_fetch("s3://b/a")
    with pytest.raises(ValueError, match="nothing in it could be loaded"):
        Settings(adapter_roots=("s3://b/a",), adapter_dirs=("s3://b/ab",))
    with pytest.raises(ValueError, match="nothing in it could be loaded"):
        Settings(adapter_roots=("s3://b/a",), adapter_dirs=(str(tmp_path),))


def test_what_lies_in_the_cache_may_be_read_whatever_the_roots(tmp_path: Path) -> None:
    settings = Settings(adapter_roots=("/elsewhere",), adapter_cache_dir=str(tmp_path))
    assert settings.root_of(str(tmp_path / ("k" * 64))) == str(tmp_path)
    assert settings.root_of(str(tmp_path / "other")) == "/elsewhere"


def test_a_flag_takes_folders_and_stores_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(str(tmp_path)) == place(f"file://{tmp_path}") == str(tmp_path.resolve())
    assert place("s3://bucket/a/") == "s3://bucket/a"
    with pytest.raises(ValueError, match="not a folder"):
        place("/nowhere")
    with pytest.raises(ValueError, match="does not know"):
        place("gopher://x")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"pip install 'sglang-blocklora\[gcs\]'"):
        place("gs://bucket/a")
