"""Command line flags described once, beside the field that each sets: parser, checks and documentation follow."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

S = TypeVar("S", bound=msgspec.Struct)


def number(text: str) -> float:
    """The number that ``text`` is. ``ValueError`` saying what it is not; infinity is not a number here."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise ValueError("is not a number")
    return value


def whole_number(text: str) -> int:
    """The same of whole numbers."""
    try:
        return int(text)
    except ValueError:
        raise ValueError("is not a whole number") from None


def folder(text: str) -> str:
    """Where the folder at ``text`` really is. ``ValueError`` if there is none."""
    if not Path(text).is_dir():
        raise ValueError("is not a folder")
    return str(Path(text).resolve())


def share(text: str) -> tuple[str, float]:
    """``NAME=WEIGHT`` as a pair. ``ValueError`` unless the weight is above 0."""
    name, _, weight = text.rpartition("=")
    try:
        pair = name, number(weight)
    except ValueError:
        pair = "", 0.0
    if not pair[0] or pair[1] <= 0:
        raise ValueError("is not NAME=WEIGHT with a weight above 0")
    return pair


@dataclass(frozen=True, kw_only=True)
class Flag:
    """What a field's annotation says of the flag that sets it.

    help      what it does, for the command line and the documentation
    name      of the flag; None: the field's, with dashes
    metavar   what stands for its value in help texts
    parse     text -> value, ``ValueError`` saying what is wrong with it; None: by the field's type
    told      the default, where its value does not tell it
    choices   values that it can have; those of a ``Literal`` need not be repeated
    at_least  smallest value
    above     what the value must be above
    only      (field, value) without which it has no effect
    """

    help: str
    name: str | None = None
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    told: str | None = None
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    only: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field and its flag.

    name       of the field
    flag       the flag, dashes and all
    default    value where it is not given
    described  what the annotation says
    kind       type of the field
    choices    all values that it can have, or none
    """

    name: str
    flag: str
    default: Any
    described: Flag
    kind: Any
    choices: tuple[str, ...]

    @property
    def repeated(self) -> bool:
        """Whether it may be given several times."""
        return get_origin(self.kind) in (tuple, dict)

    @property
    def told(self) -> str:
        """The default, in words."""
        if self.described.told is not None:
            return self.described.told
        return "off" if self.default is False else f"{self.default:g}" if self.kind is float else str(self.default)

    def value(self, texts: Sequence[str]) -> Any:
        """What ``texts``, one for each time the flag was given, set the field to. ``SystemExit`` if they cannot be."""
        if self.kind is bool:
            return True
        by_type: dict[Any, Callable[[str], Any]] = {int: whole_number, float: number}
        parse = self.described.parse or by_type.get(self.kind, str)
        values: list[Any] = []
        for text in texts:
            try:
                values.append(parse(text))
            except ValueError as error:
                raise SystemExit(f"{self.flag} {text} {error}") from None
        if get_origin(self.kind) is dict:
            if len(dict(values)) < len(values):
                raise SystemExit(f"{self.flag} {' '.join(texts)} names one twice")
            return dict(values)
        return tuple(values) if self.repeated else values[-1]

    def wrong(self, value: Any) -> str | None:
        """What is wrong with ``value``, or None."""
        if self.choices and value not in self.choices:
            return f"{self.flag} {value} must be one of {', '.join(self.choices)}"
        if self.described.at_least is not None and not self.described.at_least <= value < float("inf"):
            return f"{self.flag} {value} must be at least {self.described.at_least:g}"
        if self.described.above is not None and not self.described.above < value < float("inf"):
            return f"{self.flag} {value} must be above {self.described.above:g}"
        return None


@cache
def options(settings: type[msgspec.Struct]) -> tuple[Option, ...]:
    """The flags of ``settings``, in the order of its fields; each is annotated with a ``Flag``."""
    hints = get_type_hints(settings, include_extras=True)
    found = []
    for each in msgspec.structs.fields(settings):
        kind, described = get_args(hints[each.name])
        found.append(
            Option(
                name=each.name,
                flag=described.name or f"--{each.name.replace('_', '-')}",
                default=each.default if each.default is not msgspec.NODEFAULT else None,
                described=described,
                kind=kind,
                choices=described.choices or (get_args(kind) if get_origin(kind) is Literal else ()),
            )
        )
    return tuple(found)


def add_arguments(group: argparse._ArgumentGroup, settings: type[msgspec.Struct]) -> None:
    """Let ``group`` take the flags of ``settings`` as texts; a flag that is not given leaves nothing behind."""
    for option in options(settings):
        told = f"{option.described.help}{'; may be repeated' if option.repeated else ''} (default: {option.told})"
        arguments: dict[str, Any] = {
            "dest": option.name,
            "default": argparse.SUPPRESS,
            "help": told.replace("%", "%%"),
        }
        if option.kind is bool:
            group.add_argument(option.flag, action="store_const", const=[""], **arguments)
            continue
        metavar = option.described.metavar or ("{" + ",".join(option.choices) + "}" if option.choices else "N")
        group.add_argument(option.flag, action="append", metavar=metavar, **arguments)


def from_arguments(arguments: argparse.Namespace, settings: type[S]) -> S:
    """The ``settings`` that parsed flags ask for. ``SystemExit`` with a message where a value cannot be."""
    found = [option for option in options(settings) if hasattr(arguments, option.name)]
    try:
        made = settings(**{option.name: option.value(getattr(arguments, option.name)) for option in found})
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for option in found:
        if option.described.only is not None:
            needed, value = option.described.only
            if getattr(made, needed) != value:
                raise SystemExit(
                    f"{option.flag} has no effect without --{needed.replace('_', '-')} {value}: give both or none"
                )
    return made


def check(made: msgspec.Struct) -> None:
    """``ValueError`` naming every field of ``made`` whose value its flag does not allow."""
    wrong = [option.wrong(getattr(made, option.name)) for option in options(type(made))]
    if any(wrong):
        raise ValueError("; ".join(filter(None, wrong)))


def table(settings: type[msgspec.Struct]) -> str:
    """The flags of ``settings`` as a Markdown table."""
    rows = ["| flag | what it does | default |", "|---|---|---|"]
    for option in options(settings):
        value = option.described.metavar or "" if option.kind is not bool else ""
        told = option.described.help + ("; may be repeated" if option.repeated else "")
        if option.choices:
            value = " \\| ".join(option.choices)
        rows.append(f"| `{option.flag}{' ' + value if value else ''}` | {told} | {option.told} |")
    return "\n".join(rows)
