"""Matches PEFT's regular expressions on module names, in bounded time whatever an adapter's config says.

``re`` can take exponential time on an expression made for that, and holds the interpreter meanwhile: one adapter's
config could stop the server for everybody. Here the set of positions in the name that each part of the expression
leads to is followed instead (Thompson's construction), which takes time in proportion to expression and name.
"""

from __future__ import annotations

import re
import re._constants as sre  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from typing import Any

from sglang_blocklora.adapters.errors import AdapterError, brief

# Of an expression, and of all together that one key of a config has (plain names do not count). Those that trainers
# write take some hundred; at this length the worst one takes 10 ms a module.
MAX_CHARACTERS = 1024
# One character each: such an expression has one way to match at most, and re is fast.
ONE_WAY = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN, sre.AT)


class Pattern:
    """An expression that matches whole names as ``re.fullmatch`` does.

    tail  it may also match what follows a dot of the name (PEFT's rule for rank_pattern and alpha_pattern)
    cost  characters that count for ``MAX_CHARACTERS`` of a key
    Not supported: flags, references back, looking behind, possessive and nested repetition. ``ValueError`` for those.
    """

    def __init__(self, text: str, *, tail: bool = False) -> None:
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"longer than {MAX_CHARACTERS} characters")
        try:
            self._tree = parser.parse(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from error
        if self._tree.state.flags & ~re.UNICODE:
            raise ValueError("flags are not supported")
        _check(self._tree, repeated=False)
        self._tail = tail
        # Most are plain names, one for each module of the model.
        plain = all(operator in ONE_WAY for operator, _ in self._tree)
        self._plain = re.compile(rf"(?:.*\.)?(?:{text})" if tail else text) if plain else None
        self.cost = 0 if plain else len(text)

    def matches(self, name: str) -> bool:
        """Whether the whole of ``name`` matches."""
        if self._plain:
            return self._plain.fullmatch(name) is not None
        walk = _Walk(name)
        return bool(walk.follow(self._tree, walk.tails if self._tail else 1) >> len(name))


def compile_pattern(adapter: str, key: str, text: str, *, tail: bool = False) -> Pattern:
    """The expression ``text`` of the config's ``key``. Raises ``AdapterError``."""
    try:
        return Pattern(text, tail=tail)
    except ValueError as error:
        raise AdapterError(
            adapter,
            f"pattern {brief(text)} of {key} ({error})",
            "a regular expression without flags, references back, looking behind and nested repetition",
            "Mend the pattern in adapter_config.json.",
        ) from error


def _check(tree: Any, repeated: bool) -> None:
    """Refuse what ``_Walk`` does not know, and repetition in repetition, anywhere in the expression."""
    for operator, argument in tree:
        if operator is sre.BRANCH:
            for branch in argument[1]:
                _check(branch, repeated)
        elif operator is sre.SUBPATTERN and not (argument[1] or argument[2]):
            _check(argument[3], repeated)
        elif operator in (sre.MAX_REPEAT, sre.MIN_REPEAT) and not (repeated and argument[1] > 1):
            _check(argument[2], repeated or argument[1] > 1)
        elif operator in (sre.ASSERT, sre.ASSERT_NOT) and argument[0] > 0:
            _check(argument[1], repeated)
        elif operator not in ONE_WAY:
            raise ValueError(f"{str(operator).lower()} is not supported here")


class _Walk:
    """Sets of positions in one name, as integers: bit i stands for the place before character i."""

    def __init__(self, name: str) -> None:
        self._all = (1 << len(name) + 1) - 1
        self._characters = self._all >> 1
        self._sets: dict[int, int] = {}  # id of a set of characters -> where one of them stands
        self._places: dict[str, int] = {}  # character -> where it stands
        for index, character in enumerate(name):
            self._places[character] = self._places.get(character, 0) | 1 << index
        self.tails = (1 | self._places.get(".", 0) << 1) & self._all  # the start, and after each dot
        word = sum(where for character, where in self._places.items() if _is_word(character))
        self._edges = {
            sre.AT_BEGINNING: 1,
            sre.AT_BEGINNING_STRING: 1,
            sre.AT_END: 1 << len(name),
            sre.AT_END_STRING: 1 << len(name),
            sre.AT_BOUNDARY: word ^ word << 1,
            sre.AT_NON_BOUNDARY: self._all & ~(word ^ word << 1),
        }

    def follow(self, tree: Any, at: int) -> int:
        """Where ``tree`` can end when it starts at any of ``at``."""
        for operator, argument in tree:
            if not at:
                break
            at = self._step(operator, argument, at)
        return at

    def _step(self, operator: Any, argument: Any, at: int) -> int:
        if operator is sre.BRANCH:
            ends = 0
            for branch in argument[1]:
                ends |= self.follow(branch, at)
            return ends
        if operator is sre.SUBPATTERN:
            return self.follow(argument[3], at)
        if operator in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return self._repeat(argument[2], argument[0], argument[1], at)
        if operator in (sre.ASSERT, sre.ASSERT_NOT):
            ahead = sum(1 << i for i in range(at.bit_length()) if at >> i & 1 and self.follow(argument[1], 1 << i))
            return at & (ahead if operator is sre.ASSERT else ~ahead)
        if operator is sre.AT:
            return at & int(self._edges[argument])
        return (at & self._fitting(operator, argument)) << 1

    def _fitting(self, operator: Any, argument: Any) -> int:
        """Where a character stands that fits."""
        if operator is sre.LITERAL:
            return self._places.get(chr(argument), 0)
        if operator is sre.NOT_LITERAL:
            return self._characters & ~self._places.get(chr(argument), 0)
        if operator is sre.ANY:
            return self._characters & ~self._places.get("\n", 0)
        if id(argument) not in self._sets:
            fits = (where for character, where in self._places.items() if _is_in(argument, character))
            self._sets[id(argument)] = sum(fits)
        return self._sets[id(argument)]

    def _repeat(self, body: Any, low: int, high: int, at: int) -> int:
        for _ in range(low):
            after = self.follow(body, at)
            if after == at:
                break  # and so it stays
            at = after
        reached = fresh = at
        for _ in range(min(high - low, self._all.bit_length())):
            fresh = self.follow(body, fresh) & ~reached
            if not fresh:
                break
            reached |= fresh
        return reached


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _is_in(characters: Any, character: str) -> bool:
    """Whether a set (``[a-z_]``, ``\\d``) holds ``character``."""
    negated = characters[0][0] is sre.NEGATE
    return any(_fits(kind, value, character) for kind, value in characters[negated:]) is not negated


def _fits(kind: Any, value: Any, character: str) -> bool:
    if kind is sre.LITERAL:
        return bool(ord(character) == value)
    if kind is sre.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    name = str(value).removeprefix("CATEGORY_").lower()
    tests = {"digit": str.isdecimal, "space": str.isspace, "word": _is_word}
    return tests[name.removeprefix("not_")](character) is not name.startswith("not_")
