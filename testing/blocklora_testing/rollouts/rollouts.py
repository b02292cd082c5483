"""A bounded run: four names under constant load, updated again and again; then what must hold."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from blocklora_testing.rollouts.run import Run, Size
from blocklora_testing.rollouts.samplers import Sampler
from blocklora_testing.rollouts.trainers import Trainer
from blocklora_testing.server import Server, running
from blocklora_testing.soak import checks, world
from blocklora_testing.soak.checks import Check
from blocklora_testing.soak.client import ADMIN_KEY, Client
from blocklora_testing.soak.soak import Result
from blocklora_testing.soak.watch import Watch

NAMES = ("policy", "critic", "old policy", "judge")
FULL = Size(updates=1000, contents=96, prompts=6, samplers=10, gap_s=2.0, settle_s=60)
SMALL = Size(updates=40, contents=12, prompts=4, samplers=6, gap_s=1.5, settle_s=5)
POOL_TOKENS = 1600  # room for some versions and their KV, so that older ones give way
HOST_GB = 2**-9  # for some images: what is put out is read again


def rollouts(folder: Path, size: Size, seed: int) -> Result:
    """Build, start, train and sample, stop; everything lies below ``folder``."""
    made = world.build(folder, size.contents, size.prompts, seed)
    spool = folder / "spool"
    spool.mkdir()
    flags = ["--tp", "2", "--served-model-name", "base", "--admin-api-key", ADMIN_KEY, "--random-seed", "0"]
    flags += ["--max-total-tokens", str(POOL_TOKENS), "--adapter-host-memory-gb", str(HOST_GB)]
    flags += ["--adapter-spool-dir", str(spool), "--adapter-decision-log", str(folder / "decisions")]
    debug = {"SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1"}  # whenever idle, every slot has exactly one owner
    with running(made.model, *flags, log=folder / "log", environment=debug, sound=False) as server:
        result = asyncio.run(_run(server, folder, size, made, seed))
    result.checks.append(_gone(spool))
    return result


def _gone(spool: Path) -> Check:
    """A process of its own removes the server's spool, a moment after the server has ended."""
    end = time.monotonic() + 10
    while (left := [path.name for path in spool.iterdir()]) and time.monotonic() < end:
        time.sleep(0.05)
    return Check(name="the spool went with the server", held=not left, found=f"{left}")


async def _run(server: Server, folder: Path, size: Size, made: world.World, seed: int) -> Result:
    watch, begin = Watch(server.process.pid), time.monotonic()
    async with Client(server.url, deadline_s=60) as client:
        run = Run(size=size, world=made, client=client, names=NAMES, seed=seed)
        trainers = [Trainer(run, name) for name in NAMES]
        for trainer in trainers:
            await trainer.update()
        watching = asyncio.ensure_future(watch.run())
        samplers = [asyncio.ensure_future(Sampler(run, number).run()) for number in range(size.samplers)]
        try:
            await asyncio.gather(*(trainer.run() for trainer in trainers))
        finally:
            run.over = True
        await asyncio.gather(*samplers)
        seconds = time.monotonic() - begin
        watching.cancel()
        found = [checks.alive(server), *await _nothing_is_left(run, folder / "spool")]
    found += [checks.decision_logs(folder / "decisions", 2)[0], checks.log_is_clean(server)]
    found += [
        Check(name=f"memory level after {size.settle_s:g} s: {growth.name}", held=growth.level, found=str(growth))
        for growth in watch.growth(size.settle_s)
    ]
    updates = sum(row.right for kind, row in run.tally.rows.items() if kind.startswith("update"))
    enough = updates >= size.updates
    found.append(Check(name=f"at least {size.updates} updates", held=enough, found=f"{updates} in {seconds:.0f} s"))
    return Result(tally=run.tally, checks=found, seconds=seconds)


async def _nothing_is_left(run: Run, spool: Path) -> list[Check]:
    """Of each name one version, and of what came as tensors what these need; and nothing once they are unloaded."""
    client = run.client
    listed = await _settled(run)
    kept = {path.name for folder in spool.iterdir() for path in folder.iterdir()}
    needed = {Path(one["path"]).name for one in listed["data"] if str(spool) in one["path"]}
    found = [
        Check(name="no version drains", held=not any(one["draining"] for one in listed["data"]), found=f"{listed}"),
        Check(name="the spool holds what is needed", held=kept == needed, found=f"{kept} for {needed}"),
    ]
    for name in run.names:
        await client.call("/v1/unload_lora_adapter", {"lora_name": name}, admin=True)
    await client.call("/flush_cache", {}, admin=True)
    slots = (await _settled(run))["slots"]
    kept = {path.name for folder in spool.iterdir() for path in folder.iterdir()}
    free = slots["free"] == slots["total"]
    return [
        *found,
        Check(name="all slots are free at the end", held=free, found=f"{slots}"),
        Check(name="the spool is empty at the end", held=not kept, found=f"{kept}"),
    ]


async def _settled(run: Run) -> dict[str, object]:
    """``GET /adapters`` once no version drains; what it shows last where one does for long."""
    for _ in range(100):
        listed = (await run.client.call("/adapters", method="GET")).body
        if not any(one["draining"] for one in listed["data"]):
            break
        await asyncio.sleep(0.1)
    return dict(listed)
