"""CUDA graphs as they would be captured on an H100, replayed in Triton's interpreter for random batches."""

import os
import subprocess
import sys
from pathlib import Path

from blocklora_testing.kernels import replays


def run(step: str, folder: Path, **environment: str) -> list[str]:
    """What a step printed, in a process of its own: one puts another driver in place, one chooses the interpreter."""
    command = [sys.executable, "-m", replays.__name__, step, str(folder)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_captured_launches_serve_every_batch(tmp_path: Path) -> None:
    captured = run("capture", tmp_path)
    replayed = run("replay", tmp_path, TRITON_INTERPRET="1")
    assert sum(line.startswith("right: ") for line in replayed) == 16
    verdicts = [line for line in captured + replayed if not line.startswith("right: ")]
    assert len(verdicts) == 12
    assert not [line for line in verdicts if not line.startswith("found: ")]
