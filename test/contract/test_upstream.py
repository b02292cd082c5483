"""Stock SGLang is as expected, is left alone when we are off, and is refused when it is another release."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from sglang_blocklora import SGLANG_VERSION
from sglang_blocklora.settings import SETTINGS_VARIABLE, SWITCH_VARIABLE, Settings

PREPARE = "from sglang_blocklora import cpu_only; cpu_only.prepare(1)\n"
LOAD = "from sglang.srt.plugins import load_plugins; load_plugins()\n"
STATE = """
import json, sys
from sglang.srt.plugins.hook_registry import HookRegistry
import sglang.srt.lora.lora_manager as m, sglang.srt.entrypoints.openai.serving_base as s
import sglang.srt.model_executor.model_runner as r
install = sys.modules.get("blocklora_patches.install")
print("STATE" + json.dumps({
    "patched": sorted(HookRegistry._patched),
    "missing": sorted({h.target for h in install.HOOKS} - HookRegistry._patched) if install else [],
    "imported": sorted(n for n in sys.modules if n.startswith("blocklora_patches")),
    "manager": m.LoRAManager.__name__,
    "runner": r.LoRAManager.__name__,
    "wrapped": hasattr(s.OpenAIServingBase._resolve_lora_path, "__wrapped__"),
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
def settings() -> dict[str, str]:
    return {SETTINGS_VARIABLE: json.dumps({"adapter_memory_mb": 1})}


def test_every_upstream_symbol_is_as_expected() -> None:
    code = "from blocklora_patches.contract import FRONTEND_SYMBOLS, mismatches\n"
    result = run(code + "print(mismatches() + mismatches(FRONTEND_SYMBOLS))")
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stdout + result.stderr[-2000:]


def test_every_hook_takes_when_our_launcher_started_the_process(settings: dict[str, str]) -> None:
    on = state(**settings)
    assert on["manager"] == on["runner"] == "BlockLoRAManager"
    assert on["wrapped"]
    assert on["patched"]
    assert on["missing"] == []


@pytest.mark.parametrize("switched_off", [False, True])
def test_off_means_that_nothing_is_patched_or_imported(settings: dict[str, str], switched_off: bool) -> None:
    """Installed but started by stock SGLang, or switched off: only the entry point itself is imported."""
    off = state(**(settings | {SWITCH_VARIABLE: "0"} if switched_off else {}))
    assert off["patched"] == []
    assert off["manager"] == off["runner"] == "LoRAManager"
    assert not off["wrapped"]
    assert off["imported"] == ["blocklora_patches", "blocklora_patches.plugin"]


def test_another_release_stops_at_once_with_the_version_that_is_needed(settings: dict[str, str]) -> None:
    code = "import blocklora_patches.contract as c\nc.version = lambda name: '0.5.22'\n" + LOAD
    result = run(code, **settings)
    assert result.returncode != 0
    assert f"sglang=={SGLANG_VERSION}" in result.stderr
    assert "0.5.22" in result.stderr


def test_a_changed_symbol_stops_with_its_name(settings: dict[str, str]) -> None:
    code = "import sglang.srt.lora.lora_manager as m\nm.LoRAManager.fetch_new_loras = lambda self, other: None\n" + LOAD
    result = run(code, **settings)
    assert result.returncode != 0
    assert "fetch_new_loras: expected parameters ('self', 'new_loras', 'running_loras')" in result.stderr


def test_unsupported_modes_are_refused_in_one_message() -> None:
    """Two modes are on; the real runtime context must have all of them."""
    code = """
from types import SimpleNamespace
import blocklora_patches.unsupported as u
from sglang.srt.arg_groups.fields import disagg, exec_, lora, parallel, spec

real = {"get_disagg": disagg.Disagg, "get_lora": lora.Lora, "get_spec": spec.Spec, "get_parallel": parallel.Parallel}
bags = {name: SimpleNamespace(**{f: getattr(bag(), f) for f in bag.__struct_fields__}) for name, bag in real.items()}
bags["get_exec"] = SimpleNamespace(overlap=exec_.ExecOverlap(), graph=exec_.ExecGraph())
bags["get_parallel"].attn_dcp_size = 1
for name, bag in bags.items():
    setattr(u, name, lambda bag=bag: bag)
u.refuse_unsupported()
bags["get_parallel"].pp_size, bags["get_exec"].graph.enable_torch_compile = 2, True
try:
    u.refuse_unsupported()
except ValueError as error:
    print("REFUSED", error)
"""
    result = run(code)
    refused = result.stdout.rpartition("REFUSED")[2]
    assert "--pp-size" in refused, result.stderr[-2000:]
    assert "--enable-torch-compile" in refused
    assert "--enable-pdmux" not in refused


def test_other_architectures_are_refused_at_start_up() -> None:
    code = """
import torch
from blocklora_patches.model_spec import adaptable_linears
try:
    adaptable_linears(type("DeepseekV3ForCausalLM", (torch.nn.Module,), {})())
except ValueError as error:
    print("REFUSED", error)
"""
    assert "does not serve DeepseekV3ForCausalLM; it serves LlamaForCausalLM" in run(code).stdout


def test_settings_survive_the_trip(settings: dict[str, str]) -> None:
    code = "from sglang_blocklora.settings import Settings; print(Settings.active())"
    assert run(code, **settings).stdout.strip() == str(Settings(adapter_memory_mb=1))
