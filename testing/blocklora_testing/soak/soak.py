"""A bounded run: start, soak, sweep, check."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blocklora_testing import slow_launcher
from blocklora_testing.server import Server, running
from blocklora_testing.soak import checks, world
from blocklora_testing.soak.checks import Check
from blocklora_testing.soak.client import ADMIN_KEY, Client, NoAnswer
from blocklora_testing.soak.operators import Disk, Operator
from blocklora_testing.soak.place import Place
from blocklora_testing.soak.refusals import Refusals
from blocklora_testing.soak.run import SERVED, Asked, Run
from blocklora_testing.soak.tally import Tally
from blocklora_testing.soak.traffic import Traffic
from blocklora_testing.soak.watch import Watch
from blocklora_testing.soak.weather import Weather

SLOT_BYTES = 2 * 2 * 16 * 4  # of a TP rank: layers x K and V x one KV head x float32
SLOTS_OF_ADAPTER = 92  # the largest of them


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a run is.

    seconds   of traffic; more than ``requests`` must be served in them
    adapters  names; half of them are reloaded all the time, a fifth is loaded when it is named
    resident  adapters for which the arena has room beside the KV of the requests that run
    settle_s  after which the processes' memory must be level
    """

    seconds: float
    requests: int
    adapters: int
    contents: int
    prompts: int
    resident: int
    clients: int
    settle_s: float
    gap_s: float

    @property
    def pool_tokens(self) -> int:
        return self.resident * SLOTS_OF_ADAPTER + 256

    @property
    def host_gb(self) -> float:
        return (self.resident + 2) * SLOTS_OF_ADAPTER * SLOT_BYTES / 2**30


FULL = Size(
    seconds=450,
    requests=10_000,
    adapters=40,
    contents=46,
    prompts=14,
    resident=6,
    clients=24,
    settle_s=60,
    gap_s=4,
)
SMALL = Size(
    seconds=30, requests=300, adapters=15, contents=16, prompts=8, resident=4, clients=12, settle_s=10, gap_s=0.5
)


@dataclass(frozen=True, kw_only=True)
class Result:
    tally: Tally
    checks: list[Check]
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.tally.problems and all(check.held for check in self.checks)


def soak(folder: Path, size: Size, seed: int) -> Result:
    """Build, start, soak and stop; everything lies below ``folder``."""
    made = world.build(folder, size.contents, size.prompts, seed)
    place = Place(folder.resolve() / "root", dict(made.contents))
    names = _names(size)
    contents = list(made.contents)
    for i, name in enumerate(names):
        place.put((place.named if name.startswith("n") else place.loaded) / name, contents[i % len(contents)])
    _links(place, folder)
    with _server(folder, size, place, made.model, names) as server:
        return asyncio.run(_run(server, folder, size, place, made, names, seed))


def _names(size: Size) -> list[str]:
    """b: stays; m: moves, that is, is reloaded with other bytes; n: is loaded when it is named. The popular first."""
    kinds = [("b", "m", "m", "b", "n")[i % 5] for i in range(size.adapters)]
    return [f"{kind}{i:02}" for i, kind in enumerate(kinds)]


def _links(place: Place, outside: Path) -> None:
    """Links that lead out of the root, to themselves, and to a file."""
    (place.root / "link-out").symlink_to(outside / "contents" / "c0")
    (place.root / "link-loop").symlink_to(place.root / "link-loop")
    (place.root / "link-file").symlink_to(outside / "contents" / "c0" / "adapter_config.json")


@contextlib.contextmanager
def _server(folder: Path, size: Size, place: Place, model: Path, names: list[str]) -> Iterator[Server]:
    flags = ["--tp", "2", "--served-model-name", SERVED, "--admin-api-key", ADMIN_KEY, "--enable-metrics"]
    flags += ["--max-total-tokens", str(size.pool_tokens), "--adapter-host-memory-gb", str(size.host_gb)]
    flags += ["--max-running-requests", "8", "--adapter-decision-log", str(folder / "decisions")]
    flags += ["--adapter-root", str(place.root), "--adapter-dir", str(place.named), "--random-seed", "0"]
    flags += ["--lora-paths", *(f"{name}={place.loaded / name}" for name in names if not name.startswith("n"))]
    debug = {"SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1"}  # whenever idle, every slot has exactly one owner
    script = slow_launcher.__file__  # storage that hangs while a folder says so
    with running(model, *flags, log=folder / "log", environment=debug, module=(script,), sound=False) as server:
        yield server


async def _run(
    server: Server, folder: Path, size: Size, place: Place, made: world.World, names: list[str], seed: int
) -> Result:
    watch = Watch(server.process.pid)
    begin = time.monotonic()
    async with Client(server.url, deadline_s=60) as client:
        run = Run(world=made, place=place, client=client, seed=seed, popular=names, pool_tokens=size.pool_tokens)
        for i, name in enumerate(names):
            run.ledger.there(name, list(made.contents)[i % len(made.contents)])
        watching = asyncio.ensure_future(watch.run())
        parts = [asyncio.ensure_future(part) for part in _parts(run, size)]
        await _until(server, begin + size.seconds)
        run.over.set()
        await asyncio.wait(parts, timeout=180)
        for part in parts:
            part.cancel() if not part.done() else part.result()
        seconds = time.monotonic() - begin
        watching.cancel()
        found = [checks.alive(server)]
        if found[0].held:
            try:
                await _sweep(run)
            except NoAnswer as error:
                run.tally.problem("sweep", str(error))
    found += checks.decision_logs(folder / "decisions", 2)
    found += [checks.log_is_clean(server), *_memory(watch, size)]
    enough = run.tally.requests >= size.requests
    found.append(Check(name=f"at least {size.requests} requests", held=enough, found=str(run.tally.requests)))
    return Result(tally=run.tally, checks=found, seconds=seconds)


def _parts(run: Run, size: Size) -> Iterator[object]:
    """Everything that happens at once."""
    traffic, refusals, weather = Traffic(run), Refusals(run), Weather(run)
    moving = [name for name in run.popular if name.startswith("m")]
    named = [name for name in run.popular if name.startswith("n")]
    for i in range(size.clients):
        yield run.forever("traffic", run.rng(f"client {i}"), traffic.one)
    for i in range(2):
        yield run.forever("bad", run.rng(f"bad {i}"), refusals.one)
        yield run.forever("left by the client", run.rng(f"leaves {i}"), traffic.leave)
        yield run.forever("aborted", run.rng(f"aborts {i}"), traffic.abort)
        operator = Operator(run, moving[i::2], named[i::2])
        yield run.forever("operator", run.rng(f"operator {i}"), operator.one)
    yield run.forever("disk", run.rng("disk"), Disk(run, list(run.popular)).one)
    yield run.forever("reports", run.rng("reports"), lambda rng: _reports(run, rng))
    yield _weather(run, weather, size.gap_s)


async def _weather(run: Run, weather: Weather, gap_s: float) -> None:
    rng = run.rng("weather")
    while not run.over.is_set():
        try:
            await weather.one(rng, gap_s)
        except NoAnswer as error:
            run.tally.problem("weather", str(error))


async def _reports(run: Run, rng: object) -> None:
    """Readers of state; some leave before they have an answer."""
    for path in ("/adapters", "/metrics", "/v1/models", "/adapters?limit=3&after=m01", "/server_info"):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.choice([0.005, 30, 30])):  # type: ignore[attr-defined]
                answer = await run.client.call(path, method="GET")
                if answer.status != 200:
                    run.tally.problem("reports", f"{path}: {answer.status} {str(answer.body)[:200]}")
                elif ADMIN_KEY in str(answer.body):
                    run.tally.problem("reports", f"{path} tells the admin key")
                else:
                    run.tally.right("reports", answer.end - answer.begin)
    await asyncio.sleep(0.3)


async def _until(server: Server, deadline: float) -> None:
    """Wait for the deadline, or the server's end."""
    while time.monotonic() < deadline and server.process.poll() is None:
        await asyncio.sleep(0.2)


async def _sweep(run: Run) -> None:
    """Nobody else is there: every name is as its owner left it, twice, with a flush between; slots add up."""
    traffic, weather = Traffic(run), Weather(run)
    rng = run.rng("sweep")
    for _ in range(2):
        for name in (*run.popular, None):
            asked = Asked(name=name, prompt=rng.randrange(run.world.long), tokens=4)
            answer = await run.client.call("/generate", traffic.body(asked))
            traffic.judge("sweep", [asked], answer, [answer.body])
        await weather.one(rng, 0)  # the first of its kinds: idle, flush, idle


def _memory(watch: Watch, size: Size) -> list[Check]:
    growths = watch.growth(size.settle_s)
    found = [
        Check(name=f"memory level after {size.settle_s:g} s: {growth.name}", held=growth.level, found=str(growth))
        for growth in growths
    ]
    new = [watch.describe(pid) for pid in sorted(watch.processes() - watch.first)]
    return [*found, Check(name="no process more", held=not new, found=", ".join(new) or "none")]
