"""The one table of a run."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from blocklora_testing.soak.soak import Result


def print_table(result: Result, title: str) -> None:
    """Requests by kind, then what must hold at the end; below it the first problems and what the checks found."""
    table = Table(title=title)
    table.add_column("")
    for heading in ("requests", "right", "refused", "aborted", "wrong", "p50 s", "p99 s"):
        table.add_column(heading, justify="right")
    for kind, row in sorted(result.tally.rows.items()):
        counts = (row.requests, row.right, row.refused, row.aborted, len(row.problems))
        times = (f"{row.quantile(0.5):.2f}", f"{row.quantile(0.99):.2f}") if row.seconds else ("", "")
        style = "red" if row.problems else None
        table.add_row(kind, *(str(count or "") for count in counts), *times, style=style)
    rows = result.tally.rows.values()
    total = [sum(row.requests for row in rows), sum(row.right for row in rows), sum(row.refused for row in rows)]
    total += [sum(row.aborted for row in rows), sum(len(row.problems) for row in rows)]
    table.add_section()
    table.add_row("all", *map(str, total), "", "", style="bold")
    table.add_section()
    for check in result.checks:
        verdict = "held" if check.held else "FAILED"
        table.add_row(check.name, verdict, style=None if check.held else "red")
    console = Console(width=170)
    console.print(table)
    for problem in result.tally.problems:
        console.print(problem, markup=False)
    for check in result.checks:
        console.print(f"{check.name}: {check.found}", markup=False, style=None if check.held else "red")
