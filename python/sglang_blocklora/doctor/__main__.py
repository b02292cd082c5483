"""Checks this machine, and what is to be served on it: ``python -m sglang_blocklora.doctor``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from sglang_blocklora.doctor.child import run
from sglang_blocklora.doctor.finding import Asked, Finding

# Modules with a function ``check``, in the order of the table -> seconds that each may take.
CHECKS = {
    "sglang_blocklora.doctor.versions": 60,
    "sglang_blocklora.doctor.devices": 60,
    "sglang_blocklora.doctor.upstream": 180,
    "sglang_blocklora.doctor.kernels": 300,
    "sglang_blocklora.doctor.streams": 60,
    "sglang_blocklora.doctor.ranks": 180,
    "sglang_blocklora.doctor.free_memory": 60,
    "sglang_blocklora.doctor.model": 60,
}
DESCRIPTION = """Checks this machine before a server is started on it: versions, devices, the installed SGLang, the
kernels' numbers, copies beside a forward pass, the ranks' communication, free memory. Nothing is served and no weight
is read. What does not apply to this machine is skipped, and says why."""
EPILOG = """exit codes:
  0  no fault
  1  a fault; each says what to do
  2  wrong command line"""
WIDTHS = (24, 8)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def parse(argv: Sequence[str]) -> tuple[Asked, bool]:
    """What the command line asks for, and whether as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_blocklora.doctor",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Asked()
    parser.add_argument("--model", metavar="FOLDER", help="base model: what is adapted, what adapters cost, refusals")
    parser.add_argument("--tp", type=positive, default=default.tp, help="TP size (default: %(default)s)")
    parser.add_argument("--rank", type=positive, default=default.rank, help="of an adapter (default: %(default)s)")
    parser.add_argument("--nblocks", type=positive, default=default.nblocks, help="its blocks (default: plain LoRA)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG ...", help="further flags of the launcher, to be checked")
    given = parser.parse_args(argv)
    asked = Asked(model=given.model, tp=given.tp, rank=given.rank, nblocks=given.nblocks, flags=tuple(given.flags))
    return asked, given.json


def line(finding: Finding) -> str:
    """A finding as a line of the table, with what to do below a fault."""
    first = f"{finding.what:<{WIDTHS[0]}}  {finding.result:<{WIDTHS[1]}}  {finding.found}"
    return first if finding.advice is None else f"{first}\n{'':<{sum(WIDTHS) + 2}}  -> {finding.advice}"


def main(argv: Sequence[str]) -> int:
    """Run all checks and tell what they find; the exit code."""
    asked, as_json = parse(argv)
    findings = []
    for check, seconds in CHECKS.items():
        for finding in run(check, asked, seconds):
            findings.append(finding)
            if not as_json:
                print(line(finding), flush=True)
    faults = sum(finding.result == "fault" for finding in findings)
    if as_json:
        print(json.dumps({"faults": faults, "findings": list(map(asdict, findings))}, indent=2))
    else:
        print(f"\n{faults or 'no'} fault{'' if faults == 1 else 's'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
