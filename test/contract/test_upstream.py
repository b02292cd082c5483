"""Stock SGLang is as expected, is left alone when we are off, and is refused when it is another release."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from blocklora_testing.upstream import HAS_MEGAKERNELS
from sglang_blocklora import SGLANG_VERSIONS
from sglang_blocklora.settings import SETTINGS_VARIABLE, SWITCH_VARIABLE, Settings

PREPARE = "from sglang_blocklora import cpu_only; cpu_only.prepare(1)\n"
LOAD = "from sglang.srt.plugins import load_plugins; load_plugins()\n"
STATE = """
import json, sys
from collections import Counter
from sglang.srt.plugins.hook_registry import HookRegistry
import sglang.srt.lora.lora_manager as m, sglang.srt.entrypoints.http_server as s
import sglang.srt.model_executor.model_runner as r
install = sys.modules.get("blocklora_patches.install")
print("STATE" + json.dumps({
    "patched": sorted(HookRegistry._patched),
    "twice": sorted(t for t, n in Counter(h.target for h in install.HOOKS).items() if n > 1) if install else [],
    "missing": sorted({h.target for h in install.HOOKS} - HookRegistry._patched) if install else [],
    "imported": sorted(n for n in sys.modules if n.startswith("blocklora_patches")),
    "manager": m.LoRAManager.__name__,
    "runner": r.LoRAManager.__name__,
    "wrapped": hasattr(s._setup_and_run_http_server, "__wrapped__"),
}))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in (SETTINGS_VARIABLE, SWITCH_VARIABLE)}
    return subprocess.run(
        [sys.executable, "-c", PREPARE + code], env=kept | environment, capture_output=True, text=True, check=False
    )


def state(**environment: str) -> dict:
    result = run(LOAD + STATE, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.split("STATE")[1])


@pytest.fixture
def releases() -> Any:
    from blocklora_patches.releases import contract

    return contract


@pytest.fixture
def settings() -> dict[str, str]:
    return {SETTINGS_VARIABLE: json.dumps({"adapter_memory_mb": 3})}


def test_the_contract_is_what_the_code_uses_of_the_installed_release() -> None:
    """``releases/*.json`` is generated; after a change: ``python -m blocklora_patches.porting --write``."""
    command = [sys.executable, "-W", "ignore", "-m", "blocklora_patches.porting"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_contract_finds_what_is_used(releases: Any) -> None:
    """Of each kind of use one, so that a generator that overlooks it is found out."""
    contract = json.loads(releases.file_of(version("sglang")).read_text())
    server, frontend = contract["server"], contract["frontend"]
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    assert server["symbols"][f"{scheduler}.on_idle"] == "self", "hooked"
    assert server["symbols"]["sglang.srt.managers.schedule_policy.CLIP_MAX_NEW_TOKENS"] is None, "imported"
    assert "sglang.srt.entrypoints.http_server.openai_v1_detokenize" in server["symbols"], "used of an imported module"
    assert "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.insert" in server["symbols"], "overridden"
    assert "waiting_queue" in server["attributes"][scheduler], "used of a hook's self"
    assert "rid_to_state" in server["attributes"]["sglang.srt.managers.tokenizer_manager.TokenizerManager"], "listed"
    assert not [name for name in frontend["symbols"] if name.startswith("sglang.srt.") and ".plugins" not in name]


def test_every_release_that_is_tested_has_its_files(releases: Any) -> None:
    """And nothing else has: a contract or an adapter module that is never read would tell nothing."""
    names = {release.replace(".", "_") for release in SGLANG_VERSIONS}
    assert {file.stem for file in releases.FOLDER.glob("*.json")} == names
    assert {file.stem for file in releases.FOLDER.glob("v*_*.py")} == {f"v{name}" for name in names}
    assert [*SGLANG_VERSIONS] == sorted(SGLANG_VERSIONS, key=lambda release: [int(part) for part in release.split(".")])


class Base:
    declared: int
    defined = 1

    def __init__(self) -> None:
        self.set, (self.unpacked, _) = 1, (2, 3)
        other = SimpleNamespace()
        other.not_ours = 1


class Derived(Base):
    pass


def test_attributes_are_found_wherever_a_class_gets_them(releases: Any) -> None:
    from blocklora_patches.releases.look import has_attribute

    names = ("declared", "defined", "set", "unpacked", "not_ours", "other", "missing")
    sys.modules.setdefault(Base.__module__, sys.modules[__name__])
    assert [has_attribute(Derived, name) for name in names] == [True] * 4 + [False] * 3


def test_parameters_are_told_with_what_must_be_named(releases: Any) -> None:
    from blocklora_patches.releases.look import parameters

    assert parameters(lambda a, *, b, **c: None) == "a, *, b, **c"
    assert parameters(lambda a, *rest, b: None) == "a, *rest, b"
    assert parameters(3) is None


def test_every_hook_takes_when_our_launcher_started_the_process(settings: dict[str, str]) -> None:
    on = state(**settings)
    assert on["twice"] == [], "whose order would not be seen"
    assert on["manager"] == on["runner"] == "BlockLoRAManager"
    assert on["wrapped"]
    assert on["patched"]
    assert on["missing"] == []


@pytest.mark.parametrize("switched_off", [False, True])
def test_off_means_that_nothing_is_patched_or_imported(settings: dict[str, str], switched_off: bool) -> None:
    """Installed but started by stock SGLang, or switched off: only the entry point is imported."""
    off = state(**(settings | {SWITCH_VARIABLE: "0"} if switched_off else {}))
    assert off["patched"] == []
    assert off["manager"] == off["runner"] == "LoRAManager"
    assert not off["wrapped"]
    assert off["imported"] == sorted(
        f"blocklora_patches{name}" for name in ("", ".plugin", ".releases", ".releases.fail_closed")
    )


REFUSALS = """
import contextlib, json, logging, os
from types import SimpleNamespace
import torch
import blocklora_patches.model.runner as runner
import blocklora_patches.model.unsupported as u
from sglang_blocklora.settings import Settings
from sglang.srt.arg_groups.fields import (
    device, disagg, exec_, lora, memory, model, parallel, schedule, serving, spec
)
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig

warned = []
runner.logger.addFilter(lambda record: warned.append(record))

real = {
    "get_disagg": disagg.Disagg, "get_lora": lora.Lora, "get_spec": spec.Spec, "get_parallel": parallel.Parallel,
    "get_memory": memory.Memory, "get_model": model.Model, "get_schedule": schedule.Schedule,
    "get_serving": serving.Serving, "get_device": device.Device,
}

def refusal(memory, **changed):
    bags = {n: SimpleNamespace(**{f: getattr(bag, f, None) for f in bag.__struct_fields__}) for n, bag in real.items()}
    for name, bag in real.items():  # defaults of the fields that have one
        vars(bags[name]).update(zip(bag.__struct_fields__[-len(bag.__struct_defaults__):], bag.__struct_defaults__))
    groups = {"overlap": exec_.ExecOverlap(), "graph": exec_.ExecGraph(), "kernel": exec_.ExecKernel()}
    groups["deterministic"] = exec_.ExecDeterministic()
    groups["graph"].cuda_graph_config = CudaGraphConfig()
    groups["graph"].cuda_graph_config.decode.backend = changed.get("decode_graphs", "full")
    os.environ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"] = str(int(changed.get("late_sizing", False)))
    bags["get_exec"] = SimpleNamespace(**groups)
    vars(bags["get_parallel"]).update(attn_dcp_size=1, attn_dp_enabled=False)
    bags["get_memory"].radix_cache_backend = None if memory == "static" else "blocklora"
    config = SimpleNamespace(
        attention_arch=AttentionArch.MHA,
        is_hybrid_swa=False, dtype=torch.bfloat16, head_dim=64, v_head_dim=64, get_num_kv_heads=lambda tp: 8 // tp,
    )
    u.uses_ssm_state = lambda config: changed.get("uses_ssm_state", False)
    for target in (config, *bags.values(), *groups.values()):
        for name, value in changed.items():
            if hasattr(target, name):
                setattr(target, name, value)
    for name, bag in bags.items():
        setattr(u, name, lambda bag=bag: bag)
    vars(bags["get_parallel"]).update(tp_rank=0)
    runner.get_parallel = u.get_parallel
    warned.clear()
    try:
        settings = runner.settled(Settings(adapter_memory=memory), config)
    except ValueError as error:
        return {"refused": str(error)}
    return {"memory": settings.adapter_memory, "warned": [record.getMessage() for record in warned]}

cases = json.loads(os.environ["CASES"])
for _, changed in cases:
    if "attention_arch" in changed:
        changed["attention_arch"] = AttentionArch[changed["attention_arch"]]
print("FOUND" + json.dumps([refusal(memory, **changed) for memory, changed in cases]))
"""
# The field that tells of it in 0.5.21, and the one in later releases.
DP_ATTENTION = {"enable_dp_attention": True, "attn_dp_enabled": True}
STATIC, STOCK = "Use --adapter-memory static", "start stock SGLang"
# --adapter-memory, what is on, what one message must name
REFUSED = [
    ("unified", {}, []),
    ("static", {"enable_hierarchical_cache": True, "disable_radix_cache": True, "kv_cache_dtype": "fp8_e4m3"}, []),
    ("unified", {"kv_cache_dtype": "bf16", "kv_events_config": "{}"}, []),
    ("unified", {"head_dim": 12, "v_head_dim": 12, "tp_size": 8}, ["a K row of 12 elements", STATIC]),
    ("static", {"pp_size": 2, "enable_torch_compile": True}, ["--pp-size", "--enable-torch-compile", STOCK]),
    (
        "static",
        {
            "attn_cp_size": 2,
            "attn_dcp_size": 2,
            "enable_layernorm_sp": True,
            "enable_two_batch_overlap": True,
            "enable_pdmux": True,
            "enable_lora_overlap_loading": True,
        },
        [
            "--attn-cp-size",
            "--dcp-size",
            "--enable-layernorm-sp",
            "--enable-two-batch-overlap",
            "--enable-pdmux",
            "--enable-lora-overlap-loading",
            STOCK,
        ],
    ),
    ("static", DP_ATTENTION, ["--enable-dp-attention", STOCK]),
    ("static", {"enable_deterministic_inference": True, "device": "cpu"}, ["--enable-deterministic-inference", STOCK]),
    ("unified", {"enable_deterministic_inference": True, "device": "cuda"}, []),
    ("unified", {"speculative_algorithm": "NGRAM"}, []),
    ("static", {"speculative_algorithm": "EAGLE"}, []),
    ("unified", {"speculative_algorithm": "EAGLE3"}, ["--speculative-algorithm EAGLE3", STATIC]),
    ("static", {"speculative_algorithm": "DFLASH"}, ["--speculative-algorithm DFLASH", STOCK]),
    (
        "static",
        {"decode_graphs": "tc_piecewise", "late_sizing": True},
        ["--cuda-graph-backend-decode tc_piecewise", STOCK] if version("sglang") == "0.5.21" else [],
    ),
    ("unified", {"late_sizing": True}, ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", STATIC]),
    (
        "static",
        {"enable_nvidia_megakernel": True, "enable_amd_monokernel": True},
        ["--enable-nvidia-megakernel", "--enable-amd-monokernel", STOCK] if HAS_MEGAKERNELS else [],
    ),
    ("static", {"radix_cache_backend": "blocklora"}, ["--radix-cache-backend blocklora"]),
    ("unified", {"radix_cache_backend": "theirs"}, ["--radix-cache-backend theirs", STATIC]),
    (
        "unified",
        {
            "enable_hierarchical_cache": True,
            "disable_radix_cache": True,
            "enable_session_radix_cache": True,
            "enable_streaming_session": True,
            "enable_lmcache": True,
            "enable_flexkv": True,
            "enable_unified_cache_external_linker": True,
            "enable_page_major_kv_layout": True,
            "prefill_only_disable_kv_cache": True,
            "disaggregation_mode": "prefill",
            "kv_cache_dtype": "fp8_e4m3",
            "pp_size": 2,
        },
        [
            "--enable-hierarchical-cache",
            "--disable-radix-cache",
            "--enable-session-radix-cache",
            "--enable-streaming-session",
            "--enable-lmcache",
            "--enable-flexkv",
            "--enable-unified-cache-external-linker",
            "--enable-page-major-kv-layout",
            "--prefill-only-disable-kv-cache",
            "--disaggregation-mode",
            "--kv-cache-dtype fp8_e4m3",
            "--pp-size",
            STATIC,
            STOCK,
        ],
    ),
    (
        "unified",
        {
            "is_hybrid_swa": True,
            "uses_ssm_state": True,
            "v_head_dim": 32,
        },
        ["sliding-window", "(Mamba)", "V rows of another width", STATIC],
    ),
    ("unified", {"attention_arch": "MLA", "v_head_dim": 12}, ["(MLA)", STATIC]),
    ("static", {"attention_arch": "MLA", "v_head_dim": 12}, []),
]


def settled(cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What becomes of each --adapter-memory with what is on: refused, or memory and warnings."""
    result = run(REFUSALS, CASES=json.dumps(cases))
    assert "FOUND" in result.stdout, result.stderr[-3000:]
    return json.loads(result.stdout.split("FOUND")[1])


def test_everything_unsupported_is_refused_in_one_message() -> None:
    """The real runtime context's fields at their defaults, but for what is on; nothing else may be named."""
    found = settled([(memory, on) for memory, on, _ in REFUSED])
    every_flag = {part for _, _, named in REFUSED for part in named}
    for (memory, on, named), one in zip(REFUSED, found, strict=True):
        message = one.get("refused")
        assert (message is None) == (named == []), (on, message)
        if message is None:
            assert one == {"memory": memory, "warned": []}
        else:
            assert {part for part in every_flag if part in message} >= set(named), (on, message)
            unwanted = {p for p in every_flag - set(named) if p in message and not any(p in n for n in named)}
            assert not unwanted, (on, message)


def test_static_memory_is_chosen_with_one_warning_where_unified_memory_would_be_refused() -> None:
    """... and nothing was asked for; what neither memory supports is refused as before."""
    cases = [(on, named) for memory, on, named in REFUSED if memory == "unified"]
    for (on, named), found in zip(cases, settled([("auto", on) for on, _ in cases]), strict=True):
        if STOCK in named:
            assert STOCK in found["refused"], on
            assert STATIC not in found["refused"], on
        elif not named:
            assert found == {"memory": "unified", "warned": []}, on
        else:
            assert found["memory"] == "static", on
            (warning,) = found["warned"]
            assert "an arena of their own, 1024 MiB on each TP rank" in warning
            assert all(part in warning for part in named if part != STATIC), (on, warning)


def test_a_model_without_decoder_layers_is_refused() -> None:
    code = """
import torch
from blocklora_patches.model.linears import adaptable_linears
try:
    adaptable_linears(type("BertModel", (torch.nn.Module,), {})())
except ValueError as error:
    print("REFUSED", error)
"""
    assert "REFUSED BertModel has no decoder layers with linears that adapters can be on" in run(code).stdout


def test_ranks_with_other_settings_are_refused() -> None:
    """Several nodes have a launcher each, and TP ranks must decide alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from blocklora_patches.model.runner import refuse_other_settings
    given = [Settings(adapter_memory_mb=3), Settings(adapter_memory_mb=3, decision_log="elsewhere")]
    refuse_other_settings([msgspec.to_builtins(settings) for settings in given])
    given.append(Settings(adapter_memory_mb=4, adapter_max_wait_steps=1))
    with pytest.raises(ValueError, match=r"TP rank 2 .*: adapter_memory_mb 4 \(rank 0: 3\), adapter_max_wait_steps 1"):
        refuse_other_settings([msgspec.to_builtins(settings) for settings in given])


def test_settings_survive_the_trip(settings: dict[str, str]) -> None:
    code = "from sglang_blocklora.settings import Settings; print(Settings.active())"
    assert run(code, **settings).stdout.strip() == str(Settings(adapter_memory_mb=3))
