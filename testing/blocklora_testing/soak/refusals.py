"""Requests that must be refused, each with the statuses that it may get, and some that look so and are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from blocklora_testing.models import VOCAB
from blocklora_testing.soak.run import SERVED, Run
from blocklora_testing.soak.traffic import sampling

INVALID = (400, 422)
NO_NAMES = ("", " ", "\t", " a", "a\0b", "a\nb", "\ud800", "\u202e", "x" * 5000)  # which no adapter can have
UNKNOWN = ("nobody", "..", ".", "../loaded/b00", "x/../../y", "/", "B00", *NO_NAMES[1:])


@dataclass(frozen=True, kw_only=True)
class Bad:
    """One request: where, what, and the statuses that are right for it."""

    path: str
    body: Any
    expected: tuple[int, ...] = INVALID
    admin: bool = False


def marks(content_hash: str, slots: int) -> list[int]:
    """What an adapter's prefix was called in the radix tree by the first release, from what ``GET /adapters`` tells."""
    value = int(content_hash, 16)
    pieces = [value >> (i * 42) & ((1 << 42) - 1) for i in range(4)]
    return [1 << 62 | pieces[i % 4] << 20 | i for i in range(slots)]


class Refusals:
    """Bad requests by kind; each is made anew from random numbers."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._facts: list[dict[str, Any]] = []
        self.kinds: dict[str, Callable[[Random], Bad]] = {
            "ids beyond the vocabulary": self._beyond_vocabulary,
            "ids that are no numbers": self._no_numbers,
            "pseudo tokens": self._pseudo_tokens,
            "token ids in other fields": self._ids_elsewhere,
            "lists of the wrong length": self._wrong_length,
            "unknown models": self._unknown_model,
            "unknown adapters": self._unknown_adapter,
            "names that cannot be": self._hostile_name,
            "names that are taken": self._taken_name,
            "paths that cannot be": self._hostile_path,
            "empty prompts": self._empty_prompt,
            "prompts that are too long": self._long_prompt,
            "bodies that cannot be": self._bad_body,
            "no admin key": self._no_key,
            "unload and pin of nobody": self._nobody,
        }

    async def one(self, rng: Random) -> None:
        """One bad request of a random kind."""
        run, kind = self._run, rng.choice(sorted(self.kinds))
        if not self._facts or rng.random() < 0.05:
            answer = await run.client.call("/adapters?limit=1000", method="GET")
            self._facts = answer.body["data"]
        bad = self.kinds[kind](rng)
        answer = await run.client.call(bad.path, bad.body, admin=bad.admin)
        if answer.status in bad.expected:
            run.tally.refused(f"bad: {kind}", answer.end - answer.begin)
        elif "'type': 'abort'" in str(answer.body) and run.ledger.stormy(answer.begin, answer.end):
            run.tally.aborted(f"bad: {kind}")  # before it was its turn to be refused
        else:
            text = f"{bad.path} {str(bad.body)[:200]}: {answer.status} {str(answer.body)[:200]}, not {bad.expected}"
            run.tally.problem(f"bad: {kind}", text)

    def _generate(self, rng: Random, **more: Any) -> Bad:
        name = self._run.popular[0] if rng.random() < 0.5 else None
        body = {"input_ids": [5, 6, 7], "lora_path": name, "sampling_params": sampling(2)}
        return Bad(path="/generate", body=body | more)

    def _beyond_vocabulary(self, rng: Random) -> Bad:
        wrong = rng.choice([VOCAB, VOCAB + 1, 10**6, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**70, -1, -(2**40)])
        ids = [5] * rng.randint(0, 3) + [wrong] + [6] * rng.randint(0, 3)
        if rng.random() < 0.3:
            return self._generate(rng, input_ids=[[5, 6], ids])
        if rng.random() < 0.3:
            prompt = rng.choice([ids, [[5, 6], ids]])
            return Bad(path="/v1/completions", body={"model": SERVED, "prompt": prompt, "max_tokens": 2})
        return self._generate(rng, input_ids=ids)

    def _no_numbers(self, rng: Random) -> Bad:
        return self._generate(rng, input_ids=rng.choice([["a"], [None], [5, 1.5], [[5], 6], {"a": 1}, "abc", [{}]]))

    def _pseudo_tokens(self, rng: Random) -> Bad:
        """An adapter's own key in the radix tree, as a client can compute it, with a prompt behind it."""
        fact = rng.choice([one for one in self._facts if one["content_hash"]] or [{"content_hash": "0" * 64}])
        ids = marks(fact["content_hash"], fact.get("slots") or 8)
        prompt = list(self._run.world.prompts[1])
        salt = rng.getrandbits(29) << 32
        ids = rng.choice([ids + prompt, ids, ids[:4], [token | salt | 1 << 32 for token in prompt]])
        path, field = rng.choice([("/generate", "input_ids"), ("/v1/completions", "prompt")])
        if field == "prompt":
            return Bad(path=path, body={"model": SERVED, "prompt": ids, "max_tokens": 2})
        return Bad(path=path, body={"input_ids": ids, "sampling_params": sampling(2)})

    def _ids_elsewhere(self, rng: Random) -> Bad:
        wrong = rng.choice([VOCAB, 10**6, -1, 2**40])
        if rng.random() < 0.5:
            params = sampling(2) | rng.choice([{"logit_bias": {str(wrong): 1.0}}, {"stop_token_ids": [wrong]}])
            return self._generate(rng, sampling_params=params)
        return self._generate(rng, return_logprob=True, token_ids_logprob=[wrong])

    def _wrong_length(self, rng: Random) -> Bad:
        names = rng.choice([[self._run.popular[0]], [None] * 3, [self._run.popular[0], None, None], []])
        body = {"input_ids": [[5, 6], [7, 8]], "lora_path": names, "sampling_params": sampling(2)}
        if rng.random() < 0.5:
            return Bad(path="/generate", body=body)
        completion = {"model": SERVED, "prompt": [[5, 6], [7, 8]], "max_tokens": 2, "lora_path": names}
        return Bad(path="/v1/completions", body=completion)

    def _unknown_model(self, rng: Random) -> Bad:
        model = rng.choice([f"{SERVED}:nobody", "nobody:b00", *UNKNOWN]).encode("utf-8", "replace").decode()
        messages = [{"role": "user", "content": "x"}]
        path, body = rng.choice(
            [
                ("/v1/completions", {"prompt": [5, 6], "max_tokens": 2}),
                ("/v1/chat/completions", {"messages": messages, "max_tokens": 2}),
                ("/v1/messages", {"messages": messages, "max_tokens": 2}),
                ("/v1/responses", {"input": "x", "max_output_tokens": 2}),
            ]
        )
        return Bad(path=path, body={"model": model, **body}, expected=(404,))

    def _unknown_adapter(self, rng: Random) -> Bad:
        name = rng.choice([SERVED, "default", f"{SERVED}:b00", *UNKNOWN])
        return self._generate(rng, lora_path=rng.choice([name, name, [name]]))

    def _hostile_name(self, rng: Random) -> Bad:
        return self._load(rng, rng.choice(NO_NAMES), str(self._run.place.loaded / "b00"))

    def _taken_name(self, rng: Random) -> Bad:
        """Names that could never be reached, or only in place of another."""
        taken = rng.choice([SERVED, "default", f"{SERVED}:b00", "default:b00", "b00"])
        return self._load(rng, taken, str(self._run.place.loaded / "b01"))

    def _hostile_path(self, rng: Random) -> Bad:
        place, outside = self._run.place, next(iter(self._run.world.contents.values()))
        path = rng.choice(
            [
                str(outside),
                f"{place.root}/../contents/{outside.name}",
                f"{place.loaded}/b00/../../../contents/{outside.name}",
                str(place.root / "link-out"),
                str(place.root / "link-loop"),
                str(place.root / "link-file"),
                "/etc",
                "/proc/self",
                "/dev/zero",
                "",
                ".",
                "..",
                "\0",
                "~",
                "a" * 5000,
                str(place.loaded),
                f"{place.loaded}/b00/adapter_config.json",
                "https://127.0.0.1/x",
                "file:///etc/passwd",
            ]
        )
        return self._load(rng, f"x{rng.randrange(10)}", path)

    def _load(self, rng: Random, name: str, path: str) -> Bad:
        route = rng.choice(["/load_lora_adapter", "/v1/load_lora_adapter"])
        expected = (403,) if path.startswith("https:") else Bad.expected  # a store that nobody may fetch from
        return Bad(path=route, body={"lora_name": name, "lora_path": path}, admin=True, expected=expected)

    def _empty_prompt(self, rng: Random) -> Bad:
        if rng.random() < 0.3:
            return Bad(path="/v1/completions", body={"model": SERVED, "prompt": rng.choice(["", []]), "max_tokens": 2})
        return self._generate(rng, input_ids=rng.choice([[], [[]], [[5, 6], []]]))

    def _long_prompt(self, rng: Random) -> Bad:
        return self._generate(
            rng, input_ids=[5] * rng.choice([self._run.pool_tokens, self._run.pool_tokens + 1, 2047, 2048, 5000])
        )

    def _bad_body(self, rng: Random) -> Bad:
        path = rng.choice(["/generate", "/v1/completions", "/load_lora_adapter", "/v1/load_lora_adapter"])
        body = rng.choice([b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"', b'{"a":' * 500, b"{}"])
        return Bad(path=path, body=body, admin=True)

    def _no_key(self, rng: Random) -> Bad:
        path, body = rng.choice(
            [
                ("/load_lora_adapter", {"lora_name": "x", "lora_path": str(self._run.place.loaded / "b00")}),
                ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(self._run.place.loaded / "b00")}),
                ("/unload_lora_adapter", {"lora_name": "b00"}),
                ("/v1/unload_lora_adapter", {"lora_name": "b00"}),
                ("/adapters/b00/pin", {}),
                ("/adapters/b00/unpin", {}),
                ("/flush_cache", {}),
                ("/pause_generation", {"mode": "in_place"}),
                ("/abort_request", {"abort_all": True}),
            ]
        )
        return Bad(path=path, body=body, expected=(401,))

    def _nobody(self, rng: Random) -> Bad:
        path, body = rng.choice(
            [
                ("/v1/unload_lora_adapter", {"lora_name": "nobody"}),
                ("/unload_lora_adapter", {"lora_name": "nobody"}),
                ("/adapters/nobody/pin", {}),
                ("/adapters/../b00/unpin", {}),
                ("/adapters/nobody/unpin", {}),
            ]
        )
        return Bad(path=path, body=body, expected=(400, 404), admin=True)
