"""The product decides as it did when the results were recorded: the simulator drives its own order, pools and tree.

Every figure of a play follows from decisions and from clocks that are simulated, so that one request admitted
elsewhere, or one adapter evicted in another's place, changes some. The rows were recorded before the redesign of
the layout; "no look-ahead" is what has been served since. Figures that were thought of later are not among them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from research import memory, scheduler
from research.simulation.scenario import Contenders, Scenario, play

RESULTS = Path(__file__).parents[1] / "results"
SEED = 0


def recorded(part: str, scenario: str, variant: str) -> dict[str, float]:
    """Figures of the newest run."""
    rows = [json.loads(line) for line in (RESULTS / f"{part}.jsonl").read_text().splitlines()]
    wanted = {"scenario": scenario, "variant": variant, "round": SEED}
    return [row["figures"] for row in rows if wanted.items() <= row.items()][-1]


@pytest.mark.parametrize("scenario", scheduler.ABLATED, ids=lambda scenario: scenario.name)
def test_requests_are_admitted_in_the_recorded_order(scenario: Scenario) -> None:
    found = play(scheduler.contenders, scenario, "adapter-affinity", SEED)
    assert recorded("scheduler_simulated", scenario.name, "adapter-affinity").items() <= found.items()


@pytest.mark.parametrize("variant", ["static", "unified, lru", "unified, kv-first", "unified, cost-aware"])
@pytest.mark.parametrize("scenario", [memory.SCENARIOS[0], memory.SCENARIOS[4]], ids=lambda scenario: scenario.name)
def test_adapters_and_kv_give_way_as_recorded(scenario: Scenario, variant: str) -> None:
    contenders: Contenders = memory.contenders
    found = play(contenders, scenario, variant, SEED)
    assert recorded("memory_simulated", scenario.name, variant).items() <= found.items()
