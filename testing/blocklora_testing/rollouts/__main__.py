"""``python -m blocklora_testing.rollouts``: one table; exit status 1 on any failure."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # PEFT's part; the server chooses for itself


def main() -> None:
    """Run of the given size."""
    from blocklora_testing.rollouts.rollouts import FULL, SMALL, rollouts
    from blocklora_testing.soak.report import print_table

    parser = argparse.ArgumentParser(description="Update four adapters again and again while they serve at TP 2.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="40 updates, as in make test-all")
    parser.add_argument("--keep", type=Path, help="an empty folder for the log and all else (default: temporary)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rollouts-") as temporary:
        result = rollouts(arguments.keep or Path(temporary), SMALL if arguments.small else FULL, arguments.seed)
    print_table(result, f"rollouts, seed {arguments.seed}, {result.seconds:.0f} s")
    raise SystemExit(not result.passed)


if __name__ == "__main__":
    main()
