"""Raw results: JSON lines under benchmark/results/, one file for each part, one run behind the other.

A run is a line of conditions, a line for each measurement as soon as it is made, and a last line that says it was
finished. What a run that broke off has measured stays in the file; reports take the newest finished run.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmark/results"
PACKAGES = ("torch", "sglang", "transformers", "peft", "numpy")


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def conditions(seed: int) -> dict[str, Any]:
    """Machine, versions, commit, seed and command of this process."""
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    code = ["--", "python", "kernels", "patches", "benchmark", ":!benchmark/results"]
    changed = subprocess.run([*git, "status", "--porcelain", *code], capture_output=True, text=True).stdout.strip()
    module = sys.modules["__main__"].__spec__
    return {
        "command": " ".join(["python", "-m", module.name if module else "?", *sys.argv[1:]]),
        "commit": commit + ("+changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {_memory_gib()} GiB",
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "seed": seed,
    }


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


class Recorder:
    """Writes one run of ``part``; ``settings`` is whatever else a reader needs to know to judge the figures."""

    def __init__(self, part: str, seed: int, settings: Mapping[str, Any], results: Path = RESULTS) -> None:
        self._path = results / f"{part}.jsonl"
        self._run = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:8]}"
        self._started = time.monotonic()
        self._append(conditions=conditions(seed) | {"settings": dict(settings)})

    def add(self, scenario: str, variant: str, round_: int, figures: Mapping[str, float]) -> None:
        """One measurement: numbers by name, units in the names."""
        self._append(scenario=scenario, variant=variant, round=round_, figures=dict(figures))

    def finish(self) -> None:
        """Make the run the one that reports take."""
        self._append(finished_s=round(time.monotonic() - self._started, 1))

    def _append(self, **fields: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as out:
            out.write(json.dumps({"run": self._run} | fields) + "\n")


@dataclass(frozen=True)
class Run:
    """A finished run: ``figures[scenario][variant][name]`` is the list of values, round by round."""

    conditions: dict[str, Any]
    figures: dict[str, dict[str, dict[str, list[float]]]]


def finished(part: str, results: Path = RESULTS) -> list[Run]:
    """The finished runs of ``part``, oldest first."""
    path = results / f"{part}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    runs = {line["run"]: Run({}, {}) for line in lines if "finished_s" in line}
    for line in lines:
        if run := runs.get(line["run"]):
            run.conditions.update(line.get("conditions", {}))
            for name, value in line.get("figures", {}).items():
                values = run.figures.setdefault(line["scenario"], {}).setdefault(line["variant"], {})
                values.setdefault(name, []).append(value)
    return list(runs.values())


def newest(part: str, results: Path = RESULTS) -> Run | None:
    """The newest finished run of ``part``, or None."""
    runs = finished(part, results)
    return runs[-1] if runs else None
