"""Code in forks of one process that has imported SGLang, and nothing of ours but ``releases.contract``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from sglang_blocklora.settings import SETTINGS_VARIABLE, SWITCH_VARIABLE

FORKS = """
import json, os, sys, traceback
from sglang_blocklora import cpu_only; cpu_only.prepare(1)
from blocklora_patches.releases import contract
contract.check("server"), contract.check("frontend")  # imports all of it
contract.check.cache_clear()
found = {}
for name, (environment, code) in json.load(sys.stdin).items():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1), os.dup2(writer, 2)
        os.environ.update(environment)
        status = 0
        try:
            exec(code, {})
        except SystemExit as end:
            print("SystemExit:", end.code, flush=True)
            status = 3
        except BaseException:
            traceback.print_exc()
            status = 4
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as pipe:
        text = pipe.read()
    found[name] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]
print("FOUND" + json.dumps(found))
"""
STOPPED = 3


@dataclass(frozen=True)
class Ended:
    """How a case ended: its exit status (3: a ``SystemExit``), and what it printed."""

    status: int
    text: str


def run_cases(cases: dict[str, tuple[dict[str, str], str]]) -> dict[str, Ended]:
    """Run ``name -> (environment, code)``, each by itself."""
    kept = {k: v for k, v in os.environ.items() if k not in (SETTINGS_VARIABLE, SWITCH_VARIABLE)}
    texts = {name: (environment, textwrap.dedent(code)) for name, (environment, code) in cases.items()}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS],
        env=kept,
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "FOUND" in result.stdout, result.stderr[-3000:]
    return {name: Ended(*ended) for name, ended in json.loads(result.stdout.split("FOUND")[1]).items()}


def plugin(folder: Path, name: str, code: str) -> str:
    """Install a plugin of SGLang's into ``folder``, and return that."""
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:run\n")
    (folder / f"{name}.py").write_text(textwrap.dedent(code))
    return str(folder)
