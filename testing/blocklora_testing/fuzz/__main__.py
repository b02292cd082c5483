"""``python -m blocklora_testing.fuzz``: one table; exit status 1 on any failure."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    """Fuzz the checks by themselves, then a live server."""
    from rich.console import Console
    from rich.table import Table

    from blocklora_testing.fuzz.live import fuzz_server
    from blocklora_testing.fuzz.run import fuzz_validators

    parser = argparse.ArgumentParser(description="Random and hostile input, bounded in count.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1_000_000, help="against the checks by themselves")
    parser.add_argument("--requests", type=int, default=10_000, help="to a live server at TP 2")
    arguments = parser.parse_args()
    console, table = Console(width=150), Table(title=f"fuzz, seed {arguments.seed}")
    for heading in ("", "cases", "failed", "ms per case", "answers"):
        table.add_column(heading, justify="left" if heading in ("", "answers") else "right")
    rows = fuzz_validators(arguments.cases, arguments.seed) if arguments.cases else {}
    statuses, checks = {}, []
    if arguments.requests:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            live, statuses, checks = fuzz_server(Path(folder), arguments.requests, arguments.seed)
        rows |= {f"server: {kind}": row for kind, row in live.items()}
    for name, row in rows.items():
        answers = statuses.get(name.removeprefix("server: "), {})
        text = ", ".join(f"{count} x {status}" for status, count in sorted(answers.items()))
        style = "red" if row.failed else None
        milliseconds = f"{row.seconds / max(row.cases, 1) * 1e3:.2f}"
        table.add_row(name, str(row.cases), str(row.failed or ""), milliseconds, text, style=style)
    for check in checks:
        table.add_row(check.name, "", "" if check.held else "FAILED", "", "", style=None if check.held else "red")
    console.print(table)
    for row in rows.values():
        for failure in row.failures:
            console.print(failure, markup=False)
    for check in checks:
        if not check.held:
            console.print(check.found, markup=False)
    raise SystemExit(any(row.failed for row in rows.values()) or not all(check.held for check in checks))


if __name__ == "__main__":
    main()
