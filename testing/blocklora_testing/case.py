"""A tiny model, its adapters and the tokens that PEFT gives for them, as end-to-end tests share them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NEW_TOKENS = 16
# Adapters of ``api_server``, called as in the README; what they answer is random.
NAMES = {"sql": "n2", "support": "n4", "legal": "plain"}
ADMIN_KEY = "secret"


@dataclass(frozen=True)
class Case:
    """A tiny model, its adapters, prompts, and PEFT's greedy tokens: ``expected[adapter][prompt index]``."""

    model: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    expected: dict[str | None, list[list[int]]]

    @property
    def lora_paths(self) -> list[str]:
        return ["--lora-paths", *(f"{name}={path}" for name, path in self.adapters.items())]

    def requests(self) -> list[tuple[list[int], str | None]]:
        """Every prompt under every adapter and the base model, adapters alternating."""
        return [(prompt, name) for prompt in self.prompts for name in self.expected]

    def answers(self) -> list[list[int]]:
        """Expected tokens of ``requests``."""
        return [self.expected[name][i] for i in range(len(self.prompts)) for name in self.expected]
