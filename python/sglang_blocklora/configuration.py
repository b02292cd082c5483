"""Writes ``docs/configuration.md`` from the flags' own descriptions: ``python -m sglang_blocklora.configuration``."""

from __future__ import annotations

from sglang_blocklora import flags
from sglang_blocklora.fleet.settings import RouteSettings
from sglang_blocklora.launch_server import ADAPTER_DEFAULTS, ADAPTERS_PER_BATCH
from sglang_blocklora.settings import SWITCH_VARIABLE, Settings

PAGE = """\
# Configuration

<!-- Made by python -m sglang_blocklora.configuration > docs/configuration.md -->

`python -m sglang_blocklora.launch_server` takes the flags below and all of SGLang's, whose own `--help` follows ours.
`frontend.engine()` and `frontend.runtime()` take them with underscores: `adapter_memory="static"`.

{table}

SGLang's flags that have another default here:

| flag | default here | |
|---|---|---|
{defaults}

## The front

`python -m sglang_blocklora.route` ([route.md](route.md)) takes these:

{front}

## Off

`{switch}=0` in the environment starts stock SGLang, with its own defaults and none of our flags.
"""
REASONS = {
    "--max-loras-per-batch": "distinct adapters in a batch, which cost no memory; --max-loaded-loras if that is less",
    "--max-lora-rank": "adapters of a higher rank are refused",
}


def page() -> str:
    """The whole document."""
    defaults = [
        f"| `{flag}` | {' '.join(values) or 'on'} | {REASONS.get(flag, '')} |"
        for flag, values in (ADAPTER_DEFAULTS | {"--max-loras-per-batch": [str(ADAPTERS_PER_BATCH)]}).items()
    ]
    return PAGE.format(
        table=flags.table(Settings),
        defaults="\n".join(defaults),
        front=flags.table(RouteSettings),
        switch=SWITCH_VARIABLE,
    )


if __name__ == "__main__":
    print(page(), end="")
