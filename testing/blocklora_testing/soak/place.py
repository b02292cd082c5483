"""Folders of a soaked server: what it is started with, and what its operator and its disk do to them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
HARMS = ("gone", "empty", "a file", "cut short", "other bytes", "not JSON")


class Place:
    """Adapter folders below one root, each a copy of contents that lie elsewhere.

    root/loaded   adapters that are loaded by path
    root/named    ``--adapter-dir``: loaded when a request names them
    root/new      copies on their way
    """

    def __init__(self, root: Path, contents: dict[str, Path]) -> None:
        self.root, self._contents = root, contents
        self.loaded, self.named, self._new = root / "loaded", root / "named", root / "new"
        self._copies = 0
        for folder in (self.loaded, self.named, self._new):
            folder.mkdir(parents=True)

    def put(self, folder: Path, contents: str) -> None:
        """Let ``folder`` hold ``contents``, in place of what it held."""
        new = self._copy(self._contents[contents])
        if folder.exists():
            self._away(folder)
        new.rename(folder)

    def harm(self, folder: Path, how: str, other: str) -> Path:
        """Let ``folder`` be broken; returns where the sound one is kept."""
        kept = self._new / f"kept{self._number()}"
        folder.rename(kept)
        if how == "gone":
            return kept
        if how == "a file":
            folder.write_text("")
            return kept
        new = self._copy(self._contents[other] if how == "other bytes" else kept)
        if how == "empty":
            for file in new.iterdir():
                file.unlink()
        elif how == "cut short":
            os.truncate(new / WEIGHTS, (new / WEIGHTS).stat().st_size // 2)
        elif how == "not JSON":
            (new / "adapter_config.json").write_text("{")
        new.rename(folder)
        return kept

    def heal(self, folder: Path, kept: Path) -> None:
        """Put the sound folder back, the very same files."""
        if folder.exists():
            self._away(folder)
        kept.rename(folder)

    def _copy(self, source: Path) -> Path:
        return shutil.copytree(source, self._new / f"copy{self._number()}")

    def _away(self, folder: Path) -> None:
        gone = self._new / f"gone{self._number()}"
        folder.rename(gone)
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()

    def _number(self) -> int:
        self._copies += 1
        return self._copies
