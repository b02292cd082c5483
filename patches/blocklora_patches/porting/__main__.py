"""Compares the contract with what the code uses of the installed SGLang, and with ``--write`` makes it so.

To be run with ``--write`` after a change of what ``patches/`` uses of SGLang; it renews the installed release's file.
With an SGLang installed that is no release of ours, it lists what does not fit the last one's (docs/releases.md).
"""

from __future__ import annotations

import argparse
from importlib.metadata import version

import msgspec
from sglang_blocklora import SGLANG_VERSIONS, cpu_only

from blocklora_patches.releases.contract import Contract, compared_with, file_of, misfits, read


def main() -> None:
    """Write the contract, or ``SystemExit`` where the file is not what would be written."""
    parser = argparse.ArgumentParser(prog="python -m blocklora_patches.porting", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write it")
    write = parser.parse_args().write
    cpu_only.prepare_import()
    installed = version("sglang")
    if installed not in SGLANG_VERSIONS:
        last = read(compared_with())
        wrong = "".join(f"\n  {line}" for part in (last.server, last.frontend) for line in misfits(part))
        raise SystemExit(f"SGLang {installed} has no contract. Compared with that of {compared_with()}:{wrong}")
    text, file = _text(), file_of(installed)
    if write:
        file.write_bytes(text)
    elif not file.exists() or file.read_bytes() != text:
        raise SystemExit(f"{file.name} is not what the code uses of SGLang: python -m {__package__} --write")


def _text() -> bytes:
    from blocklora_patches.porting.generate import contract  # imports SGLang, so only after the preparation above

    generated: Contract = contract()
    return msgspec.json.format(msgspec.json.encode(generated, order="sorted"), indent=1) + b"\n"


if __name__ == "__main__":
    main()
