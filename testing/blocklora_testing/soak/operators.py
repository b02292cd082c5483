"""What an operator does to adapters while they are asked for, and what a disk does."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from random import Random

from blocklora_testing.soak.client import Answer
from blocklora_testing.soak.place import HARMS
from blocklora_testing.soak.run import Asked, Run
from blocklora_testing.soak.traffic import Traffic


async def load(run: Run, name: str, path: str, rng: Random, pinned: bool = False) -> Answer:
    """A load over one of the two routes."""
    route = rng.choice(["/load_lora_adapter", "/v1/load_lora_adapter"])
    return await run.client.call(route, {"lora_name": name, "lora_path": path, "pinned": pinned}, admin=True)


async def unload(run: Run, name: str, rng: Random) -> Answer:
    """An unload over one of the two routes."""
    route = rng.choice(["/unload_lora_adapter", "/v1/unload_lora_adapter"])
    return await run.client.call(route, {"lora_name": name}, admin=True)


class Operator:
    """Reloads names of ``moving`` with other bytes, changes folders of ``named``, and pins."""

    def __init__(self, run: Run, moving: list[str], named: list[str]) -> None:
        self._run, self._moving, self._named = run, moving, named

    async def one(self, rng: Random) -> None:
        """One thing that an operator does, then a pause."""
        step = rng.choices([self._reload, self._replace, self._pin], [4, 2, 3])[0]
        await step(rng)
        await asyncio.sleep(rng.uniform(0.0, 0.3))

    async def _reload(self, rng: Random) -> None:
        """Unload a name, let its folder hold other contents, load it again; meanwhile it may be unknown."""
        run, name, contents = self._run, rng.choice(self._moving), rng.choice(sorted(self._run.world.contents))
        async with run.locks[name]:
            old = run.ledger.newest(name)
            old.leaving = time.monotonic()
            self._expect("unload", name, await unload(run, name, rng))
            old.until = time.monotonic()
            if rng.random() < 0.3:
                await self._ask_unloaded(name, rng)
            folder = run.place.loaded / name
            run.place.put(folder, contents)
            span = run.ledger.coming(name, contents)
            self._expect("load", name, await load(run, name, str(folder), rng))
            span.ready = time.monotonic()

    async def _ask_unloaded(self, name: str, rng: Random) -> None:
        """The name is gone: the very next request is refused."""
        run = self._run
        asked = Asked(name=name, prompt=rng.randrange(run.world.long), tokens=2)
        answer = await run.client.call("/generate", Traffic(run).body(asked))
        if answer.status == 400:
            run.tally.refused("unloaded name", answer.end - answer.begin)
        else:
            run.tally.problem("unloaded name", f"{asked}: {answer.status} {str(answer.body)[:200]}")

    async def _replace(self, rng: Random) -> None:
        """Other contents in the folder of a name that requests load, and an unload so that they are seen."""
        run, name, contents = self._run, rng.choice(self._named), rng.choice(sorted(self._run.world.contents))
        async with run.locks[name]:
            old = run.ledger.newest(name)
            old.leaving = time.monotonic()
            span = run.ledger.coming(name, contents)
            run.place.put(run.place.named / name, contents)
            answer = await unload(run, name, rng)
            if answer.status in (400, 404):
                run.tally.refused("unload", answer.end - answer.begin)  # no request had named it
            else:
                self._expect("unload", name, answer)
            old.until = span.ready = time.monotonic()

    async def _pin(self, rng: Random) -> None:
        run, name = self._run, rng.choice([*self._moving, *self._named])
        verb = rng.choice(["pin", "unpin", "unpin"])
        async with run.locks[name]:
            answer = await run.client.call(f"/adapters/{name}/{verb}", {}, admin=True)
        full = answer.status == 400 and verb == "pin"  # pinned adapters may take half of the slots
        if answer.status == 200:
            run.tally.right(verb, answer.end - answer.begin)
        elif full or (answer.status == 404 and name in self._named):
            run.tally.refused(verb, answer.end - answer.begin)
        else:
            run.tally.problem(verb, f"{name}: {answer.status} {str(answer.body)[:200]}")

    def _expect(self, kind: str, name: str, answer: Answer) -> None:
        if answer.status == 200:
            self._run.tally.right(kind, answer.end - answer.begin)
        else:
            self._run.tally.problem(kind, f"{name}: {answer.status} {str(answer.body)[:300]}")


class Disk:
    """Folders that vanish, change and break while adapters are served from them, and come back as they were."""

    def __init__(self, run: Run, names: list[str]) -> None:
        self._run, self._names = run, names

    async def one(self, rng: Random) -> None:
        """One harm for a while; then the folder is as before, and so must the answers be."""
        if rng.random() < 0.15:
            await self._all(rng)
        else:
            await self._single(rng)
        await asyncio.sleep(rng.uniform(0.2, 1.0))

    async def _single(self, rng: Random) -> None:
        run, name, how = self._run, rng.choice(self._names), rng.choice(HARMS)
        named = name.startswith("n")
        if named and how == "other bytes":
            how = "gone"  # who names it while it is not loaded would get those, and rightly
        folder = (run.place.named if named else run.place.loaded) / name
        async with run.locks[name]:
            with run.ledger.harm(name):
                kept = run.place.harm(folder, how, rng.choice(sorted(run.world.contents)))
                try:
                    for _ in range(rng.randint(1, 4)):
                        await self._ask(f"disk: {how}", name, rng)
                        await asyncio.sleep(rng.uniform(0.0, 0.3))
                finally:
                    run.place.heal(folder, kept)

    async def _all(self, rng: Random) -> None:
        """The whole disk is gone for a while."""
        run = self._run
        async with self._every_lock():
            away = run.place.root.with_name("away")
            with run.ledger.harm(None):
                run.place.root.rename(away)
                try:
                    for _ in range(8):
                        await self._ask("disk: all gone", run.name(rng), rng)
                finally:
                    away.rename(run.place.root)

    @contextlib.asynccontextmanager
    async def _every_lock(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for name in ("weather", *sorted(self._run.popular)):
                await stack.enter_async_context(self._run.locks[name])
            yield

    async def _ask(self, kind: str, name: str | None, rng: Random) -> None:
        run = self._run
        asked = Asked(name=name, prompt=rng.randrange(run.world.long), tokens=2)
        traffic = Traffic(run)
        answer = await run.client.call("/generate", traffic.body(asked))
        traffic.judge(kind, [asked], answer, [answer.body])
