"""Random names, paths, JSON values and numbers, hostile ones among them, from a seeded generator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

# What names and paths have fallen over before: dots, separators of several systems and encodings, NUL and other control
# characters, lone surrogates, marks that change direction, what patterns and formats read, and plain letters.
PIECES = (
    *("..", ".", "/", "//", "\\", "%2e", "%2f", "%00", "~", "$HOME", "\uff0f", "\u2215", ":"),
    *("\0", "\n", "\r", "\t", " ", "\x7f", "\ud800", "\udcff", "\u202e", "\u200b", "\ufeff"),
    *("{", "}", "%s", "*", "?", "[", "#", ",", "@", "'", '"', "<", ">"),
    *("a", "A", "0", "-", "_", "é", "e\u0301", "日本", "😀", "None", "null", "default"),
)
NUMBERS = (0, 1, -1, 2, 255, 256, 257, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 2**70, -(2**63))
FLOATS = (0.0, -0.0, 0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf"))


def text(rng: Random, known: Sequence[str] = ()) -> str:
    """A string: a known word, or a few pieces and words, seldom a long one."""
    if known and rng.random() < 0.3:
        return rng.choice(known)
    words = [rng.choice(known if known and rng.random() < 0.2 else PIECES) for _ in range(rng.randrange(7))]
    made = "".join(words)
    return made * rng.choice([300, 5000]) if rng.random() < 0.005 else made


def path(rng: Random, known: Sequence[str]) -> str:
    """A path of known words, dots and hostile pieces; absolute ones too."""
    parts = [rng.choice(("..", ".", "", text(rng), *rng.choices(known, k=4))) for _ in range(rng.randint(1, 6))]
    return rng.choice(("", "/", "./", "../")) + "/".join(parts)


def number(rng: Random) -> int:
    """An integer, mostly one where some type ends."""
    if rng.random() < 0.3:
        return rng.getrandbits(rng.randint(1, 70))
    return rng.choice(NUMBERS) + rng.choice((0, 0, 1, -1))


def value(rng: Random, known: Sequence[str] = (), depth: int = 3) -> Any:
    """Any JSON value, and what Python's JSON lets through besides: NaN, infinity, lone surrogates."""
    kind = rng.randrange(7 if depth else 5)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return number(rng)
    if kind == 2:
        return rng.choice(FLOATS)
    if kind <= 4:
        return text(rng, known)
    inner = [value(rng, known, depth - 1) for _ in range(rng.randint(0, 4))]
    return inner if kind == 5 else {text(rng, known): one for one in inner}


def mutated(rng: Random, sound: dict[str, Any], known: Sequence[str], changes: int = 2) -> dict[str, Any]:
    """A sound object with a few of its values, at any depth, changed, gone or under another name."""
    made: dict[str, Any] = json.loads(json.dumps(sound))
    for _ in range(rng.randint(1, changes)):
        place: Any = made
        while place:
            key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
                place = inner
                continue
            _change(rng, place, key, known)
            break
    return made


def _change(rng: Random, place: Any, key: Any, known: Sequence[str]) -> None:
    how = rng.randrange(4)
    if how == 0:
        del place[key]
    elif how == 1 and isinstance(place, dict):
        place[text(rng, known)] = place[key]
    else:
        place[key] = value(rng, known)


def body(rng: Random, sound: dict[str, Any], known: Sequence[str]) -> bytes:
    """``mutated`` as bytes, which seldom are not JSON, or not even UTF-8."""
    made = json.dumps(mutated(rng, sound, known)).encode()
    return broken(rng, made) if rng.random() < 0.1 else made


def broken(rng: Random, made: bytes) -> bytes:
    """Bytes with something else at one place."""
    at = rng.randrange(len(made))
    return made[:at] + rng.choice((b"", b"\xff", b"\x00", b"{", b"[" * 5000, made)) + made[at + 1 :]
