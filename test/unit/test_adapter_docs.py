"""docs/adapters.md says what the tables of the code say."""

from __future__ import annotations

import re
from pathlib import Path

from sglang_blocklora.adapters.peft_keys import KEYS, Refused, Unused

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def fate(key: str) -> str:
    """The row of the page that names ``key``: its second column."""
    rows = re.findall(r"^\| (.*) \| (.*) \|$", PAGE.read_text().split("## Keys")[1].split("##")[0], re.MULTILINE)
    (found,) = (text for keys, text in rows if f"`{key}`" in keys)
    return found


def test_every_key_stands_in_one_row_with_its_fate() -> None:
    for key, known in KEYS.items():
        if isinstance(known, Refused):
            assert fate(key) == "refused", key
        elif isinstance(known, Unused):
            assert fate(key).startswith("warning"), key
        elif known == "silent":
            assert fate(key).startswith("nothing to apply"), key
        else:
            assert re.match(r"applied|weights of a module|refused (unless|if)", fate(key)), key
