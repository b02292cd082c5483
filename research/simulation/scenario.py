"""A simulated experiment: a workload, adapters and bytes, played for each seed and each contender in processes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from benchmark.record import REPOSITORY, Recorder
from benchmark.report import table
from benchmark.serving.workload import Workload
from research.sections import RESULTS, SECTIONS
from research.simulation.costs import GIB, Costs
from research.simulation.figures import figures
from research.simulation.policies import Policy
from research.simulation.simulator import Simulator
from research.simulation.systems import MAX_RUNNING, Adapter, System, make_adapters
from research.simulation.traffic import Judged

SEEDS = (0, 1, 2)
PROCESSES = 2
MIXED_RANKS = (16, 32, 64)
MANY = 64
SECONDS = 60  # of arrivals
MULTI_TURN = Workload(
    sessions=0,
    rate=0.0,
    adapters=MANY,
    turns=(2, 6),
    user_tokens=(16, 257),
    new_tokens=(16, 257),
    system_tokens=512,
    think_s=5.0,
)
SETTINGS = {
    "SIMULATED": "nothing was measured on a GPU; SGLang's and our own tree, allocator, admission and pools",
    "model": "Llama-3.1-8B, bfloat16, one H100 80GB; costs and their sources in research/simulation/costs.py",
    "adapters": "plain, all linears, ranks 16, 32 and 64 in turn where the scenario does not say otherwise",
    "memory": "GiB for adapters and KV together, the same for every row",
}


def multi_turn(rate: float, adapters: int = MANY, seconds: int = SECONDS) -> Workload:
    """Sessions of 2 to 5 turns behind a shared system prompt, Zipf 1.0; ``rate`` sessions a second."""
    return replace(MULTI_TURN, sessions=int(rate * seconds), rate=rate, adapters=adapters)


def single_turn(
    rate: float, popularity: str, cv: float = 1.0, adapters: int = MANY, seconds: int = SECONDS
) -> Workload:
    """S-LoRA's synthetic requests: prompts and answers of 8 to 512 random tokens, nothing shared."""
    return Workload(int(rate * seconds), rate, adapters, popularity=popularity, cv=cv)


H100 = Costs()


@dataclass(frozen=True)
class Scenario:
    """memory_gib   left for adapters and KV after the model's weights
    ranks        of the adapters, taking turns
    costs        of the machine and its model
    max_running  requests at once, at most
    """

    name: str
    workload: Workload | Judged
    memory_gib: float
    ranks: tuple[int, ...] = MIXED_RANKS
    costs: Costs = H100
    max_running: int = MAX_RUNNING

    def shortened(self) -> Scenario:
        """A fifth of the sessions."""
        return replace(self, workload=replace(self.workload, sessions=max(self.workload.sessions // 5, 20)))


@dataclass(frozen=True)
class Contender:
    """A way to keep adapters, and an order of the queue."""

    system: Callable[[Sequence[Adapter], int, Costs], System]
    policy: Callable[[System], Policy]


Contenders = Callable[[Scenario], Mapping[str, Contender]]
# Scenario -> contender -> figure -> a value for each seed.
Found = Mapping[str, Mapping[str, Mapping[str, list[float]]]]


def play(contenders: Contenders, scenario: Scenario, name: str, seed: int) -> dict[str, float]:
    """Figures of one run."""
    contender, costs = contenders(scenario)[name], scenario.costs
    adapters = make_adapters(scenario.ranks, scenario.workload.adapters, costs)
    system = contender.system(adapters, round(scenario.memory_gib * GIB) // costs.model.slot_bytes, costs)
    sessions = replace(scenario.workload, seed=seed).generate()
    policy = contender.policy(system)
    return figures(Simulator(system, policy, adapters, sessions, costs, scenario.max_running).run())


def main(
    part: str,
    document: str,
    scenarios: Sequence[Scenario],
    contenders: Contenders,
    settings: Mapping[str, object] = SETTINGS,
) -> None:
    """The command line of an experiment: play everything, record it as ``part``, print its tables.

    document  docstring of the experiment; ``contenders`` has to be a function of a module, for the processes
    settings  what a reader has to know
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one seed and a fifth of the sessions; nothing is recorded"
    )
    experiment(part, scenarios, contenders, settings, quick=parser.parse_args().quick)


def experiment(
    part: str,
    scenarios: Sequence[Scenario],
    contenders: Contenders,
    settings: Mapping[str, object] = SETTINGS,
    *,
    seeds: Sequence[int] = SEEDS,
    quick: bool,
    overall: Callable[[Found], Found] | None = None,
) -> None:
    """Play every scenario for each seed and contender, record it as ``part``, print its tables.

    quick    one seed and a fifth of the sessions; nothing is recorded
    overall  more scenarios, made of the figures of all
    """
    seeds = seeds[:1] if quick else seeds
    scenarios = [scenario.shortened() for scenario in scenarios] if quick else scenarios
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    jobs = [(scenario, name, seed) for scenario in scenarios for name in contenders(scenario) for seed in seeds]
    with ProcessPoolExecutor(PROCESSES) as pool:
        futures = [pool.submit(play, contenders, *job) for job in jobs]
        for (scenario, name, _), future in zip(jobs, futures, strict=True):
            for figure, value in future.result().items():
                found.setdefault(scenario.name, {}).setdefault(name, {}).setdefault(figure, []).append(value)
    tables: Found = {**(overall(found) if overall else {}), **found}
    if not quick:
        facts = dict(settings) | {"seeds": ", ".join(map(str, seeds))}
        recorder = Recorder(part, seeds[0], facts, REPOSITORY / RESULTS)
        for name, variants in tables.items():
            for variant, values in variants.items():
                for index, seed in enumerate(seeds):
                    recorder.add(name, variant, seed, {figure: of[index] for figure, of in values.items()})
        recorder.finish()
    section = next(section for section in SECTIONS if section.part == part)
    for name, variants in tables.items():
        print(f"\nSIMULATED: {name}\n\n{table(section.columns, variants, section.baseline)}")
