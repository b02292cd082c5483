"""Streaming programs of the frontend language: pieces, refusals and ends reach the reader."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from blocklora_testing.endpoint import Endpoint


def test_streaming(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s):
        s += sgl.gen("first") + sgl.gen("second", adapter="b")

    state = program.run(backend=backend, stream=True, adapter="a")
    assert "".join(state.text_iter()) == "<a><b>"
    state = program.run(backend=backend, stream=True)

    async def collect() -> str:
        return "".join([part async for part in state.text_async_iter()])

    assert asyncio.run(collect()) == "<base><b>"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the program's own thread
def test_unknown_adapter_in_a_stream_raises_at_its_reader(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s):
        s += "x" + sgl.gen("x", adapter="nobody")

    state = program.run(backend=backend, stream=True)
    with pytest.raises(sgl.UnknownAdapter):
        list(state.text_iter())


class LookedAt(threading.Event):
    """Lets its reader look before ``set`` returns: the worst that a scheduler of threads can do."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = threading.Event()

    def clear(self) -> None:
        super().clear()
        self.looked.set()

    def set(self) -> None:
        self.looked.clear()
        super().set()
        self.looked.wait(0.2)


def test_a_stream_ends_however_quick_its_reader_is(sgl: Any, backend: Any) -> None:
    ready = threading.Event()

    @sgl.function
    def program(s):
        s.stream_executor.stream_text_event = LookedAt()
        ready.set()
        s += "x"

    state = program.run(backend=backend, stream=True)
    assert ready.wait(10)
    pieces: list[str] = []
    reader = threading.Thread(target=lambda: pieces.extend(state.text_iter()), daemon=True)
    reader.start()
    reader.join(10)
    assert not reader.is_alive()
    assert pieces == ["x"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the program's own thread
def test_several_answers_in_a_stream_are_refused_and_not_mixed(sgl: Any, backend: Any, endpoint: Endpoint) -> None:
    @sgl.function
    def program(s):
        s += "x" + sgl.gen("x", adapter="a", n=2)

    for options in ({}, {"adapter": "b"}):
        with pytest.raises(sgl.SeveralAnswersInStream, match="n=2"):
            list(program.run(backend=backend, stream=True, **options).text_iter())
    assert endpoint.requests == []
