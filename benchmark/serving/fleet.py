"""Servers to compare. All up at once, those not being measured stopped with SIGSTOP so that they take no cycles
(``fleet``); or each started whenever it is measured, where all at once need more memory than there is (``visitors``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from blocklora_testing.server import Server, running

from benchmark.serving.client import SGLANG, Dialect, at_once

OURS = ("-m", "sglang_blocklora.launch_server")
STOCK_FILE = Path(__file__).with_name("stock_server.py")
# Stock servers append a line to this file for each adapter they copy into a slot (TP rank 0).
LOADS_VARIABLE = "STOCK_ADAPTER_LOADS"
SETTLE_S = 0.2


class Engine(Protocol):
    """How a server is started and asked."""

    @property
    def dialect(self) -> Dialect: ...

    def start(self, model: Path, log: Path, loads: Path) -> AbstractContextManager[Server]:
        """The server, for the length of the block. loads: the file for adapters that are copied, where it has one."""

    def adapter_loads(self, server: Server, loads: Path) -> Counter[str]:
        """How often each adapter was copied to where the model reads it, since the start."""


@dataclass(frozen=True)
class Launch:
    """How a server is started: stock SGLang or ours, its flags, and what Python runs for ours."""

    stock: bool
    flags: tuple[str, ...]
    module: tuple[str, ...] = OURS
    dialect: ClassVar[Dialect] = SGLANG

    def start(self, model: Path, log: Path, loads: Path) -> AbstractContextManager[Server]:
        module = (str(STOCK_FILE),) if self.stock else self.module
        environment = {LOADS_VARIABLE: str(loads)}
        return running(model, *self.flags, log=log, environment=environment, module=module, sound=not self.stock)

    def adapter_loads(self, server: Server, loads: Path) -> Counter[str]:
        if self.stock:
            return Counter(loads.read_text().split() if loads.exists() else ())
        status, answer = server.call("/adapters?limit=1000")
        assert status == 200, answer
        return Counter({adapter["name"]: adapter["loads"] for adapter in answer["data"]})


@dataclass
class Member(ABC):
    """A server to compare, which runs while it is awake. Then it has ``server``."""

    name: str
    launch: Engine
    folder: Path
    server: Server = field(init=False)

    @property
    def loads_file(self) -> Path:
        return self.folder / f"{self.name}.loads"

    def start(self, model: Path) -> AbstractContextManager[Server]:
        return self.launch.start(model, self.folder / f"{self.name}.log", self.loads_file)

    @abstractmethod
    def awake(self) -> AbstractContextManager[Server]:
        """Let the server run inside the block only."""

    def adapter_loads(self) -> Counter[str]:
        """How often each adapter was copied to where the model reads it, since the start."""
        return self.launch.adapter_loads(self.server, self.loads_file)

    def flush(self) -> None:
        """Drop cached KV, so that each pass starts from the same state."""
        status, answer = self.server.call(self.launch.dialect.flush_path, {})
        assert status == 200, f"{self.name}: {answer}"


class Sleeper(Member):
    """Up all the time."""

    @contextlib.contextmanager
    def awake(self) -> Iterator[Server]:
        self.signal(signal.SIGCONT)
        time.sleep(SETTLE_S)
        try:
            yield self.server
        finally:
            self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        """To all its processes, if they still are."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.server.process.pid, number)


@dataclass
class Visitor(Member):
    """Up while it is awake."""

    model: Path

    @contextlib.contextmanager
    def awake(self) -> Iterator[Server]:
        with self.start(self.model) as self.server:
            yield self.server


def stop_cleanly(*_: object) -> None:
    """SIGTERM as an exception: whoever started servers stops them on the way out."""
    raise SystemExit("terminated")


@contextlib.contextmanager
def fleet(model: Path, launches: Mapping[str, Engine], folder: Path) -> Iterator[dict[str, Member]]:
    """Start a server for each launch, one after another; all are asleep when the block begins."""
    signal.signal(signal.SIGTERM, stop_cleanly)
    members: dict[str, Member] = {}
    with contextlib.ExitStack() as stack:
        for name, launch in launches.items():
            print(f"starting {name}", flush=True)
            members[name] = member = Sleeper(name, launch, folder)
            member.server = stack.enter_context(member.start(model))
            stack.callback(member.signal, signal.SIGCONT)  # a stopped process would not end politely
            member.signal(signal.SIGSTOP)
        yield members


def visitors(model: Path, launches: Mapping[str, Engine], folder: Path) -> dict[str, Member]:
    """A member for each launch, whose server starts whenever it is to be awake."""
    signal.signal(signal.SIGTERM, stop_cleanly)
    return {name: Visitor(name, launch, folder, model) for name, launch in launches.items()}


def check_tokens(
    members: Mapping[str, Member],
    asked: Mapping[str, Sequence[str | None]],
    prompts: Sequence[list[int]],
    expected: Mapping[str | None, list[list[int]]],
) -> None:
    """No figure without right tokens: ``asked[server]`` adapters answer every prompt as ``expected`` (PEFT's) says."""
    for name, adapters in asked.items():
        with members[name].awake():
            check_answers(members[name], adapters, prompts, expected)


def check_answers(
    member: Member,
    adapters: Sequence[str | None],
    prompts: Sequence[list[int]],
    expected: Mapping[str | None, list[list[int]]],
) -> None:
    """``check_tokens`` of one that is awake."""
    requests = [(prompt, adapter) for adapter in adapters for prompt in prompts]
    wanted = [tokens for adapter in adapters for tokens in expected[adapter]]
    answers = at_once(member.server.url, requests, len(wanted[0]), member.launch.dialect)
    for (_, adapter), found, right in zip(requests, answers, wanted, strict=True):
        if found.tokens != right:
            told = found.error or json.dumps(found.tokens)
            raise SystemExit(f"{member.name}: wrong tokens under {adapter}: {told}, PEFT {right}")
