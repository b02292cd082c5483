"""``make rollouts``: reinforcement learning against a server that has the adapters under training.

Four variants of SmolLM2 learn at once, each an adapter with a reward of its own. For each: sample from the server,
several answers to a prompt; one step of the policy gradient with PEFT; send the new weights; sample again. While one
trains, the others sample. Every request demands the version that was sent last, so that no sample is off policy.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import mean

import httpx
import torch
from blocklora_testing import smollm2
from blocklora_testing.server import ServerFailed, running
from policy import Policies, Sample
from rewards import BEGINNINGS, REWARDS, worth
from rich.console import Console
from rich.live import Live
from view import Progress, plot, table

SEED = 0
PROMPTS_PER_STEP = 4
ANSWERS_PER_PROMPT = 6
ANSWER_TOKENS = 12


class Trainer:
    """Samples from ``server``, and trains ``policies``."""

    def __init__(self, policies: Policies, server: httpx.Client, steps: int, seed: int) -> None:
        self._policies, self._server, self._steps = policies, server, steps
        self._random = random.Random(seed)
        self.variants = {name: Progress(name) for name in REWARDS}

    def push(self, name: str) -> None:
        """Give the server the weights that a variant has now."""
        began = time.monotonic()
        answer = self._server.put(f"/adapters/{name}", content=self._policies.weights(name))
        if answer.status_code != 200:
            raise ServerFailed(answer.json()["error"]["message"])
        self.variants[name].version = answer.json()["adapter_version"]
        self.variants[name].update_s = time.monotonic() - began

    def sample(self, name: str, beginnings: Sequence[str]) -> list[Sample]:
        """How the variant goes on with each text, all of the version that was sent last."""
        began, variant = time.monotonic(), self.variants[name]
        prompts = [self._policies.tokens(text) for text in beginnings]
        answer = self._server.post(
            "/generate",
            headers={"X-Adapter-Version": variant.version},
            json={
                "input_ids": prompts,
                "lora_path": [name] * len(prompts),
                "sampling_params": {"temperature": 1.0, "max_new_tokens": ANSWER_TOKENS, "n": ANSWERS_PER_PROMPT},
            },
        )
        if answer.status_code != 200:
            raise ServerFailed(f"{name}: {answer.text}")
        samples = []
        for i, one in enumerate(answer.json()):
            tokens = one["output_ids"]
            judged = worth(self._policies.pieces(tokens), REWARDS[name])
            samples.append(Sample(prompts[i // ANSWERS_PER_PROMPT], tokens, one["text"], judged))
        variant.sample_s = time.monotonic() - began
        return samples

    def learn(self, name: str, samples: Sequence[Sample]) -> None:
        """Note what the samples are worth, and improve the variant by them."""
        began, variant = time.monotonic(), self.variants[name]
        variant.rewards.append(mean(one for sample in samples for one in sample.worth))
        variant.text = samples[-1].text.replace("\n", " ")
        self._policies.improve(name, samples)
        variant.train_s = time.monotonic() - began

    def run(self, show: Live) -> None:
        """All steps of all variants."""
        for name in self.variants:
            self.push(name)
        with ThreadPoolExecutor(len(self.variants)) as pool:

            def ask(name: str) -> Future[list[Sample]]:
                return pool.submit(self.sample, name, self._random.sample(BEGINNINGS, PROMPTS_PER_STEP))

            sampling = {ask(name): name for name in self.variants}
            while sampling:
                ready = wait(sampling, return_when=FIRST_COMPLETED).done
                done = min(ready, key=lambda one: len(self.variants[sampling[one]].rewards))  # nobody is left behind
                name = sampling.pop(done)
                self.learn(name, done.result())
                self.push(name)
                show.update(table(list(self.variants.values()), self._steps))
                if not show.console.is_terminal:  # which would see the table only at the end
                    one = self.variants[name]
                    show.console.print(f"{name} step {len(one.rewards)}: reward {one.rewards[-1]:.2f}, {one.version}")
                if len(self.variants[name].rewards) < self._steps:
                    sampling[ask(name)] = name


def main() -> None:
    """Start the server, train, and leave a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16, help="updates of each variant (default: %(default)s)")
    parser.add_argument("--tp", type=int, default=2, help="TP size of the server (default: %(default)s)")
    parser.add_argument(
        "--plot", type=Path, default=Path("rollouts.png"), help="where the plot goes (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    console = Console()
    console.print("building SmolLM2 and four adapters")
    policies = Policies(list(REWARDS))
    model = smollm2.build()
    flags = ["--tp", str(arguments.tp), "--served-model-name", "smollm2", "--context-length", "2048"]
    flags += ["--max-total-tokens", "16384", "--random-seed", str(arguments.seed)]
    flags.append("--sleep-on-idle")  # training needs the cores
    torch.set_num_threads(1)  # threads that wait for each other wait long beside a server
    console.print(f"starting a server at TP {arguments.tp}")
    with running(model, *flags, log=model.parent / "rollouts.log") as server:
        client = httpx.Client(base_url=server.url, timeout=300, trust_env=False)
        with client, Live(console=console, refresh_per_second=4) as show:
            trainer = Trainer(policies, client, arguments.steps, arguments.seed)
            trainer.run(show)
    plot(list(trainer.variants.values()), arguments.plot)
    console.print(f"the rewards of all steps: {arguments.plot}")


if __name__ == "__main__":
    main()
