"""Asks the schedulers for any number of adapter updates at once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.io_struct import LoRAUpdateOutput


class AdapterUpdates:
    """Stands in for upstream's ``update_lora_adapter_communicator``, which sends an update when the last is answered.

    send      sends one request to the schedulers
    replicas  answers that each request gets; they carry its ``rid``
    """

    def __init__(self, send: Callable[[Any], None], replicas: int) -> None:
        self._send = send
        self._replicas = replicas
        self._asked: dict[str, tuple[list[LoRAUpdateOutput], asyncio.Future[None]]] = {}

    async def __call__(self, request: Any) -> list[LoRAUpdateOutput]:
        """Send ``request`` under a new ``rid`` and wait for the answers of all replicas."""
        request.rid = uuid.uuid4().hex
        answers: list[LoRAUpdateOutput] = []
        complete = asyncio.get_running_loop().create_future()
        self._asked[request.rid] = answers, complete
        try:
            self._send(request)
            await complete
        finally:
            del self._asked[request.rid]
        return answers

    def handle_recv(self, answer: LoRAUpdateOutput) -> None:
        """An answer came. One that nobody waits for any more is dropped."""
        answers, complete = self._asked.get(answer.rid, ([], None))
        answers.append(answer)
        if complete is not None and len(answers) == self._replicas and not complete.done():
            complete.set_result(None)

    def set_fan_out(self, replicas: int) -> None:
        """Later requests get this many answers."""
        self._replicas = replicas
