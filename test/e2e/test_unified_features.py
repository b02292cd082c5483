"""SGLang's features on one server at TP 2 whose pool holds two adapters and little more; tokens are PEFT's throughout.

Pages of 16, chunked prefill, retraction, priorities, overlap schedule (on by default, CPU or not), KV events over ZMQ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from blocklora_testing.models import VOCAB, AdapterChoice, build_adapters, build_model, peft_tokens
from blocklora_testing.server import Server, running, same_decisions
from blocklora_testing.subscriber import AllBlocksCleared, BlockStored, KVEventBatch, Subscriber
from sglang_blocklora.adapters.content_hash import content_hash

PAGE = 16
POOL_TOKENS = 80 * PAGE
NEW_TOKENS = 32
LONG_PROMPT = 30 * PAGE
MARKER = [5] * PAGE
# nblocks -> LoRA rank: 390 to 450 slots on each TP rank, whatever the blocks.
RANKS = {None: 8, 1: 8, 2: 16, 4: 16}


@dataclass
class World:
    """Eight adapters, prompts longer than a chunk, PEFT's answers; a prompt so long that one adapter fits beside it."""

    model: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    expected: dict[str | None, list[list[int]]]
    long_prompt: list[int]
    long_answer: list[int]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("features")
    model = build_model(folder / "model", "llama")
    choices = {f"a{i}": AdapterChoice(n, rank=RANKS[n]) for i, n in enumerate([*RANKS, *RANKS])}
    adapters = build_adapters(model, folder / "adapters", choices)
    generator = torch.Generator().manual_seed(11)

    def random_tokens(count: int) -> list[int]:
        return torch.randint(0, VOCAB, (count,), generator=generator).tolist()

    shared = random_tokens(3 * PAGE)
    prompts = [shared + random_tokens(count) for count in (1, 2 * PAGE, 3 * PAGE + 5)]
    expected = peft_tokens(model, adapters, prompts, NEW_TOKENS)
    long_prompt = random_tokens(LONG_PROMPT)
    long_answer = peft_tokens(model, {"a0": adapters["a0"]}, [long_prompt], 2)["a0"][0]
    return World(model, adapters, prompts, expected, long_prompt, long_answer)


@dataclass
class Events:
    """A socket that hears the server's events."""

    socket: zmq.Socket
    decoder: msgspec.msgpack.Decoder = field(default_factory=lambda: msgspec.msgpack.Decoder(KVEventBatch))

    def until_stored(self, tokens: list[int]) -> Iterator[Any]:
        """All events up to the one that stores ``tokens``, none of them lost."""
        before = None
        while True:
            _, number, payload = self.socket.recv_multipart()
            assert before is None or int.from_bytes(number, "big") == before + 1, "events were lost"
            before = int.from_bytes(number, "big")
            for event in self.decoder.decode(payload).events:
                yield event
                if isinstance(event, BlockStored) and event.token_ids[: len(tokens)] == tokens:
                    return


@pytest.fixture(scope="module")
def events() -> Iterator[Events]:
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.setsockopt(zmq.RCVTIMEO, 60_000)
        socket.setsockopt(zmq.LINGER, 0)
        yield Events(socket)


@pytest.fixture(scope="module")
def server(world: World, events: Events, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("features-server")
    endpoint = f"ipc://{folder}/events"
    events.socket.connect(endpoint)
    config = {"publisher": "zmq", "endpoint": endpoint}
    flags = ["--tp", "2", "--page-size", str(PAGE), "--max-total-tokens", str(POOL_TOKENS)]
    flags += ["--chunked-prefill-size", str(2 * PAGE), "--max-running-requests", "8", "--enable-priority-scheduling"]
    flags += ["--schedule-conservativeness", "0.05", "--kv-events-config", json.dumps(config)]
    flags += ["--adapter-decision-log", str(folder / "decisions")]
    paths = ["--lora-paths", *(f"{name}={path}" for name, path in world.adapters.items())]
    # Upstream hands out pages by small Triton kernels only, which a CPU must interpret; ours are torch's there anyway.
    interpreted = {"TRITON_INTERPRET": "1"}
    with running(world.model, *flags, *paths, log=folder / "log", environment=interpreted) as server:
        yield server
    first = same_decisions(folder / "decisions")
    assert first.count('"load"') > len(world.adapters), "nothing was evicted and loaded again"


def generate(
    server: Server, prompt: list[int], adapter: str | None, new_tokens: int, *, ignore_eos: bool = True, **fields: Any
) -> tuple[int, Any]:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": ignore_eos}
    body = {"input_ids": prompt, "lora_path": adapter, "sampling_params": sampling, **fields}
    return server.call("/generate", body)


def listed(server: Server) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in server.call("/adapters?limit=1000")[1]["data"]}


def wait_for(server: Server, name: str, state: str, asked: Future) -> None:
    """Until the request of the adapter is ``running`` or ``waiting``."""
    while not listed(server)[name][state]:
        assert not asked.done(), "it ended before it was seen"


def flush(server: Server) -> None:
    """Upstream refuses while the last step is being cleaned up."""
    while server.call("/flush_cache", {})[0] != 200:
        pass


def test_overlap_schedule_is_on(server: Server) -> None:
    assert server.call("/server_info")[1]["disable_overlap_schedule"] is False


def test_priorities_chunks_and_retraction_change_no_token(server: Server, world: World) -> None:
    names = [None, *world.adapters]
    # Differences of more than 10 preempt running requests.
    asked = [(i % len(names), i % len(world.prompts), i % 4 * 20) for i in range(48)]

    def ask(one: tuple[int, int, int]) -> bool:
        name, prompt, priority = names[one[0]], one[1], one[2]
        # Since 0.5.22 all slots of an answer that cannot end before its time are reserved, and nothing is retracted.
        status, answer = generate(server, world.prompts[prompt], name, NEW_TOKENS, priority=priority, ignore_eos=False)
        return status == 200 and answer["output_ids"] == world.expected[name][prompt]

    with ThreadPoolExecutor(20) as threads:
        assert all(threads.map(ask, asked))
    assert "Retract requests" in server.log_text(), "the pool is too large to show retraction"
    assert "#new-token: 32" in server.log_text(), "no prompt was cut into chunks"


def test_a_request_waits_for_slots_while_others_go_on(server: Server, world: World) -> None:
    done: list[str] = []

    def ask(name: str | None, new_tokens: int) -> None:
        answer = generate(server, world.prompts[0], name, new_tokens)[1]
        assert answer["output_ids"][:NEW_TOKENS] == world.expected[name][0][:new_tokens]
        done.append(name or "base")

    with ThreadPoolExecutor(4) as threads:
        long = {name: threads.submit(ask, name, 60) for name in ("a0", "a1")}
        for name, asked in long.items():
            wait_for(server, name, "running", asked)
        waiting = threads.submit(ask, "a2", 2)
        wait_for(server, "a2", "waiting", waiting)
        ask(None, 2)
        for one in (*long.values(), waiting):
            one.result()
    assert done[0] == "base"
    assert done.index("a2") > min(done.index("a0"), done.index("a1"))


def test_abort_of_running_and_waiting_requests(server: Server, world: World) -> None:
    with ThreadPoolExecutor(4) as threads:
        asked = {}
        for name in ("a3", "a7", "a5"):  # two fit with their answers reserved in full, as after a retraction
            asked[name] = threads.submit(generate, server, world.prompts[0], name, 140, rid=f"abort-{name}")
            wait_for(server, name, "waiting" if name == "a5" else "running", asked[name])
        for name in ("a5", "a3", "a7"):
            assert server.call("/abort_request", {"rid": f"abort-{name}"})[0] == 200
            status, answer = asked[name].result()
            assert status != 200 or answer["meta_info"]["finish_reason"]["type"] == "abort"
    for name in ("a3", "a5"):
        assert server.tokens(world.prompts[1], name, 8) == world.expected[name][1][:8]


def test_pins_stay_and_a_request_that_never_fits_beside_them_is_refused_at_once(server: Server, world: World) -> None:
    assert server.call("/adapters/a7/pin", {})[0] == 200
    try:
        assert server.tokens(world.prompts[0], "a7", 4) == world.expected["a7"][0][:4]
        for name in ("a1", "a2", "a3"):
            assert server.tokens(world.prompts[0], name, 4) == world.expected[name][0][:4]
        found = listed(server)
        assert (found["a7"]["tier"], found["a7"]["pinned"]) == ("resident", True)
        status, answer = generate(server, world.long_prompt, "a0", 2)
        assert status == 400
        assert f"{LONG_PROMPT} tokens can never run" in json.dumps(answer)
    finally:
        assert server.call("/adapters/a7/unpin", {})[0] == 200
    status, answer = generate(server, world.long_prompt, "a0", 2)
    assert status == 200, answer
    assert answer["output_ids"] == world.long_answer


def test_a_subscriber_to_kv_events_sees_kv_only_and_whose_it_is(server: Server, world: World, events: Events) -> None:
    for _ in range(2):
        flush(server)
        for name in (None, "a6"):
            assert server.tokens(world.prompts[1], name, 2) == world.expected[name][1][:2]
    flush(server)
    server.tokens([*MARKER, 1], None, 1)
    subscriber, cached = Subscriber(PAGE), set()
    synchronised = False
    for event in events.until_stored(MARKER):
        synchronised |= isinstance(event, AllBlocksCleared)  # the socket may have missed the first ones
        if isinstance(event, AllBlocksCleared):
            cached = set(subscriber.blocks.values())
        if synchronised:
            subscriber.replay([event])
    own = int(content_hash(world.adapters["a6"])[:15], 16)
    pages = [tuple(world.prompts[1][:end]) for end in range(PAGE, len(world.prompts[1]) + 1, PAGE)]
    assert cached == {(number, None, page) for number in (None, own) for page in pages}
    assert set(subscriber.blocks.values()) == {(None, None, tuple(MARKER))}


def test_everything_unsupported_is_refused_at_start_up_in_one_message(world: World, tmp_path: Path) -> None:
    flags = ["--enable-session-radix-cache", "--enable-lmcache", "--enable-torch-compile", "--kv-cache-dtype"]
    given = ["--adapter-memory", "unified", *flags, "bf16"]
    with pytest.raises(RuntimeError) as error, running(world.model, *given, log=tmp_path / "log", warm=True):
        pass
    (message,) = {line for line in str(error.value).splitlines() if line.startswith("ValueError: sglang-blocklora")}
    assert all(flag in message for flag in flags), message
    assert "Use --adapter-memory static" in message
