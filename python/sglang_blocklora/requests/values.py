"""Checks types, counts and ranges of a request's values, and says how a refusal tells them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxdict = 3
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = 60


class BadRequest(ValueError):
    """A request that is answered with a 400; the message names the field, the position and the value."""


def shown(value: Any) -> str:
    """``value`` as a message tells it: short, however large, long or deep it is."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    return _REPR.repr(value)


def check_types(field: str, values: Any, expected: Mapping[str, Any]) -> None:
    """Refuse ``values`` unless it maps some of the names of ``expected`` to None or to values of their types.

    No value is converted: a truth value is no number, and digits in quotes are none. Raises ``BadRequest``.
    """
    if not isinstance(values, Mapping):
        raise BadRequest(f"{field} is {shown(values)}; a mapping of names to values is wanted.")
    for name, value in values.items():
        if name not in expected:
            raise BadRequest(f"{field} has no {shown(name)}. Known: {', '.join(sorted(expected))}.")
        try:
            if value is not None:
                msgspec.convert(value, expected[name])
        except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter of half a surrogate pair
            raise BadRequest(f"{field}.{name} is {shown(value)}: {error}.") from None


def check_count(field: str, given: int, prompts: int) -> None:
    """Refuse a list that has not one value for each prompt: ``given`` values for ``prompts`` prompts."""
    if given != prompts:
        raise BadRequest(f"{field} is a list of {given}, but there are {prompts} prompts. Give one value for each.")


def check_embeddings(field: str, rows: Any, width: int) -> None:
    """Refuse ``rows`` unless it is a list of at least one list of ``width`` numbers. Raises ``BadRequest``."""
    row = Annotated[list[float], msgspec.Meta(min_length=width, max_length=width)]
    try:
        msgspec.convert(rows, Annotated[list[row], msgspec.Meta(min_length=1)])
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise BadRequest(f"{field} is {shown(rows)}: {error}; rows of {width} numbers are wanted.") from None


def check_range(field: str, value: Any, low: int, high: int) -> None:
    """Refuse ``value`` unless it is an integer in [``low``, ``high``]. Raises ``BadRequest``."""
    if type(value) is not int or not low <= value <= high:
        raise BadRequest(f"{field} is {shown(value)}; an integer in [{low}, {high}] is wanted.")
