"""Answers of schedulers carry no id: one that comes after its caller gave up is taken for the next caller's."""

from __future__ import annotations

import asyncio


def fault() -> str | None:
    from sglang.srt.managers.communicator import FanOutCommunicator

    async def main() -> list[str]:
        channel = FanOutCommunicator(lambda question: None, fan_out=1)
        first = asyncio.create_task(channel("first question"))
        await asyncio.sleep(0)
        first.cancel()  # as asyncio.wait_for does
        await asyncio.sleep(0)
        second = asyncio.create_task(channel("second question"))
        await asyncio.sleep(0)
        channel.handle_recv("answer to the first")
        channel.handle_recv("answer to the second")
        return await second

    got = asyncio.run(main())
    return f"the second question got {got}" if got != ["answer to the second"] else None


if __name__ == "__main__":
    print(fault() or "mended")
