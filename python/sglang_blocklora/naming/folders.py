"""Finds the folders of adapters that are loaded when a request first names them (``--adapter-dir``)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONFIG = "adapter_config.json"


class NotReadable(LookupError):
    """A folder of that name that this process may not look into."""


@dataclass(frozen=True)
class AdapterFolders:
    """The adapters below ``roots``: each is a folder directly below one, and the first root that has it wins.

    Nothing else is a name: no path of several parts, no hidden folder, and no link that leads out of its root. What is
    on the disk is looked at anew each time.
    """

    roots: Sequence[Path]

    def find(self, name: str) -> Path | None:
        """The folder that ``name`` is, links followed, or None.

        Raises ``NotReadable`` where the folder may be there and cannot be looked into, and nothing else, whatever the
        name. Asks the file system, so it may take long: an event loop asks through ``lookups.look_up``.
        """
        if not name or name.startswith(".") or "/" in name or "\0" in name or not is_unicode(name):
            return None
        closed = None
        for root in self.roots:
            try:
                folder = _adapter(root, name)
            except PermissionError:
                closed = closed or root / name
                continue
            if folder is not None:
                return folder
        if closed is not None:
            raise NotReadable(f"{closed} is not readable for this server (permission denied).")
        return None

    def all(self) -> dict[str, Path]:
        """Every name that ``find`` finds and its folder, by name."""
        found: dict[str, Path] = {}
        for name in sorted({name for root in self.roots for name in _names(root)}):
            with contextlib.suppress(NotReadable):
                folder = self.find(name)
                if folder is not None:
                    found[name] = folder
        return found

    def root_of(self, path: str) -> Path | None:
        """The root below which ``path`` lies once links are followed, or None. Never raises; asks the file system."""
        try:
            real = Path(path).resolve()
            return next((root for root in self.roots if real.is_relative_to(root.resolve())), None)
        except (OSError, ValueError, RuntimeError):  # not encodable, a loop of links
            return None


NO_FOLDERS = AdapterFolders(())


def _names(root: Path) -> list[str]:
    try:
        return [entry.name for entry in root.iterdir()]
    except OSError:  # gone or unreadable: its adapters are, and no others
        return []


def is_unicode(name: str) -> bool:
    """Names that are not UTF-8 on the disk carry surrogates, which no answer can."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _adapter(root: Path, name: str) -> Path | None:
    try:
        folder = (root / name).resolve()
        inside = folder.is_relative_to(root.resolve()) and folder != root.resolve()
        return folder if inside and (folder / CONFIG).is_file() else None
    except PermissionError:
        raise
    except (OSError, ValueError, RuntimeError):  # too long, not encodable, a loop of links
        return None
