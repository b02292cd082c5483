"""The faults of stock SGLang that docs/upstream.md lists are still there: who ports learns what upstream has mended."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from blocklora_testing.forks import run_cases

from benchmark.record import REPOSITORY

FOLDER = Path(__file__).parent / "upstream_faults"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "live")
DOCUMENT = (REPOSITORY / "docs/upstream.md").read_text()

CODE = """
import asyncio, inspect, json, sys, warnings
sys.path.insert(0, {folder!r})
import {script} as script
from sglang.srt.plugins.hook_registry import HookRegistry
assert not HookRegistry._patched, "not stock"
warnings.simplefilter("ignore")

def call(path, body=None, seconds=20):
    request = process.client.request("GET" if body is None else "POST", path, json=body)
    try:
        answer = process.run(asyncio.wait_for(request, min(seconds, 5)))
    except TimeoutError:
        return 0, "no answer"
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    return answer.status_code, answer.json() if is_json else answer.text

if inspect.signature(script.fault).parameters:
    from pathlib import Path
    from blocklora_testing.adapter_world import Schedulers
    from blocklora_testing.http_process import HTTPProcess
    flags = ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all", "--admin-api-key", "secret"]
    process = HTTPProcess(Path({model!r}), *flags)
    scheduler = process.scheduler = Schedulers(process.manager)
    for channel in [value for name, value in vars(process.manager).items() if name.endswith("_communicator")]:
        channel._send = scheduler.dispatch
    process.manager._dispatch_to_scheduler = scheduler.dispatch
    found = script.fault(call, "/an/adapter")
else:
    found = script.fault()
print("FAULT" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tiny_llama: Path) -> dict[str, str | None]:
    """Script -> what it finds in the installed SGLang, without any hook of ours."""
    codes = {name: CODE.format(folder=str(FOLDER), script=name, model=str(tiny_llama)) for name in SCRIPTS}
    ended = run_cases({name: ({}, code) for name, code in codes.items()})
    for name, case in ended.items():
        assert "FAULT" in case.text, f"{name}: {case.text[-2000:]}"
    return {name: json.loads(case.text.rpartition("FAULT")[2].splitlines()[0]) for name, case in ended.items()}


def listed() -> dict[str, dict[str, str]]:
    """Script -> release -> what the document's table says of it."""
    header, _, *rows = re.findall(r"^\|.*\|$", DOCUMENT.partition("## The faults")[2], re.MULTILINE)
    names = [cell.strip() for cell in header.strip("|").split("|")]
    table = [dict(zip(names, (cell.strip() for cell in row.strip("|").split("|")), strict=True)) for row in rows]
    return {Path(row["script"].strip("`")).stem: row for row in table if row["script"] != "-"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_document_says_which_releases_have_the_fault(found: dict[str, str | None], script: str) -> None:
    """Where one is mended: say so in the table, and look whether the hook can go (its ``retire_when``)."""
    assert listed()[script][version("sglang")] == ("there" if found[script] else "mended"), found[script]


def test_every_script_is_in_the_document_and_the_reverse() -> None:
    assert sorted(listed()) == SCRIPTS
