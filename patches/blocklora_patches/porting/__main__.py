"""Compares the contract with what the code uses of the installed SGLang, and with ``--write`` makes it so.

To be run with ``--write`` after a change of what ``patches/`` uses of SGLang; it renews the installed release's file.
Beside a release that has none yet, it lists what does not fit the contract with the last one.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version

import msgspec
from sglang_blocklora import cpu_only

from blocklora_patches.releases.contract import Contract, file_of, misfits, read, releases


def main() -> None:
    """Write the contract, or ``SystemExit`` where the file is not what would be written or where there is none."""
    parser = argparse.ArgumentParser(prog="python -m blocklora_patches.porting", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write it")
    write = parser.parse_args().write
    cpu_only.prepare_import()
    installed, known = version("sglang"), releases()
    if not write and installed not in known:
        wrong = "".join(f"\n  {line}" for line in misfits(read(known[-1]).server))
        raise SystemExit(f"SGLang {installed} has no contract. Compared with that of {known[-1]}:{wrong}")
    text = _text()
    if write:
        file_of(installed).write_bytes(text)
    elif file_of(installed).read_bytes() != text:
        raise SystemExit(
            f"{file_of(installed).name} is not what the code uses of SGLang: python -m {__package__} --write"
        )


def _text() -> bytes:
    from blocklora_patches.porting.generate import contract  # imports SGLang, so only after the preparation above

    generated: Contract = contract()
    return msgspec.json.format(msgspec.json.encode(generated, order="sorted"), indent=1) + b"\n"


if __name__ == "__main__":
    main()
