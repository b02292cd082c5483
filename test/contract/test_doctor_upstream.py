"""The doctor names what of the installed SGLang does not fit, and which flags a start would refuse for a model."""

from __future__ import annotations

import json
import textwrap
from importlib.metadata import version

import pytest
from blocklora_testing.forks import run_cases
from sglang_blocklora.doctor.finding import Asked

CHECK = """
import json
from dataclasses import asdict
from sglang_blocklora.doctor.finding import Asked
from sglang_blocklora.doctor.upstream import check
print("FINDINGS" + json.dumps([asdict(finding) for finding in check({asked})]))
"""
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 256,
}
# What happened to SGLang or to us -> what is at fault, and what is told of it.
BROKEN = {
    "a symbol vanished": (
        "import sglang.srt.managers.schedule_policy as m; del m.CLIP_MAX_NEW_TOKENS",
        ("contract, server", "schedule_policy.CLIP_MAX_NEW_TOKENS: expected, and not found"),
    ),
    "a signature changed": (
        "import sglang.srt.lora.lora_manager as m; m.LoRAManager.fetch_new_loras = lambda self, other: None",
        ("contract, server", "expected parameters (self, new_loras, running_loras), found (self, other)"),
    ),
    "an attribute vanished": (
        "import sglang.srt.managers.tokenizer_manager as m; m.ReqState = type('ReqState', (), {'__module__': 'm'})",
        ("contract, server", "tokenizer_manager.ReqState.ttft_observed: expected, and not found"),
    ),
    "the language changed": (
        "import sglang.lang.backend.runtime_endpoint as m; del m.RuntimeEndpoint._assert_success",
        ("contract, frontend", "RuntimeEndpoint._assert_success: expected, and not found"),
    ),
    "another release": (
        "import sglang_blocklora.doctor.upstream as u; u.version = lambda name: '0.5.1'",
        ("SGLang", "0.5.1; tested: "),
    ),
    "a plugin on our target": (
        """
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
        HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.on_idle", lambda *a, **k: None, HookType.BEFORE)
        HookRegistry.apply_hooks()
        """,
        ("hooks", "Scheduler.on_idle"),
    ),
    "a plugin that is left out": (
        "import os; os.environ['SGLANG_PLUGINS'] = 'other'",
        ("hooks", "SGLANG_PLUGINS"),
    ),
}
# Flags -> what is told of them; None: nothing is refused.
FLAGS = {
    (): None,
    ("--adapter-memory", "static", "--disable-radix-cache"): None,
    ("--adapter-memory-mb", "0"): "--adapter-memory-mb 0 must be at least 1",
    ("--adapter-memory-mb", "5"): "--adapter-memory-mb has no effect without --adapter-memory static",
    ("--no-such-flag",): "unrecognized arguments: --no-such-flag",
    ("--disable-radix-cache",): None,
    ("--adapter-memory", "unified", "--disable-radix-cache"): "--disable-radix-cache (adapters live in the radix tree)",
    ("--pp-size", "2"): "--pp-size (a TP rank would hold only some layers of an adapter)",
    ("--tokenizer-worker-num", "2"): "--tokenizer-worker-num 2",
    ("--max-loras-per-batch", "0"): "max_loras_per_batch",
}
ARENA = "static: an arena of {} MiB on each TP rank"
# Flags -> which memory adapters would get.
MEMORY = {
    (): "unified: the KV cache's slots",
    ("--adapter-memory", "static", "--disable-radix-cache"): ARENA.format(1024),
    ("--adapter-memory", "static", "--adapter-memory-mb", "5"): ARENA.format(5),
    ("--disable-radix-cache",): f"{ARENA.format(1024)}, because the slots cannot hold adapters with "
    "--disable-radix-cache (adapters live in the radix tree)",
    ("--adapter-memory", "unified"): "unified: the KV cache's slots",
}


Findings = list[dict[str, str]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Findings]:
    """Name of a case, or of flags -> findings; each in a process of its own, as the doctor has it."""
    empty, model = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(MODEL))
    starts = {"no model": Asked(), "empty folder": Asked(model=str(empty))}
    starts |= {" ".join(flags): Asked(model=str(model), tp=2, flags=flags) for flags in FLAGS | MEMORY}
    cases = {name: f"{textwrap.dedent(code)}\n{CHECK.format(asked=Asked())}" for name, (code, _) in BROKEN.items()}
    cases |= {name: CHECK.format(asked=asked) for name, asked in starts.items()}
    ended = run_cases({name: ({}, code) for name, code in cases.items()})
    return {name: json.loads(case.text.partition("FINDINGS")[2].splitlines()[0]) for name, case in ended.items()}


def finding_of(findings: Findings, what: str) -> dict[str, str]:
    (found,) = [finding for finding in findings if finding["what"] == what]
    return found


def test_a_release_that_fits(found: dict[str, Findings]) -> None:
    findings = {finding["what"]: finding for finding in found["no model"]}
    assert {what: finding["result"] for what, finding in findings.items()} == {
        "SGLang": "ok",
        "contract, server": "ok",
        "contract, frontend": "ok",
        "hooks": "ok",
        "flags": "skipped",
        "adapter memory": "skipped",
    }
    assert findings["SGLang"]["found"] == version("sglang")


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_named(found: dict[str, Findings], name: str) -> None:
    what, text = BROKEN[name][1]
    faults = [finding for finding in found[name] if finding["result"] == "fault"]
    assert {finding["what"] for finding in faults} == {what}
    assert any(text in finding["found"] for finding in faults), faults
    assert all(finding["advice"] for finding in faults)


def test_a_folder_without_a_model_is_a_fault(found: dict[str, Findings]) -> None:
    assert finding_of(found["empty folder"], "flags")["result"] == "fault"


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_flags_are_refused_as_a_start_refuses_them(found: dict[str, Findings], flags: tuple[str, ...]) -> None:
    refused, told = FLAGS[flags], finding_of(found[" ".join(flags)], "flags")
    assert told["result"] == ("ok" if refused is None else "fault"), told
    assert refused is None or refused in told["found"]
    assert (finding_of(found[" ".join(flags)], "adapter memory")["result"] == "skipped") == (refused is not None)


@pytest.mark.parametrize("flags", MEMORY, ids=" ".join)
def test_the_memory_that_adapters_would_get(found: dict[str, Findings], flags: tuple[str, ...]) -> None:
    """... with the reason where unified memory was left to the server and does not hold."""
    assert finding_of(found[" ".join(flags)], "adapter memory")["found"] == MEMORY[flags]
