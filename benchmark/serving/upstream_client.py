"""SGLang's own load generator, ``python -m sglang.benchmark.serving``, on a machine without an accelerator too.

    python -m benchmark.serving.upstream_client --backend sglang --dataset-name random-ids ...

The flags are upstream's (docs/benchmarks.md has a whole command); on a GPU machine upstream's module runs as it is.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import runpy
import sys
import types

from sglang_blocklora import cpu_only


def stand_in_for_datasets() -> None:
    """Upstream imports ``datasets`` for data sets that must be downloaded; random ones need none of it."""

    def load_dataset(*_: object, **__: object) -> None:
        raise SystemExit("this data set needs the packages datasets and pyarrow")

    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = load_dataset
    sys.modules["datasets"] = module


if __name__ == "__main__":
    if cpu_only.is_cpu_only():
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        cpu_only.install_shims()
    if importlib.util.find_spec("pyarrow") is None:
        stand_in_for_datasets()
    runpy.run_module("sglang.benchmark.serving", run_name="__main__")
