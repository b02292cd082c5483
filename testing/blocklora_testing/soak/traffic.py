"""Requests that are as they should be, over every route that chooses an adapter, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from blocklora_testing.soak.client import Answer
from blocklora_testing.soak.run import SERVED, Asked, Run
from blocklora_testing.soak.world import CHAT, LONG_TOKENS

# Kind -> share of requests.
KINDS = {
    "generate": 30,
    "generate, streamed": 12,
    "generate, list": 14,
    "salted": 6,
    "extra key": 4,
    "n = 2": 3,
    "completions": 12,
    "chat": 4,
    "responses": 2,
    "messages": 2,
}


def sampling(tokens: int, **more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **more}


class Traffic:
    """What well-behaved clients send."""

    def __init__(self, run: Run) -> None:
        self._run = run

    async def one(self, rng: Random) -> None:
        """One call of a random kind."""
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "generate, list":
            await self._list(kind, rng)
        elif kind == "completions":
            await self._completions(kind, rng)
        elif kind in ("chat", "responses", "messages"):
            await self._messages(kind, rng)
        else:
            await self._generate(kind, rng)

    def body(self, asked: Asked, **more: Any) -> dict[str, Any]:
        """Of ``/generate``."""
        ids = list(self._run.world.prompts[asked.prompt])
        return {"input_ids": ids, "lora_path": asked.name, "sampling_params": sampling(asked.tokens)} | more

    async def _generate(self, kind: str, rng: Random) -> None:
        run, asked = self._run, self._run.asked(rng)
        body = self.body(asked)
        if kind == "salted":
            body["cache_salt"] = rng.choice("abc")
        elif kind == "extra key":  # what other requests of this server hold as ids of adapters looks like this
            body["extra_key"] = rng.choice(["tenant", f"{rng.getrandbits(128):032x}", "0" * 32])
        elif kind == "n = 2":
            body["sampling_params"]["n"] = 2
        send = run.client.stream if kind == "generate, streamed" else run.client.call
        answer = await send("/generate", body)
        self.judge(kind, [asked], answer, answer.body if isinstance(answer.body, list) else [answer.body])

    async def _list(self, kind: str, rng: Random) -> None:
        run = self._run
        tokens = rng.randint(1, 4)
        many = [Asked(name=run.name(rng), prompt=rng.randrange(run.world.long), tokens=tokens) for _ in range(6)]
        body = self.body(many[0]) | {
            "input_ids": [list(run.world.prompts[one.prompt]) for one in many],
            "lora_path": [one.name for one in many],
        }
        answer = await run.client.call("/generate", body)
        self.judge(kind, many, answer, answer.body)

    def judge(
        self, kind: str, asked: Sequence[Asked], answer: Answer, found: Sequence[Any], aborted: bool = False
    ) -> None:
        """Count answers of ``/generate``: several to one request (n), or one to each."""
        if answer.status != 200:
            self._run.judge_refusal(kind, asked, answer)
            return
        for i, one in enumerate(found):
            ended, who = one["meta_info"]["finish_reason"], asked[min(i, len(asked) - 1)]
            if ended.get("status_code"):  # of a stream, whose status had been sent before it was refused
                self._run.judge_refusal(kind, [who], replace(answer, status=ended["status_code"], body=ended))
            else:
                self._run.judge(kind, who, answer, one["output_ids"], ended["type"], aborted)

    async def _completions(self, kind: str, rng: Random) -> None:
        run, asked = self._run, self._run.asked(rng)
        body = {
            "model": self._model(asked.name, rng),
            "prompt": list(run.world.prompts[asked.prompt]),
            "max_tokens": asked.tokens,
            "temperature": 0,
            "return_token_ids": True,
        }
        answer = await run.client.call("/v1/completions", body)
        if answer.status != 200:
            run.judge_refusal(kind, [asked], answer)
            return
        choice = answer.body["choices"][0]
        run.judge(kind, asked, answer, choice["token_ids"], choice["finish_reason"])

    def _model(self, name: str | None, rng: Random) -> str:
        if name is None:
            return rng.choice([SERVED, "default"])
        return rng.choice([name, f"{SERVED}:{name}"])

    async def _messages(self, kind: str, rng: Random) -> None:
        """Routes that take messages: what they answer is text."""
        run = self._run
        asked = Asked(name=run.name(rng), prompt=0, tokens=4)
        model, messages = self._model(asked.name, rng), [{"role": "user", "content": CHAT}]
        path, body, text = {
            "chat": (
                "/v1/chat/completions",
                {"messages": messages, "max_tokens": asked.tokens},
                lambda answer: answer["choices"][0]["message"]["content"] or "",
            ),
            "responses": (
                "/v1/responses",
                {"input": CHAT, "max_output_tokens": asked.tokens + 2},  # SGLang keeps two back
                lambda answer: "".join(part["text"] for one in answer["output"] for part in one["content"]),
            ),
            "messages": (
                "/v1/messages",
                {"messages": messages, "max_tokens": asked.tokens},
                lambda answer: "".join(part["text"] for part in answer["content"]),
            ),
        }[kind]
        answer = await run.client.call(path, {"model": model, "temperature": 0, **body})
        if answer.status != 200:
            run.judge_refusal(kind, [asked], answer)
            return
        ended = answer.body["choices"][0]["finish_reason"] if kind == "chat" else None
        run.judge(kind, asked, answer, text(answer.body), ended)

    async def leave(self, rng: Random) -> None:
        """A client that closes its connection in the middle of an answer, or before one came."""
        run, kind = self._run, "left by the client"
        asked = Asked(name=run.name(rng), prompt=run.world.long, tokens=LONG_TOKENS)
        if rng.random() < 0.5:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.uniform(0.01, 0.3)):
                    await run.client.call("/generate", self.body(asked))
            run.tally.right(kind, 0.0)
            return
        events = rng.randint(1, 5)
        answer = await run.client.stream("/generate", self.body(asked), leave_after=events)
        if answer.status != 200:
            run.judge_refusal(kind, [asked], answer)
            return
        found = answer.body["output_ids"]
        run.judge(kind, Asked(name=asked.name, prompt=asked.prompt, tokens=len(found)), answer, found, None)

    async def abort(self, rng: Random) -> None:
        """A request that is aborted by its id, streamed or not, with one answer or two."""
        run, n = self._run, rng.randint(1, 2)
        kind = f"aborted, n = {n}"
        asked = Asked(name=run.name(rng), prompt=run.world.long, tokens=LONG_TOKENS)
        rid = f"{rng.getrandbits(64):016x}"
        body = self.body(asked, rid=rid, sampling_params=sampling(asked.tokens, n=n))
        send = run.client.stream if n == 1 and rng.random() < 0.5 else run.client.call
        task = asyncio.ensure_future(send("/generate", body))
        await asyncio.sleep(rng.uniform(0.05, 0.4))
        await run.client.call("/abort_request", {"rid": rid}, admin=True)
        answer = await task
        if answer.status == 400 and "aborted" in str(answer.body):  # how several answers are aborted
            run.tally.aborted(kind)
        else:
            self.judge(kind, [asked], answer, answer.body if isinstance(answer.body, list) else [answer.body], True)
