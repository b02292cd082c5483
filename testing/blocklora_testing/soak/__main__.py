"""``python -m blocklora_testing.soak``: one table; exit status 1 on any failure."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # PEFT's part; the server chooses for itself


def main() -> None:
    """Run the soak of the given size."""
    from blocklora_testing.soak.report import print_table
    from blocklora_testing.soak.soak import FULL, SMALL, soak

    parser = argparse.ArgumentParser(description="Soak a real server at TP 2, bounded in time.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="half a minute, as in make test")
    parser.add_argument(
        "--keep", type=Path, help="an empty folder for the server's log and all else (default: temporary)"
    )
    arguments = parser.parse_args()
    size = SMALL if arguments.small else FULL
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        result = soak(arguments.keep or Path(temporary), size, arguments.seed)
    print_table(result, f"soak, seed {arguments.seed}, {result.seconds:.0f} s")
    raise SystemExit(not result.passed)


if __name__ == "__main__":
    main()
