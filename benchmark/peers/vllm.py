"""vLLM's CPU build beside our servers: how it is started, asked and told apart. It has a venv of its own, `.venv-vllm`.

`vllm serve` needs the metadata of a package that the CPU build is not; its module does not. `--kv-cache-memory-bytes`
is per TP rank. `--max-cpu-loras` must be given: otherwise adapters are read from disk at every swap.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from blocklora_testing.server import Server, free_port, stopped_at_the_end

from benchmark.record import REPOSITORY
from benchmark.serving.client import Answer, Dialect

VENV = REPOSITORY / ".venv-vllm"
BASE = "base"


class Completions(Dialect):
    """OpenAI's completions of token ids, as vLLM has them."""

    path = "/v1/completions"
    flush_path = "/reset_prefix_cache"
    end = ("usage", "completion_tokens")

    def body(self, prompt: list[int], adapter: str | None, new_tokens: int, stream: bool) -> dict[str, Any]:
        body = {"model": adapter or BASE, "prompt": prompt, "max_tokens": new_tokens, "min_tokens": new_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": stream}
        return body | ({"stream_options": {"include_usage": True, "continuous_usage_stats": True}} if stream else {})

    def receive(self, answer: Answer, at_s: float, chunk: Mapping[str, Any]) -> None:
        """Take one chunk of the stream, which carries the tokens that came since the last one."""
        if "error" in chunk:
            answer.error = str(chunk["error"])[:300]
            return
        usage = chunk.get("usage") or {}
        answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
        details = usage.get("prompt_tokens_details") or {}
        answer.cached_tokens = details.get("cached_tokens") or answer.cached_tokens
        fresh = [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]
        if fresh:
            answer.receive(at_s, answer.tokens + fresh)


@dataclass(frozen=True)
class VLLM:
    """How a vLLM server is started (an ``Engine``): TP size and flags."""

    tp: int
    flags: tuple[str, ...]
    dialect: ClassVar[Dialect] = Completions()

    @contextlib.contextmanager
    def start(self, model: Path, log: Path, loads: Path) -> Iterator[Server]:
        port, python = free_port(), VENV / "bin/python"
        if not python.exists():
            raise SystemExit(f"{python} is missing: make {VENV.name}/.installed")
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--distributed-executor-backend", "mp", "--enable-prompt-tokens-details"]
        command += ["--tensor-parallel-size", str(self.tp), *self.flags]
        cores = [range(rank, os.cpu_count() or 1, self.tp) for rank in range(self.tp)]  # dealt out over the ranks
        own = {
            "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(len(cores[0])),
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, of_rank)) for of_rank in cores),
            "LD_PRELOAD": str(VENV / "lib/libiomp5.so"),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # its prefix cache can be reset
        }
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | own
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )
        with stopped_at_the_end(Server(port, log, process), "/health") as server:
            yield server

    def adapter_loads(self, server: Server, loads: Path) -> Counter[str]:
        """It does not count them."""
        return Counter()


def adapters(paths: Mapping[str, Path]) -> tuple[str, ...]:
    """vLLM's flag for loading them at the start."""
    return ("--lora-modules", *(f"{name}={path}" for name, path in paths.items()))
