"""What happens to the whole server at once: flushes, pauses, aborts of everything, a load from storage that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

from blocklora_testing.slow_launcher import HOLD
from blocklora_testing.soak.client import Answer, NoAnswer
from blocklora_testing.soak.operators import load, unload
from blocklora_testing.soak.run import Asked, Run
from blocklora_testing.soak.traffic import Traffic
from blocklora_testing.soak.world import LONG_TOKENS

PATIENCE_S = 20.0  # within which something must be answered that nothing is in the way of
OTHERS = 10  # requests for others, at once, that a hanging load must not delay


class Weather:
    """One of each in turn, so that each is seen however short the run is."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._steps = [
            self._flush_quiet,
            lambda rng: self._with_disk(self._pause, "in_place", rng),
            lambda rng: self._with_disk(self._slow_load, rng),
            self._abort_all,
            lambda rng: self._with_disk(self._pause, "retract", rng),
            self._flush_busy,
            lambda rng: self._with_disk(self._pause, "abort", rng),
        ]
        self._next = 0

    async def one(self, rng: Random, gap_s: float) -> None:
        """The next kind of weather, and fair weather for about ``gap_s``."""
        step = self._steps[self._next % len(self._steps)]
        self._next += 1
        await step(rng)
        await asyncio.sleep(rng.uniform(0.5, 1.5) * gap_s)

    async def _with_disk(self, step: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """The whole disk does not vanish meanwhile: that would be another test."""
        async with self._run.locks["weather"]:
            await step(*arguments)

    async def _flush_quiet(self, rng: Random) -> None:
        """Nobody asks anything: the server is idle, its slots add up, and flushing must work."""
        run = self._run
        async with run.quiet():
            await self.idle_slots()
            answer = await run.client.call("/flush_cache", {}, admin=True)
            self._expect("flush, idle", answer, (200,))
            await self.idle_slots()

    async def _flush_busy(self, rng: Random) -> None:
        answer = await self._run.client.call("/flush_cache", {}, admin=True)
        self._expect("flush, busy", answer, (200, 400))

    async def idle_slots(self) -> None:
        """No request runs: slots that are in use come to none, and the rest adds up to the pool."""
        run, deadline = self._run, time.monotonic() + PATIENCE_S
        while True:
            answer = await run.client.call("/adapters?limit=1000", method="GET")
            slots = answer.body["slots"]
            if slots["in_use"] == 0 or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        adds_up = slots["free"] + slots["adapter"] + slots["kv"] == slots["total"]
        owned = all(count >= 0 for owner in slots["owners"].values() for count in owner.values())
        by_owner = sum(sum(owner.values()) for owner in slots["owners"].values()) == slots["adapter"] + slots["kv"]
        if slots["in_use"] == 0 and adds_up and owned and by_owner and slots["invalid_kv_share"] == 0:
            run.tally.right("slots, idle", answer.end - answer.begin)
        else:
            run.tally.problem("slots, idle", str(slots))

    async def _abort_all(self, rng: Random) -> None:
        with self._run.ledger.storm():
            answer = await self._run.client.call("/abort_request", {"abort_all": True}, admin=True)
        self._expect("abort of all", answer, (200,))

    async def _pause(self, mode: str, rng: Random) -> None:
        """Adapters come and go while generation is paused, one with a request among them: trainers work like that."""
        run, kind = self._run, f"pause: {mode}"
        contents = rng.choice(sorted(run.world.contents))
        folder = run.place.loaded / "paused"
        run.place.put(folder, contents)
        self._expect(f"{kind}, load before", await load(run, "paused", str(folder), rng), (200,))
        span = run.ledger.coming("paused", contents)
        asked = Asked(name="paused", prompt=run.world.long, tokens=LONG_TOKENS)
        traffic = Traffic(run)
        running = asyncio.ensure_future(run.client.call("/generate", traffic.body(asked)))
        await asyncio.sleep(0.3)
        with run.ledger.storm() if mode == "abort" else contextlib.nullcontext():
            self._expect(kind, await run.client.call("/pause_generation", {"mode": mode}, admin=True), (200,))
            late = await self._while_paused(kind, rng)
            if mode == "retract":
                self._expect("flush, retracted", await run.client.call("/flush_cache", {}, admin=True), (200, 400))
            answer = await run.client.call("/continue_generation", {}, admin=True)
            self._expect("continue", answer, (200,))
        for task in late:
            with contextlib.suppress(NoAnswer):  # told already
                await task
        answer = await running
        traffic.judge(kind, [asked], answer, [answer.body], aborted=mode == "abort")
        span.until = time.monotonic()

    async def _while_paused(self, kind: str, rng: Random) -> list[asyncio.Future[Any]]:
        """Unload what a request runs with, load another. What is not answered before the end of the pause is told."""
        run = self._run
        other = run.place.loaded / "other"
        run.place.put(other, rng.choice(sorted(run.world.contents)))
        jobs = {
            "unload": asyncio.ensure_future(unload(run, "paused", rng)),
            "load": asyncio.ensure_future(load(run, "other", str(other), rng)),
        }
        done, waiting = await asyncio.wait(jobs.values(), timeout=PATIENCE_S)
        for what, task in jobs.items():
            if task in waiting:
                run.tally.problem(f"{kind}, {what}", "waits for the end of the pause")
            else:
                self._expect(f"{kind}, {what}", task.result(), (200,))
        if jobs["load"] in done:
            jobs["unload other"] = asyncio.ensure_future(unload(run, "other", rng))
        return list(jobs.values())

    async def _slow_load(self, rng: Random) -> None:
        """A load whose storage does not answer, and requests for others meanwhile: those must be answered."""
        run, kind, folder = self._run, "load from slow storage", self._run.place.loaded / "slow"
        contents = rng.choice(sorted(run.world.contents))
        run.place.put(folder, contents)
        (folder / HOLD).touch()
        loading = asyncio.ensure_future(load(run, "slow", str(folder), rng))
        traffic = Traffic(run)
        try:  # requests of its own: other clients send none once the run is over
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*(traffic.one(rng) for _ in range(OTHERS)))
        except TimeoutError:
            run.tally.problem(kind, f"{OTHERS} requests for others were not all answered meanwhile")
        if loading.done():
            run.tally.problem(kind, f"answered before it was read: {loading.result()}")
        (folder / HOLD).unlink()
        self._expect(kind, await loading, (200,))
        asked = Asked(name="slow", prompt=rng.randrange(run.world.long), tokens=4)
        span = run.ledger.coming("slow", contents)
        answer = await run.client.call("/generate", traffic.body(asked))
        traffic.judge(f"{kind}, request", [asked], answer, [answer.body])
        self._expect(f"{kind}, unload", await unload(run, "slow", rng), (200,))
        span.until = time.monotonic()

    def _expect(self, kind: str, answer: Answer, expected: tuple[int, ...]) -> None:
        if answer.status not in expected:
            self._run.tally.problem(kind, f"{answer.status} {str(answer.body)[:300]}")
        elif answer.status == 200:
            self._run.tally.right(kind, answer.end - answer.begin)
        else:
            self._run.tally.refused(kind, answer.end - answer.begin)
