"""Runs a function of a test file where Triton's interpreter is on: it is chosen before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import importlib.util, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("in_interpreter", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
for name in sys.argv[3:]:
    getattr(module, name)(Path(sys.argv[2]) / name)
"""


def in_interpreter(file: str, folder: Path, *functions: str) -> None:
    """Call ``functions`` of ``file``, each with a folder of its own in ``folder``, in a process of its own.

    ``subprocess.CalledProcessError`` where one of them raises.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", CODE, file, str(folder), *functions], env=environment, check=True)
