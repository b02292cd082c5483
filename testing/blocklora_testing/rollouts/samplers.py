"""Samples from names that are being updated, and holds every answer to the version that it names."""

from __future__ import annotations

from random import Random
from typing import Any

from blocklora_testing.rollouts.run import Run
from blocklora_testing.soak.client import Answer
from blocklora_testing.soak.world import LONG_TOKENS, NEW_TOKENS

WAYS = ("generate", "generate", "stream", "batch", "completions", "demand")


class Sampler:
    """One client."""

    def __init__(self, run: Run, number: int) -> None:
        self._run = run
        self._rng = Random(f"{run.seed}/sampler/{number}")

    async def run(self) -> None:
        while not self._run.over:
            await self._one(self._rng.choice(WAYS))

    async def _one(self, way: str) -> None:
        run, rng = self._run, self._rng
        name, prompt = rng.choice(run.names), rng.randrange(len(run.world.prompts))
        body = self._body(name, prompt)
        if way == "generate":
            self._judge(way, name, prompt, await run.client.call("/generate", body))
        elif way == "stream":
            self._judge(way, name, prompt, await run.client.stream("/generate", body))
        elif way == "batch":
            await self._batch(rng)
        elif way == "completions":
            await self._completions(name, prompt)
        else:
            await self._demand(name, prompt, body)

    def _body(self, name: str | list[str], prompt: int) -> dict[str, Any]:
        tokens = LONG_TOKENS if prompt == self._run.world.long else NEW_TOKENS
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        return {"input_ids": self._run.world.prompts[prompt], "lora_path": name, "sampling_params": params}

    async def _batch(self, rng: Random) -> None:
        """Every name twice, and two answers to each: those of one name are of one version."""
        run, prompt = self._run, rng.randrange(self._run.world.long)
        names = [*run.names, *run.names]
        body = self._body(names, prompt)
        body["input_ids"] = [body["input_ids"]] * len(names)
        body["sampling_params"] |= {"n": 2}
        answer = await run.client.call("/generate", body)
        if answer.status != 200:
            run.tally.problem("batch", f"{answer.status} {str(answer.body)[:300]}")
            return
        versions: dict[str, set[str]] = {}
        for i, one in enumerate(answer.body):
            name = names[i // 2]
            versions.setdefault(name, set()).add(str(one["meta_info"].get("adapter_version")))
            self._judge("batch", name, prompt, answer, one)
        mixed = {name: found for name, found in versions.items() if len(found) > 1}
        if mixed:
            run.tally.problem("batch", f"several versions of a name: {mixed}")

    async def _completions(self, name: str, prompt: int) -> None:
        """The header and the field tell alike; tokens come as text, which other tests compare."""
        run = self._run
        body = {"model": name, "prompt": run.world.prompts[prompt], "max_tokens": 1, "temperature": 0}
        answer = await run.client.call("/v1/completions", body)
        if answer.status != 200 or answer.body["metadata"]["adapter_version"] != answer.version:
            run.tally.problem("completions", f"{answer.status} {answer.version} {str(answer.body)[:300]}")
        elif self._current("completions", name, answer, answer.version):
            run.tally.right("completions", answer.end - answer.begin)

    async def _demand(self, name: str, prompt: int, body: Any) -> None:
        """A version that the name had a while ago, or has: it answers, or nobody does."""
        run = self._run
        versions = [version for version in run.ledger.contents if self._rng.random() < 0.3][-3:]
        listed = await run.client.call("/adapters", method="GET")
        versions += [one["version"] for one in listed.body["data"] if one["name"] == name]
        demanded = self._rng.choice(versions)
        answer = await run.client.call("/generate", body, version=demanded)
        if answer.status == 409:
            run.tally.refused("demand", answer.end - answer.begin)
        elif answer.status == 200 and answer.body["meta_info"]["adapter_version"] != demanded:
            run.tally.problem("demand", f"{demanded} was demanded: {answer.body['meta_info']}")
        else:
            self._judge("demand", name, prompt, answer)

    def _judge(self, kind: str, name: str, prompt: int, answer: Answer, body: Any = None) -> None:
        """The version may be the name's, and the tokens are PEFT's for that."""
        run, body = self._run, answer.body if body is None else body
        if answer.status != 200:
            run.tally.problem(kind, f"{name}: {answer.status} {str(body)[:300]}")
            return
        version = body["meta_info"].get("adapter_version")
        if not self._current(kind, name, answer, version):
            return
        contents, found = run.ledger.contents[version], body["output_ids"]
        wanted = LONG_TOKENS if prompt == run.world.long else NEW_TOKENS
        if len(found) != wanted or not run.world.right(contents, prompt, found):
            who = run.world.who(prompt, found)
            run.tally.problem(f"{kind}: tokens", f"{name} {version} ({contents}), prompt {prompt}: {found}, as {who}")
            return
        run.tally.right(kind, answer.end - answer.begin)

    def _current(self, kind: str, name: str, answer: Answer, version: str | None) -> bool:
        run = self._run
        possible = run.ledger.possible(name, answer.begin, answer.end)
        contents = run.ledger.contents.get(version or "")
        if contents is None and version is not None:
            # The update's own answer is still on its way; it is the newest, so what it holds is known.
            newest = run.ledger.updates[name][-1]
            if newest.ready is None:
                wrong = run.ledger.told(version, newest.contents)
                contents = None if wrong else newest.contents
        if contents not in possible:
            run.tally.problem(f"{kind}: stale", f"{name}: {version} ({contents}); possible were {sorted(possible)}")
            return False
        return True
