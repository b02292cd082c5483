"""The waiting queue of a real server at TP 2 under load, with the clocks of one TP rank far off."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from blocklora_testing import skewed_clocks
from blocklora_testing.models import VOCAB, AdapterChoice, build_adapters, build_model, peft_tokens
from blocklora_testing.server import Server, running, same_decisions

NEW_TOKENS = 8
MAX_WAIT_STEPS = 6
CHUNK_TOKENS = 256  # and what an adapter may take in a round, which is one chunk here


@dataclass(frozen=True)
class Scheduled:
    """A server, and the decision log of its TP rank 0."""

    server: Server
    log: Path

    def decisions(self, after: int) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()[after:]]

    def mark(self) -> int:
        return len(self.log.read_text().splitlines())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Four adapters, prompts, and what PEFT answers: ``expected[adapter][prompt index]``."""
    folder = tmp_path_factory.mktemp("scheduling")
    model = build_model(folder / "model", "llama", kv_heads=4)
    names = {"hot": 2, "cold": None, "warm": 4, "other": 1}
    adapters = build_adapters(model, folder / "adapters", {k: AdapterChoice(n, rank=4) for k, n in names.items()})
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(0, VOCAB, (40,), generator=generator).tolist()
    prompts = [shared + torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (3, 9, 17, 30)]
    return model, adapters, prompts, peft_tokens(model, adapters, prompts, NEW_TOKENS)


@pytest.fixture(scope="module")
def scheduled(small, tmp_path_factory) -> Iterator[Scheduled]:
    """Four requests run at a time, with at most three adapters, so that a queue forms and adapters are refused."""
    model, adapters, _, _ = small
    folder = tmp_path_factory.mktemp("scheduling-server")
    flags = ["--tp", "2", "--adapter-memory", "unified", "--max-total-tokens", "4096", "--max-running-requests", "4"]
    flags += ["--max-loras-per-batch", "3", "--chunked-prefill-size", str(CHUNK_TOKENS), "--adapter-round-chunks", "1"]
    flags += ["--adapter-max-wait-steps", str(MAX_WAIT_STEPS), "--adapter-decision-log", str(folder / "decisions")]
    paths = ["--lora-paths", *(f"{name}={path}" for name, path in adapters.items())]
    skew = skewed_clocks.skew_rank_1
    with running(model, *flags, *paths, log=folder / "log", warm=True, change=skew) as server:
        yield Scheduled(server, folder / "decisions.0")
    assert skewed_clocks.SKEWED in server.log_text()
    same_decisions(folder / "decisions")


def steps(decisions: list[dict]) -> Iterator[tuple[dict[int, int], set[int]]]:
    """For each scheduler step, the turns of the requests that waited, by arrival, and those that then left."""
    orders = [dict(zip(d["arrivals"], d["turns"], strict=True)) for d in decisions if d["decision"] == "order"]
    for turns, later in itertools.pairwise(orders):
        yield turns, turns.keys() - later.keys()


def overtaken_steps(decisions: list[dict]) -> Counter[int]:
    """By the definition: for each request, the steps after which it waits while one is gone that overtook it."""
    adapter, count = adapters_by_arrival(decisions), Counter()
    for turns, gone in steps(decisions):
        for arrival in turns.keys() - gone:
            count[arrival] += any(
                other > arrival and (turns[other] >= turns[arrival] or adapter[other] == adapter[arrival])
                for other in gone
            )
    return count


def adapters_by_arrival(decisions: list[dict]) -> dict[int, str | None]:
    return {d["arrival"]: d["adapter"] for d in decisions if d["decision"] == "arrive"}


def random_prompts(count: int, seed: int) -> list[list[int]]:
    return torch.randint(0, VOCAB, (count, 40), generator=torch.Generator().manual_seed(seed)).tolist()


def test_tokens_are_right_under_load_and_nobody_is_overtaken_too_often(scheduled: Scheduled, small) -> None:
    _, _, prompts, expected = small
    start = scheduled.mark()
    generator = torch.Generator().manual_seed(5)
    popularity = ["hot", "hot", "hot", "warm", "other", "cold", None]
    names = [popularity[i] for i in torch.randint(0, 7, (72,), generator=generator)]
    asked = [(prompts[i % len(prompts)], name) for i, name in enumerate(names)]
    found = scheduled.server.many(asked, NEW_TOKENS)
    assert found == [expected[name][prompts.index(prompt)] for prompt, name in asked]
    overtaken = overtaken_steps(scheduled.decisions(start))
    assert 0 < max(overtaken.values()) <= MAX_WAIT_STEPS


def test_a_cold_adapters_request_among_a_flood_is_served_within_the_bound(scheduled: Scheduled, small) -> None:
    """The flood is resident and cached, the cold request neither, and it arrives while sixty of the flood wait."""
    _, _, prompts, expected = small
    assert scheduled.server.call("/flush_cache", {})[0] == 200
    scheduled.server.tokens(prompts[0], "hot", NEW_TOKENS)
    start = scheduled.mark()
    asked = [(prompts[i % 4], "hot") for i in range(64)]
    asked[24] = (prompts[3], "cold")
    found = scheduled.server.many(asked, NEW_TOKENS)
    assert found == [expected[name][prompts.index(prompt)] for prompt, name in asked]
    decisions = scheduled.decisions(start)
    (cold,) = [arrival for arrival, adapter in adapters_by_arrival(decisions).items() if adapter == "cold"]
    assert 0 < overtaken_steps(decisions)[cold] <= MAX_WAIT_STEPS


def test_a_flood_takes_no_more_than_its_share_while_others_wait(scheduled: Scheduled) -> None:
    """Sixty requests of one adapter come first, twelve each of two others after them; all cost the same."""
    start = scheduled.mark()
    names = ["hot"] * 60 + ["warm"] * 12 + ["other"] * 12
    scheduled.server.many(list(zip(random_prompts(len(names), seed=9), names, strict=True)), NEW_TOKENS)
    decisions = scheduled.decisions(start)
    adapter = adapters_by_arrival(decisions)
    served: Counter[str | None] = Counter()
    for turns, gone in steps(decisions):
        if {adapter[arrival] for arrival in turns.keys() - gone} == {"hot", "warm", "other"}:
            served.update(adapter[arrival] for arrival in gone)
    cost_tokens = 40 + NEW_TOKENS
    ahead = -(-CHUNK_TOKENS // cost_tokens) + 1  # a round, and what the last request of one overdraws
    assert sum(served.values()) > 20, "the three did not wait together"
    # one may be that far behind when the three begin to wait together, and that far ahead when they end
    assert max(served.values()) - min(served["warm"], served["other"]) <= 2 * ahead
