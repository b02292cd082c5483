"""Plays a workload against a server's streaming /generate and measures what a user sees.

Open loop: sessions start at their times whatever the server does; a turn waits for the answer before it and its think
time, and sends the whole conversation so far. Times are the client's, queueing included.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from tqdm import tqdm

from benchmark.serving.workload import Session

REQUEST_TIMEOUT_S = 240


@dataclass
class Answer:
    """One request as the client saw it.

    ``ttft_s``, ``last_s``  from sending to the first and to the last token
    ``itl_s``               gaps between tokens; tokens of one chunk share its gap evenly
    ``error``               what went wrong, None where all tokens came
    """

    adapter: int
    wanted_tokens: int
    ttft_s: float = math.nan
    last_s: float = math.nan
    tokens: list[int] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    def receive(self, at_s: float, tokens: list[int]) -> None:
        """Take all ``tokens`` so far, some of which came now."""
        fresh = len(tokens) - len(self.tokens)
        if fresh and not self.tokens:
            self.ttft_s = at_s
        elif fresh:
            self.itl_s += [(at_s - self.last_s) / fresh] * fresh
        self.last_s, self.tokens = at_s, tokens

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.last_s - self.ttft_s) / (len(self.tokens) - 1) if len(self.tokens) > 1 else math.nan


class Dialect:
    """How a server is asked: SGLang's ``/generate``. An engine that has another one overrides all of it."""

    path = "/generate"
    flush_path = "/flush_cache"
    end: tuple[str, ...] = ("meta_info", "completion_tokens")  # where an answer that is not streamed says its length

    def body(self, prompt: list[int], adapter: str | None, new_tokens: int, stream: bool) -> dict[str, Any]:
        """A request for exactly ``new_tokens`` greedy tokens."""
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        return {"input_ids": prompt, "lora_path": adapter, "stream": stream, "sampling_params": sampling}

    def receive(self, answer: Answer, at_s: float, chunk: Mapping[str, Any]) -> None:
        """Take one chunk of the stream, which carries all tokens so far."""
        if "error" in chunk:
            answer.error = str(chunk["error"])[:300]
            return
        answer.receive(at_s, chunk["output_ids"])
        answer.prompt_tokens = chunk["meta_info"]["prompt_tokens"]
        answer.cached_tokens = chunk["meta_info"]["cached_tokens"]


SGLANG = Dialect()


async def ask(
    http: aiohttp.ClientSession,
    url: str,
    prompt: list[int],
    adapter: str | None,
    answer: Answer,
    dialect: Dialect = SGLANG,
) -> None:
    """Send one request and fill ``answer`` as its tokens arrive."""
    body = dialect.body(prompt, adapter, answer.wanted_tokens, stream=True)
    sent = time.perf_counter()
    try:
        async with http.post(f"{url}{dialect.path}", json=body) as response:
            if response.status != 200:
                answer.error = f"{response.status} {(await response.text())[:300]}"
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    dialect.receive(answer, time.perf_counter() - sent, json.loads(line[6:]))
    except (aiohttp.ClientError, TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    if answer.error is None and len(answer.tokens) != answer.wanted_tokens:
        answer.error = f"{len(answer.tokens)} of {answer.wanted_tokens} tokens"


async def converse(
    http: aiohttp.ClientSession, url: str, session: Session, adapter: str | None, progress: tqdm, dialect: Dialect
) -> list[Answer]:
    """One session; behind a failed turn the others are not sent and count as failed too."""
    answers = [Answer(session.adapter, turn.new_tokens) for turn in session.turns]
    await asyncio.sleep(session.arrival_s)
    prompt: list[int] = []
    for turn, answer in zip(session.turns, answers, strict=True):
        await asyncio.sleep(turn.think_s)
        prompt = [*prompt, *turn.tokens.tolist()]
        await ask(http, url, prompt, adapter, answer, dialect)
        progress.update()
        if answer.error:
            break
        prompt += answer.tokens
    for answer in answers:
        if not answer.tokens and not answer.error:
            answer.error = "a turn before it failed"
    return answers


async def _play(
    url: str, sessions: Sequence[Session], names: Sequence[str | None], label: str, dialect: Dialect
) -> list[Answer]:
    total = sum(len(session.turns) for session in sessions)
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    with tqdm(total=total, desc=label, unit="request", leave=False, disable=None) as progress:
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
            runs = (converse(http, url, session, names[session.adapter], progress, dialect) for session in sessions)
            return [answer for answers in await asyncio.gather(*runs) for answer in answers]


def at_once(url: str, requests: Sequence[tuple[list[int], str | None]], tokens: int, dialect: Dialect) -> list[Answer]:
    """Answers of ``tokens`` greedy tokens to all ``requests``, sent at the same time, in their order."""

    async def all_of_them() -> list[Answer]:
        answers = [Answer(0, tokens) for _ in requests]
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)) as http:
            asked = zip(requests, answers, strict=True)
            await asyncio.gather(*(ask(http, url, prompt, name, answer, dialect) for (prompt, name), answer in asked))
        return answers

    return asyncio.run(all_of_them())


def whole(url: str, requests: Sequence[tuple[list[int], str | None]], tokens: int, dialect: Dialect) -> float:
    """Seconds until all ``requests``, sent at the same time and not streamed, have their answers of ``tokens``.

    Streams cost an engine's HTTP process time, which on few cores its ranks miss.
    """

    async def one(http: aiohttp.ClientSession, prompt: list[int], adapter: str | None) -> None:
        body = dialect.body(prompt, adapter, tokens, stream=False)
        async with http.post(f"{url}{dialect.path}", json=body) as response:
            answer = await response.json()
            length = functools.reduce(lambda found, key: found[key], dialect.end, answer)
            if response.status != 200 or length != tokens:
                raise RuntimeError(f"{response.status}, {length} of {tokens} tokens: {str(answer)[:300]}")

    async def all_of_them() -> float:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)) as http:
            started = time.perf_counter()
            await asyncio.gather(*(one(http, *request) for request in requests))
            return time.perf_counter() - started

    return asyncio.run(all_of_them())


def play(
    url: str, sessions: Sequence[Session], names: Sequence[str | None], label: str, dialect: Dialect = SGLANG
) -> tuple[list[Answer], float]:
    """Answers to all requests of ``sessions``, and the seconds from the first arrival to the last token.

    ``names[i]``: what adapter i is called on this server; None for the base model.
    """
    started = time.perf_counter()
    answers = asyncio.run(_play(url, sessions, names, label, dialect))
    return answers, time.perf_counter() - started


def summary(
    answers: Sequence[Answer], wall_s: float, slo_ttft_s: float, slo_tpot_s: float = math.inf
) -> dict[str, float]:
    """Figures of one pass. A failed request misses the SLO and counts in no latency."""
    done = [answer for answer in answers if answer.error is None]
    if not done:
        raise RuntimeError(f"all {len(answers)} requests failed; the first: {answers[0].error}")
    latencies = {
        "ttft_ms": [answer.ttft_s for answer in done],
        "tpot_ms": [answer.tpot_s for answer in done if len(answer.tokens) > 1],
        "itl_ms": [gap for answer in done for gap in answer.itl_s],
    }
    worst = max(np.percentile([a.ttft_s for a in done if a.adapter == i], 99) for i in {a.adapter for a in done})
    return {
        **{f"{name}_p{p}": percentile_ms(values, p) for name, values in latencies.items() for p in (50, 99)},
        "worst_adapter_ttft_ms_p99": float(worst) * 1000,
        "requests_per_s": len(done) / wall_s,
        "output_tokens_per_s": sum(len(answer.tokens) for answer in done) / wall_s,
        "slo_attainment": sum(answer.ttft_s <= slo_ttft_s and not answer.tpot_s > slo_tpot_s for answer in done)
        / len(answers),
        "kv_hit_rate": sum(answer.cached_tokens for answer in done) / sum(answer.prompt_tokens for answer in done),
        "requests": len(answers),
        "failed_requests": len(answers) - len(done),
    }


def percentile_ms(seconds: Sequence[float], percentile: int) -> float:
    """That percentile in milliseconds, NaN of nothing."""
    return float(np.percentile(seconds, percentile)) * 1000 if len(seconds) else math.nan
