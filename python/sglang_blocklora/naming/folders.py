"""Adapters that are loaded when a request first names them: the folders below ``--adapter-dir``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdapterFolders:
    """A name is that of a folder directly below one of ``roots``; the first root that has it wins.

    Nothing else is a name: no path of several parts, no hidden folder, and no link that leads out of its root. What is
    on the disk is looked at anew each time.
    """

    roots: Sequence[Path]

    def find(self, name: str) -> Path | None:
        """The folder that ``name`` is, links followed, or None. Never raises, whatever the name."""
        if not name or name.startswith(".") or "/" in name or "\0" in name or not _is_unicode(name):
            return None
        for root in self.roots:
            folder = _adapter(root, name)
            if folder is not None:
                return folder
        return None

    def all(self) -> dict[str, Path]:
        """Every name and its folder, by name."""
        names = {name for root in self.roots for name in _names(root)}
        found = ((name, self.find(name)) for name in sorted(names))
        return {name: folder for name, folder in found if folder is not None}


NO_FOLDERS = AdapterFolders(())


def _names(root: Path) -> list[str]:
    try:
        return [entry.name for entry in root.iterdir()]
    except OSError:  # gone or unreadable: its adapters are, and no others
        return []


def _is_unicode(name: str) -> bool:
    """Names that are not UTF-8 on the disk carry surrogates, which no answer can."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _adapter(root: Path, name: str) -> Path | None:
    try:
        folder = (root / name).resolve()
        inside = folder.is_relative_to(root.resolve()) and folder != root.resolve()
        return folder if inside and (folder / CONFIG).is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, not encodable, a loop of links
        return None
