"""Random requests to a live server: nothing crashes or leaves the root, and no wrong adapter answers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

from blocklora_testing.fuzz import cases
from blocklora_testing.fuzz.run import FAILURES_KEPT, Row
from blocklora_testing.server import Server, running
from blocklora_testing.soak import world
from blocklora_testing.soak.checks import FAILURES, alive, log_is_clean
from blocklora_testing.soak.client import ADMIN_KEY, Answer, Client, NoAnswer
from blocklora_testing.soak.traffic import sampling
from blocklora_testing.soak.world import CHAT, World

BASE = "org/base"
LOADED = {"sql": "c0", "legal": "c1", "a:b": "c2"}
NAMED = {"a b": "c3", "ünï": "c4", "deep.er": "c5"}  # loaded when they are named
CLIENTS = 12
DEADLINE_S = 60


@dataclass
class Fuzz:
    """Cases by kind, against ``LOADED`` and ``NAMED`` below one root."""

    client: Client
    world: World
    root: Path
    rows: dict[str, Row] = field(default_factory=lambda: defaultdict(Row))
    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    _loads: int = 0
    _loaded: set[str] = field(default_factory=set)  # names that a case may have loaded, for its length

    @property
    def names(self) -> dict[str | None, str | None]:
        """What ``lora_path`` may be, and whose answer it gets."""
        return {None: None, **LOADED, **NAMED}

    @property
    def kinds(self) -> dict[str, tuple[int, Callable[[Random], Awaitable[None]]]]:
        return {
            "as it should be": (15, self._sound),
            "/generate": (25, self._generate),
            "/generate, names": (10, self._lora_path),
            "OpenAI routes": (20, self._openai),
            "OpenAI routes, names": (15, self._model),
            "loads": (10, self._load),
            "reports": (5, self._reports),
        }

    async def one(self, rng: Random) -> None:
        """One case; what is wrong with it is a failure of its kind."""
        shares = {kind: share for kind, (share, _) in self.kinds.items()}
        kind = rng.choices(list(shares), list(shares.values()))[0]
        row, begin = self.rows[kind], time.monotonic()
        row.cases += 1
        try:
            await self.kinds[kind][1](rng)
        except (AssertionError, NoAnswer) as error:
            row.failed += 1
            if len(row.failures) < FAILURES_KEPT:
                row.failures.append(f"{kind}: {type(error).__name__}: {str(error)[:700]}")
            if not isinstance(error, AssertionError):
                await asyncio.sleep(1)  # the server may have ended
        row.seconds += time.monotonic() - begin

    async def _send(self, kind: str, path: str, body: Any = None, **options: Any) -> Answer:
        answer = await self.client.call(path, body, **options)
        self.statuses[kind][answer.status] += 1
        assert answer.status < 500, f"{answer.status} to {path} {body!r:.400}: {str(answer.body)[:200]}"
        return answer

    def _body(self, rng: Random, name: str | None) -> tuple[int, dict[str, Any]]:
        prompt = rng.randrange(self.world.long)
        ids = list(self.world.prompts[prompt])
        return prompt, {"input_ids": ids, "lora_path": name, "sampling_params": sampling(rng.randint(1, 4))}

    async def _sound(self, rng: Random) -> None:
        name = rng.choice(list(self.names))
        prompt, body = self._body(rng, name)
        answer = await self._send("as it should be", "/generate", body)
        assert answer.status == 200, f"{body}: {answer.status} {answer.body}"
        self._compare(self.names[name], prompt, answer.body["output_ids"], body)

    def _compare(self, contents: str | None, prompt: int, found: list[int], sent: Any) -> None:
        assert self.world.right(contents, prompt, found), (
            f"{sent!r:.300}: {found} is not of {contents}, but of {self.world.who(prompt, found)}"
        )

    async def _generate(self, rng: Random) -> None:
        """Anything changed. Where prompt and parameters are left as they were, the answer is compared all the same."""
        prompt, body = self._body(rng, rng.choice(list(self.names)))
        more = {"extra_key": "x", "cache_salt": "y", "return_logprob": True, "logprob_start_len": -1}
        more |= {"top_logprobs_num": 1, "token_ids_logprob": [5], "rid": None, "priority": None, "session_params": None}
        sound = body | {key: more[key] for key in rng.sample(sorted(more), 2)}
        changed = cases.mutated(rng, sound, self._words())
        sent = json.dumps(changed).encode()
        sent = cases.broken(rng, sent) if rng.random() < 0.05 else sent
        answer = await self._send("/generate", "/generate", sent)
        same = all(changed.get(key) == body[key] for key in ("input_ids", "sampling_params"))
        if answer.status == 200 and same and sent == json.dumps(changed).encode() and isinstance(answer.body, dict):
            self._compare_named(changed.get("lora_path"), prompt, answer, changed)

    def _compare_named(self, name: Any, prompt: int, answer: Answer, sent: Any) -> None:
        if isinstance(name, str) and name in self._loaded:
            return
        known = (name is None or isinstance(name, str)) and name in self.names
        assert known, f"{sent!r:.300}: 200 for an adapter that is not there"
        self._compare(self.names[name], prompt, answer.body["output_ids"], sent)

    async def _lora_path(self, rng: Random) -> None:
        name = cases.text(rng, self._words()) if rng.random() < 0.7 else cases.path(rng, self._words())
        prompt, body = self._body(rng, name)
        answer = await self._send("/generate, names", "/generate", body)
        if answer.status == 200:
            self._compare_named(name, prompt, answer, body)
        else:
            assert name not in self.names, f"{body}: {answer.status} {answer.body}"

    def _routes(self, rng: Random) -> tuple[str, dict[str, Any]]:
        messages = [{"role": "user", "content": CHAT}]
        ids = list(self.world.prompts[rng.randrange(self.world.long)])
        return rng.choice(
            (
                ("/v1/completions", {"prompt": ids, "max_tokens": 2, "logprobs": 1, "stop": ["x"], "n": 1}),
                ("/v1/completions", {"prompt": [ids, ids], "max_tokens": 2, "lora_path": ["sql", None], "echo": False}),
                ("/v1/chat/completions", {"messages": messages, "max_tokens": 2, "logit_bias": {"5": 1}, "seed": 1}),
                ("/v1/responses", {"input": CHAT, "max_output_tokens": 2, "instructions": "x", "store": False}),
                ("/v1/messages", {"messages": messages, "max_tokens": 2, "system": "x", "stop_sequences": ["x"]}),
                ("/v1/score", {"query": [5, 6], "items": [[7]], "label_token_ids": [8, 9], "apply_softmax": True}),
                ("/v1/embeddings", {"input": "x"}),
                ("/tokenize", {"prompt": "x"}),
                ("/detokenize", {"tokens": [5, 6]}),
                ("/api/generate", {"prompt": "x", "stream": False, "options": {"num_predict": 2}}),
                ("/api/chat", {"messages": messages, "stream": False, "options": {"num_predict": 2}}),
            )
        )

    async def _openai(self, rng: Random) -> None:
        path, sound = self._routes(rng)
        sound = {"model": rng.choice([BASE, "sql", f"{BASE}:legal", "a b"]), "temperature": 0, **sound}
        await self._send("OpenAI routes", path, cases.body(rng, sound, self._words()))

    async def _model(self, rng: Random) -> None:
        """``model`` is whatever it is: the answer is that of what it names, or a 404."""
        model = cases.text(rng, [*self._words(), BASE, f"{BASE}:", "default:", *(f"{BASE}:{n}" for n in LOADED)])
        prompt = rng.randrange(self.world.long)
        body = {"model": model, "prompt": list(self.world.prompts[prompt]), "max_tokens": 4, "temperature": 0}
        answer = await self._send("OpenAI routes, names", "/v1/completions", body | {"return_token_ids": True})
        meant = {f"{prefix}:{name}": c for prefix in (BASE, "default") for name, c in self.names.items() if name}
        meant |= {BASE: None, "default": None, **{name: c for name, c in self.names.items() if name}}
        if model in meant:
            assert answer.status == 200, f"{model!r}: {answer.status} {answer.body}"
            self._compare(meant[model], prompt, answer.body["choices"][0]["token_ids"], model)
        elif model and self._adapter(model) not in self._loaded:  # an empty one may be taken for none
            assert answer.status in (400, 404), f"{model!r}: {answer.status}"

    def _adapter(self, model: str) -> str:
        return model.removeprefix(f"{BASE}:").removeprefix("default:")

    async def _load(self, rng: Random) -> None:
        """Any name, any path: what loads lies below the root, is reached by its name, and hides nobody."""
        self._loads += 1
        name = cases.text(rng, [*self._words(), BASE, f"{BASE}:sql"])
        name = f"x{self._loads}{name}" if rng.random() < 0.5 else name
        start = rng.choice((str(self.root), str(self.root.parent), f"{self.root}/loaded", ""))
        words = ("sql", "loaded", "named", "root", "contents", "c0", "link-out", "link-in", self.root.parent.name)
        path = rng.choice((f"{start}/{cases.path(rng, words)}", f"{self.root}/loaded/legal", cases.path(rng, words)))
        route = rng.choice(("/load_lora_adapter", "/v1/load_lora_adapter"))
        self._loaded |= {name} - self.names.keys()
        answer = await self._send("loads", route, {"lora_name": name, "lora_path": path}, admin=True)
        if answer.status != 200:
            return
        real = os.path.realpath(path)
        try:
            assert real.startswith(f"{self.root}/"), f"{path!r} was loaded, which is {real}"
            contents = LOADED.get(Path(real).name) or NAMED[Path(real).name]
            body = {"model": name, "prompt": list(self.world.prompts[0]), "max_tokens": 4, "temperature": 0}
            found = await self._send("loads", "/v1/completions", body | {"return_token_ids": True})
            assert found.status == 200, f"{name!r} was loaded and is not found: {found.body}"
            self._compare(contents, 0, found.body["choices"][0]["token_ids"], f"{name!r} loaded from {path!r}")
        finally:
            gone = await self._send("loads", "/v1/unload_lora_adapter", {"lora_name": name}, admin=True)
        assert gone.status == 200, f"unload of {name!r}: {gone.status} {gone.body}"

    async def _reports(self, rng: Random) -> None:
        word = quote(cases.text(rng, self._words()).encode("utf-8", "replace"), safe=rng.choice(("", "/")))
        path, method = rng.choice(
            (
                (f"/v1/models/{word}", "GET"),
                (f"/adapters?after={word}", "GET"),
                (f"/adapters?limit={word}", "GET"),
                (f"/adapters/{word}/pin", "POST"),
                (f"/adapters/{word}/unpin", "POST"),
                ("/v1/models", "GET"),
            )
        )
        await self._send("reports", path, None if method == "GET" else {}, method=method, admin=True)

    def _words(self) -> list[str]:
        return [*LOADED, *NAMED, "c0", "lora_path", "input_ids", "max_new_tokens", "text", "base"]


def fuzz_server(folder: Path, count: int, seed: int) -> tuple[dict[str, Row], dict[str, Counter[int]], list[Any]]:
    """``count`` cases; rows and statuses by kind, and what must hold at the end."""
    made = world.build(folder, contents=6, prompts=5, seed=seed)
    root = folder.resolve() / "root"
    for place, names in (("loaded", LOADED), ("named", NAMED)):
        for name, contents in names.items():
            shutil.copytree(made.contents[contents], root / place / name)
    (root / "link-out").symlink_to(folder / "contents" / "c0")
    (root / "link-in").symlink_to(root / "loaded" / "sql")
    flags = ["--tp", "2", "--served-model-name", BASE, "--admin-api-key", ADMIN_KEY, "--max-total-tokens", "1024"]
    flags += ["--adapter-root", str(root), "--adapter-dir", str(root / "named"), "--max-running-requests", "8"]
    # Pins may take half of the slots: the longest request has room beside them, whenever they come.
    flags += ["--context-length", "256"]
    flags += ["--lora-paths", *(f"{name}={root / 'loaded' / name}" for name in LOADED)]
    debug = {"SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1"}
    with running(made.model, *flags, log=folder / "log", environment=debug, sound=False, warm=True) as server:
        fuzz = asyncio.run(_fuzz(server, made, root, count, seed))
        return fuzz.rows, fuzz.statuses, [alive(server), log_is_clean(server, FAILURES)]


async def _fuzz(server: Server, made: World, root: Path, count: int, seed: int) -> Fuzz:
    async with Client(server.url, DEADLINE_S) as client:
        fuzz = Fuzz(client, made, root)

        async def cases_of(number: int) -> None:
            rng = Random(f"{seed}/live/{number}")
            for _ in range(count // CLIENTS + 1):
                if server.process.poll() is not None:
                    return
                await fuzz.one(rng)

        await asyncio.gather(*(cases_of(number) for number in range(CLIENTS)))
        return fuzz
