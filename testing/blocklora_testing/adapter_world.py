"""Makes up the schedulers behind SGLang's real HTTP process, to see adapters come and go beside requests."""

from __future__ import annotations

import asyncio
import hashlib
import warnings
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from sglang_blocklora.adapters.spooled import spooled_hash

from blocklora_testing.http_process import HTTPProcess, Scheduler

LIMIT_S = 60  # only a failing test waits so long


class Schedulers(Scheduler):
    """Keep adapters by id, answer updates at once or when told to, and hold requests until they are told to end.

    slow     names whose updates are answered by ``answer`` only
    refused  names whose loads are refused
    bytes    path -> what stands for the adapter's bytes there, where it is not the path itself
    pins     whether they pin what they are asked to
    states   settings that they were given, pins among them, in order
    wrong    what a scheduler must never see
    """

    def __init__(self, manager: Any) -> None:
        super().__init__(manager)
        self.adapters: dict[str, str] = {}
        self.running: dict[str, Any] = {}
        self.asked: list[Any] = []
        self.slow: set[str] = set()
        self.refused: set[str] = set()
        self.bytes: dict[str, str] = {}
        self.pins = True
        self.states: list[tuple[str, Any]] = []
        self.wrong: list[str] = []

    def dispatch(self, message: Any) -> None:
        kind = type(message).__name__
        if kind in ("LoadLoRAAdapterReqInput", "UnloadLoRAAdapterReqInput"):
            self.asked.append(message)
            if message.lora_name not in self.slow:
                self.answer(message)
            return
        if kind == "SetInternalStateReq":
            from sglang.srt.managers.io_struct import SetInternalStateReqOutput

            self.states += message.server_args.items()
            done = SetInternalStateReqOutput(updated=self.pins or 1 not in message.server_args.values())
            self._later(self._manager._result_dispatcher, done)
            return
        if kind == "AbortReq":
            gone = [rid for rid in self.running if message.abort_all or rid == message.rid]
            for rid in gone:
                del self.running[rid]
        super().dispatch(message)
        for request in getattr(message, "batch", [message] if hasattr(message, "input_ids") else []):
            if request.lora_id is not None and request.lora_id not in self.adapters:
                self.wrong.append(f"request for {request.lora_id}, which is not loaded")
            if self.holds:
                self.running[request.rid] = request

    async def dispatch_later(self, message: Any) -> None:
        self.dispatch(message)

    def answer(self, message: Any) -> None:
        """Do what ``message`` asks and say so."""
        from sglang.srt.managers.io_struct import LoRAUpdateOutput

        success, name, loaded = True, message.lora_name, None
        if type(message).__name__ == "UnloadLoRAAdapterReqInput":
            if message.lora_id in (request.lora_id for request in self.running.values()):
                self.wrong.append(f"unload of {name}, which a request uses")
            self.adapters.pop(message.lora_id, None)
        elif name in self.refused:
            success = False
        else:
            self.adapters[message.lora_id] = name
            loaded = {message.lora_id: self.hash(message.lora_path)}
        error = None if success else f"adapter {name!r}: broken"
        answer = LoRAUpdateOutput(success=success, error_message=error, rid=message.rid, loaded_adapters=loaded)
        self._later(self._manager._result_dispatcher, answer)

    def hash(self, path: str) -> str:
        """What stands for the content hash of the adapter at ``path``."""
        spooled = spooled_hash(Path(path))
        return spooled or hashlib.sha256(self.bytes.get(path, path).encode()).hexdigest()

    def end(self, rid: str) -> None:
        """The request has its answer."""
        self._answer(self.running.pop(rid))

    def end_all(self) -> None:
        for rid in list(self.running):
            self.end(rid)

    def asks(self, kind: str, name: str) -> list[Any]:
        """Updates of that kind for that adapter, in order."""
        return [ask for ask in self.asked if type(ask).__name__.startswith(kind) and ask.lora_name == name]


class World:
    """One process, its made-up schedulers, and calls to it that run at the same time."""

    def __init__(self, process: HTTPProcess, disk: Path) -> None:
        self.process, self.manager, self.disk = process, process.manager, disk
        self.scheduler: Any = None

    async def post(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        answer = await self.process.client.post(path, json=body or {})
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.status_code, answer.json() if is_json else answer.text

    async def load(self, name: str, path: str | None = None, **more: Any) -> tuple[int, Any]:
        folder = path or self.disk / name
        Path(folder).mkdir(exist_ok=True)
        return await self.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), **more})

    async def unload(self, name: str) -> tuple[int, Any]:
        return await self.post("/unload_lora_adapter", {"lora_name": name})

    async def generate(self, name: str | list[str | None] | None, **more: Any) -> tuple[int, Any]:
        prompts = [[5, 6]] * len(name) if isinstance(name, list) else [5, 6]
        body = {"input_ids": prompts, "lora_path": name, "sampling_params": {"max_new_tokens": 1}} | more
        return await self.post("/generate", body)

    async def models(self) -> set[str]:
        answer = await self.process.client.get("/v1/models")
        return {one["id"] for one in answer.json()["data"]} - {"tiny"}

    async def stream(self, name: str | list[str | None]) -> asyncio.Task[tuple[int, Any]]:
        """A request that the schedulers have and hold."""
        self.scheduler.holds = True
        before = len(self.scheduler.running)
        task = asyncio.ensure_future(self.generate(name))
        await until(lambda: len(self.scheduler.running) > before)
        return task

    def run(self, scenario: Callable[[], Awaitable[None]]) -> None:
        async def limited() -> None:
            await asyncio.wait_for(scenario(), LIMIT_S)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SGLang's own
            self.process.run(limited())


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), LIMIT_S)


async def answer_until_done(world: World, calls: Sequence[asyncio.Future[Any]]) -> None:
    """Have the scheduler answer what it is asked, in order, until all ``calls`` are done."""
    answered = 0

    def step() -> bool:
        nonlocal answered
        for ask in world.scheduler.asked[answered:]:
            answered += 1
            world.scheduler.answer(ask)
        return all(call.done() for call in calls)

    await until(step)
