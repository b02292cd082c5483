"""Which names adapters can have: each that is taken is found, and takes nothing from another."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_blocklora.naming.model_names import (
    MAX_NAME_BYTES,
    TOLD_NAMES,
    UnknownModel,
    known_adapters,
    reason_not_to_name,
    resolve_model,
)
from sglang_blocklora.naming.turns import Tasks, Turns

texts = st.text(st.sampled_from("ab:/ \n\ud800é"), max_size=6)
bases = st.sampled_from(["a", "b", "a:b", "default", "a/b", "default:a"])


def meanings(models: list[str], base: str, known: set[str]) -> dict[str, str | None]:
    """What those of ``models`` mean that mean anything."""
    found = {}
    for model in models:
        try:
            found[model] = resolve_model(model, base, "default", known)
        except UnknownModel:
            continue
    return found


@given(st.lists(texts), bases, st.lists(texts), st.booleans())
def test_a_name_that_is_taken_is_found_and_takes_nothing_from_others(
    names: list[str], base: str, models: list[str], asks_for_forms: bool
) -> None:
    known: set[str] = set()
    models += [f"{prefix}{name}" for name in (*names, "") for prefix in ("", f"{base}:", "default:")]
    for name in names:
        if reason_not_to_name(name, base, "default") is not None:
            continue
        before = meanings([*models, base, "default"], base, known)
        known.add(name)
        after = meanings([*models, base, "default"], base, known)
        assert resolve_model(name, base, "default", known) == name
        assert resolve_model(f"{base}:{name}", base, "default", known) == name
        assert {model: after[model] for model in before} == before
        assert after[base] is after["default"] is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "empty"),
        ("  \t", "empty"),
        (" sql", "begins or ends with a space"),
        ("sql\n", "begins or ends with a space"),
        ("s\0ql", "not printable"),
        ("s\nql", "not printable"),
        ("s\x7fql", "not printable"),
        ("s\x85ql", "not printable"),
        ("s\u202eql", "not printable"),
        ("s\u2028ql", "not printable"),
        ("s\ud800ql", "not printable"),
        ("é" * (MAX_NAME_BYTES // 2 + 1), f"{MAX_NAME_BYTES + 2} bytes"),
        ("tiny", "of the base model"),
        ("default", "of the base model"),
        ("tiny:sql", "begins with 'tiny:'"),
        ("default:sql", "begins with 'default:'"),
    ],
)
def test_a_refusal_says_what_is_wrong_in_one_line_that_any_log_can_hold(name: str, why: str) -> None:
    message = reason_not_to_name(name, "tiny", "default")
    assert message is not None
    assert why in message
    assert message.isprintable()
    assert len(message) < 300


@pytest.mark.parametrize(
    "name", ["sql", "a b", "x:y", "tiny-sql", "tin", "tiny/x", "/a/path", "ünï", "名前", "x" * MAX_NAME_BYTES]
)
def test_other_names_are_taken(name: str) -> None:
    assert reason_not_to_name(name, "tiny", "default") is None


def test_a_message_does_not_list_ten_thousand_names() -> None:
    text = known_adapters([f"{i:05}" for i in range(10_000)], ())
    assert text.startswith("Adapters: 00000, 00001, ")
    assert text.endswith(f"{TOLD_NAMES - 1:05} and {10_000 - TOLD_NAMES} more (GET /adapters).")


def test_turns_of_a_key_come_in_the_order_of_asking_and_leave_nothing() -> None:
    async def main() -> None:
        turns, seen = Turns(), []
        gate = asyncio.Event()

        async def work(number: int, key: str) -> None:
            async with turns.of(key):
                seen.append(number)
                await gate.wait()

        tasks = [asyncio.create_task(work(number, "a" if number < 4 else "b")) for number in range(6)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert seen == [0, 4]
        tasks[1].cancel()
        gate.set()
        await asyncio.wait(tasks)
        assert seen == [0, 4, 2, 5, 3] or seen == [0, 4, 5, 2, 3]
        assert vars(turns) == {"_locks": {}, "_askers": {}}

    asyncio.run(main())


def test_tasks_end_though_who_asked_goes_away() -> None:
    async def main() -> None:
        tasks, gate, ended = Tasks(), asyncio.Event(), []

        async def work() -> None:
            await gate.wait()
            ended.append(True)
            raise ValueError("nobody is there to see it, and nothing is logged about that")

        async def ask() -> None:
            await asyncio.shield(tasks.start(work()))

        asker = asyncio.create_task(ask())
        await asyncio.sleep(0)
        asker.cancel()
        await asyncio.wait({asker})
        gate.set()
        while not ended:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert vars(tasks) == {"_running": set()}

    asyncio.run(main())
