"""Nothing fails open: whatever goes wrong while our hooks are put in place ends the process, and says what to do.

Every case runs in a fork (``blocklora_testing.forks``).
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest
from blocklora_testing.forks import STOPPED, Ended, plugin, run_cases
from sglang_blocklora.settings import SETTINGS_VARIABLE, SWITCH_VARIABLE, Settings

ON = {SETTINGS_VARIABLE: json.dumps({"adapter_memory_mb": 3})}
LOAD = "from sglang.srt.plugins import load_plugins; load_plugins()\n"

# What happened to SGLang or to us -> what the message must say beside the release.
BROKEN = {
    "a value vanished": (
        "import sglang.srt.managers.schedule_policy as m; del m.CLIP_MAX_NEW_TOKENS",
        ["schedule_policy.CLIP_MAX_NEW_TOKENS: expected, and not found"],
    ),
    "a class vanished": (
        "import sglang.srt.mem_cache.memory_pool as m; del m.MHATokenToKVPool",
        ["memory_pool.MHATokenToKVPool: expected, and not found"],
    ),
    "a method vanished": (
        "import sglang.srt.managers.scheduler as m; del m.Scheduler.on_idle",
        ["Scheduler.on_idle: expected, and not found"],
    ),
    "a module vanished": (
        "import sys, sglang.srt.lora as p; sys.modules[p.__name__ + '.lora_registry'] = None; del p.lora_registry",
        ["lora_registry.LoRARef: expected, and not found"],
    ),
    "a signature changed": (
        "import sglang.srt.lora.lora_manager as m; m.LoRAManager.fetch_new_loras = lambda self, other: None",
        ["fetch_new_loras: expected parameters (self, new_loras, running_loras), found (self, other)"],
    ),
    "a function became a value": (
        "import sglang.srt.managers.scheduler as m; m.Scheduler.on_idle = 3",
        ["Scheduler.on_idle: expected parameters (self), found None"],
    ),
    "an attribute vanished": (
        "import sglang.srt.managers.tokenizer_manager as m; m.ReqState = type('ReqState', (), {'__module__': 'm'})",
        ["tokenizer_manager.ReqState.ttft_observed: expected, and not found"],
    ),
    "a class became a function": (
        "import sglang.srt.managers.tokenizer_manager as m; m.ReqState = lambda: None",
        ["tokenizer_manager.ReqState: expected a class, found function"],
    ),
    "all of it is told at once": (
        """
        import sglang.srt.managers.scheduler as m
        import sglang.srt.managers.tokenizer_manager as n
        del m.Scheduler.on_idle, n.TokenizerManager.collect_metrics
        """,
        ["Scheduler.on_idle: expected", "TokenizerManager.collect_metrics: expected"],
    ),
    "a file of ours does not import": (
        "import sys; sys.modules['blocklora_patches.scheduler.admission'] = None",
        ["ModuleNotFoundError", "blocklora_patches.scheduler"],
    ),
    "the contract does not import": (
        "import sys; sys.modules['blocklora_patches.releases.contract'] = None",
        ["ModuleNotFoundError", "blocklora_patches.releases.contract"],
    ),
    "the registry raises": (
        """
        from sglang.srt.plugins.hook_registry import HookRegistry
        def broken(target, hooks): raise TypeError("cannot wrap " + target)
        HookRegistry._apply_target = broken
        """,
        ["TypeError: cannot wrap sglang.srt"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_misfit_ends_the_process_and_says_which(ended: dict[str, Ended], name: str) -> None:
    case = ended[name]
    assert case.status == STOPPED, case.text
    for part in [*BROKEN[name][1], "sglang-blocklora", version("sglang"), "stock SGLang"]:
        assert part in case.text


UNKNOWN = """
import blocklora_patches.releases.contract as c
c.SGLANG_VERSIONS = (c.version("sglang"),)
c.version = lambda name, last=c.version("sglang"): last + ".dev1"
"""
ACCEPTING = {SETTINGS_VARIABLE: json.dumps({"accept_unknown_sglang": True})}
UNKNOWN_RELEASES = {
    "an unknown release": (ON, UNKNOWN),
    "an unknown release that is accepted": (ACCEPTING, UNKNOWN),
    "an unknown release that misfits": (ACCEPTING, BROKEN["a method vanished"][0] + UNKNOWN),
}


def test_an_unknown_release_is_held_to_the_last_one_and_let_in_only_when_asked(ended: dict[str, Ended]) -> None:
    refused, accepted, misfit = (ended[name] for name in UNKNOWN_RELEASES)
    last = version("sglang")
    assert (refused.status, accepted.status, misfit.status) == (STOPPED, 0, STOPPED), (refused, accepted, misfit)
    assert f"found {last}.dev1. All that it uses looks there as in {last};" in refused.text
    assert "--accept-unknown-sglang" in refused.text
    assert f"{last}.dev1 is unknown and taken for {last}" in accepted.text
    assert "PATCHED True" in accepted.text
    assert f"does not fit the installed SGLang {last}.dev1:\n" in misfit.text
    assert BROKEN["a method vanished"][1][0] in misfit.text


NOT_UNDERSTOOD = {
    "an unknown field": '{"adapter_memory_mb": 3, "adapter_memory_gb": 1}',
    "a wrong type": '{"adapter_memory_mb": "3"}',
    "a wrong choice": '{"adapter_memory": "elastic"}',
    "a wrong strategy": '{"adapter_eviction": "mru"}',
    "no number": '{"adapter_memory_mb": true}',
    "no object": "[]",
    "an empty text": "",
    "broken JSON": '{"adapter_memory_mb": 3',
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_settings_that_are_not_understood_end_the_process(ended: dict[str, Ended], name: str) -> None:
    case = ended[name]
    assert case.status == STOPPED, case.text
    for part in (SETTINGS_VARIABLE, repr(NOT_UNDERSTOOD[name]), f"{SWITCH_VARIABLE}=0"):
        assert part in case.text


EVERYTHING = Settings(adapter_memory="static", adapter_weights={"a": 2.0}, adapter_dirs=("/x",), adapter_roots=("/",))


def test_settings_with_every_kind_of_field_are_understood(ended: dict[str, Ended]) -> None:
    assert ended["all settings"].text.strip() == str(EVERYTHING)


HOOKING = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
def note(*args, **kwargs):
    global noted
    noted = True
def run():
    HookRegistry.register({target!r}, note, HookType.BEFORE)
"""
OURS = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"
METHOD = "sglang.srt.lora.lora_manager.LoRAManager.fetch_new_loras"
OVERRIDDEN = "sglang.srt.managers.tokenizer_manager.TokenizerManager.load_lora_adapter"


CHECK = "from blocklora_patches.hooks.apply import check; print('LOADED', flush=True); check()\n"
SCHEDULER = "from sglang.srt.model_executor.model_runner import ModelRunner; ModelRunner.load_model(None)\n"


def with_plugins(folder: Path) -> dict[str, tuple[dict[str, str], str]]:
    """Cases with a second plugin that competes with ours, and with two that do not."""
    on_ours, on_method, on_overridden = (HOOKING.format(target=target) for target in (OURS, METHOD, OVERRIDDEN))
    on_other = HOOKING.format(target="sglang.srt.utils.common.get_device")
    applied = on_ours + "    HookRegistry.apply_hooks()\n"
    first, last = "import sys; sys.path.insert(0, {!r})\n", "import sys; sys.path.append({!r})\n"
    rivals = {
        "first": first.format(plugin(folder / "a", "rival", on_ours)) + LOAD,
        "first, and in place": first.format(plugin(folder / "b", "rival", applied)) + LOAD,
        "last": last.format(plugin(folder / "c", "rival", on_ours)) + LOAD + CHECK,
        "last, in a scheduler": last.format(str(folder / "c")) + LOAD + "print('LOADED', flush=True)\n" + SCHEDULER,
        "last, a method of a class of ours": last.format(plugin(folder / "d", "rival", on_method)) + LOAD + CHECK,
        "first, a method that we override": first.format(plugin(folder / "g", "rival", on_overridden)) + LOAD,
    }
    others = first.format(plugin(folder / "e", "early", on_other)) + last.format(plugin(folder / "f", "late", on_other))
    others += LOAD + CHECK + "import early, late\nfrom sglang.srt.utils.common import get_device; get_device()\n"
    others += "print(early.noted, late.noted)\n"
    return {name: (ON, code) for name, code in {**rivals, "others": others}.items()}


RIVALS = [
    "first",
    "first, and in place",
    "first, a method that we override",
    "last",
    "last, in a scheduler",
    "last, a method of a class of ours",
]


@pytest.mark.parametrize("name", RIVALS)
def test_another_plugin_on_our_targets_ends_the_process_and_is_named(ended: dict[str, Ended], name: str) -> None:
    case = ended[name]
    assert case.status == STOPPED, case.text
    assert ("LOADED" in case.text) == name.startswith("last"), case.text
    assert "hooked by sglang-blocklora and, before, by plugin rival of rival-dist (rival.note)" in case.text
    assert "SGLANG_PLUGINS" in case.text


def test_plugins_on_other_targets_all_run(ended: dict[str, Ended]) -> None:
    """One before ours and one behind it hook the same function: ours must not put the first in place too early."""
    assert ended["others"].status == 0, ended["others"].text
    assert ended["others"].text.endswith("True True\n")


TAKEN = LOAD + "import sglang.srt.managers.scheduler as m\ndef mine(self): pass\nm.Scheduler.on_idle = mine\n"


@pytest.mark.parametrize("name", ["taken, in the launcher", "taken, in a scheduler"])
def test_code_that_takes_a_hook_away_ends_the_process(ended: dict[str, Ended], name: str) -> None:
    assert ended[name].status == STOPPED, ended[name].text
    assert "Scheduler.on_idle: replaced by" in ended[name].text


# Ways past our hooks -> SGLang's flags, environment, and how the message names them.
PAST_US = {
    "tokenizer workers": (["--tokenizer-worker-num", "2"], {}, "--tokenizer-worker-num 2 (each worker"),
    "SMG": (["--smg-grpc-mode"], {}, "--smg-grpc-mode (another server"),
    "gRPC": (["--grpc-mode"], {}, "--grpc-mode (another server"),
    "native gRPC": (["--grpc-port", "5"], {}, "--grpc-port or SGLANG_GRPC_PORT ("),
    "native gRPC by environment": ([], {"SGLANG_GRPC_PORT": "5"}, "--grpc-port or SGLANG_GRPC_PORT ("),
    "Rust": ([], {"SGLANG_RUST_SERVER": "1"}, "SGLANG_RUST_SERVER (another server"),
    "encoder": (["--encoder-only"], {}, "--encoder-only (another server"),
    "Ray": (["--use-ray"], {}, "--use-ray (its actors"),
    "left out": ([], {"SGLANG_PLUGINS": "other"}, "Found {'SGLANG_PLUGINS': 'other'}. Add blocklora to SGLANG_PLUGINS"),
    "nothing": ([], {"SGLANG_PLUGINS": "other, blocklora"}, None),
}
LAUNCH = """
import blocklora_patches.launch as launch
launch.run_server = lambda arguments: print("STARTED", flush=True)
launch.kill_process_tree = lambda *args, **kwargs: None
launch.run_sglang(["--model-path", "m", *{flags!r}])
"""


@pytest.mark.parametrize("name", [*PAST_US, "switched off"])
def test_what_would_answer_without_our_hooks_is_refused_by_name(ended: dict[str, Ended], name: str) -> None:
    case, message = ended[name], PAST_US[name][2] if name in PAST_US else None
    assert case.status == (STOPPED if message else 0), case.text
    assert (message or "STARTED") in case.text
    assert ("STARTED" in case.text) == (message is None)


def test_every_server_that_sglang_can_start_is_known(ended: dict[str, Ended]) -> None:
    """``run_server`` chooses by these flags; another one in there would be a way past our hooks."""
    source = ast.parse(ended["servers"].text)
    tests = [node.test for node in ast.walk(source) if isinstance(node, ast.If)]
    chosen_by = {node.attr for test in tests for node in ast.walk(test) if isinstance(node, ast.Attribute)}
    assert chosen_by == {"encoder_only", "smg_grpc_mode", "grpc_mode", "use_ray", "tokenizer_path"}


HTTP2 = """
import sys, types
class Anything:
    def __getattr__(self, name): return Anything()
    def __call__(self, *args, **kwargs): return Anything()
for name in ("granian", "granian.constants", "granian.http", "granian.server", "granian.server.embed"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__getattr__ = lambda _: Anything()
class Server:
    def __init__(self, target, **options):
        print("SERVES", target is http_server.app, flush=True)
        raise SystemExit
sys.modules["granian.server.embed"].Server = Server
import sglang.srt.entrypoints.http_server as http_server
http_server._run_granian_server("127.0.0.1", 1, "info", 1, 1)
"""


def test_the_http2_server_serves_the_app_of_the_process_with_our_hooks(ended: dict[str, Ended]) -> None:
    """``--enable-http2``: another server program (a stand-in here), the same application object in the same process."""
    assert "SERVES True" in ended["HTTP/2"].text, ended["HTTP/2"].text


def test_a_refusal_reaches_the_command_line() -> None:
    """The whole launcher, as a user starts it."""
    command = [sys.executable, "-m", "sglang_blocklora.launch_server", "--model-path", "m"]
    result = subprocess.run(
        [*command, "--tokenizer-worker-num", "2"], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 1
    assert "sglang-blocklora does not support --tokenizer-worker-num 2" in result.stderr
    assert "Traceback" not in result.stderr


ENGINE = """
import os, subprocess, sys
from sglang_blocklora import frontend
from sglang_blocklora.settings import SETTINGS_VARIABLE, Settings
import blocklora_patches.launch as launch
from sglang.srt.entrypoints.engine import Engine

child = [sys.executable, "-c", '''
from sglang_blocklora import cpu_only; cpu_only.prepare(1)
from sglang.srt.plugins import load_plugins; load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
print("CHILD", bool(HookRegistry._patched), flush=True)
''']
def engine(server_args):
    print("IN FORCE", Settings.from_environment() == Settings(adapter_memory="static"), flush=True)
    subprocess.run(child)
def launched(cls, server_args):
    print("LAUNCHED", flush=True)
Engine.__init__ = lambda self, **kwargs: engine(**kwargs)
frontend.engine(model_path="m", adapter_memory="static")
print("EXPORTED", SETTINGS_VARIABLE in os.environ)
print("KEPT", Settings.active() == Settings(adapter_memory="static"), flush=True)
subprocess.run(child)
try:
    Engine._launch_subprocesses(None)
except RuntimeError as error:
    print(error)
"""


DOUBLE = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from blocklora_patches.hooks.apply import apply
from blocklora_patches.hooks.hook import Hook, Process
def hook(handler, kind):
    return Hook("sglang.srt.utils.common.get_device", handler, kind, process=Process.HTTP, why="", retire_when="")
def first(*args): pass
def second(*args): pass
for kind in (HookType.BEFORE, HookType.AFTER):
    try:
        apply([hook(first, HookType.BEFORE), hook(second, kind)])
    except ValueError as error:
        print(error, bool(HookRegistry._patched))
apply([hook(first, HookType.BEFORE)])
apply([hook(first, HookType.BEFORE)])
print(*HookRegistry._patched)
"""


def test_two_hooks_of_ours_on_one_target_are_refused(ended: dict[str, Ended]) -> None:
    """The registry runs BEFORE hooks last registered first, and nothing in our files would show that."""
    lines = ended["two of ours"].text.splitlines()
    refused = "two hooks on sglang.srt.utils.common.get_device: write one handler that calls both, in the order meant"
    assert lines == [f"{refused} False"] * 2 + ["sglang.srt.utils.common.get_device"]


STOCK_FIRST = (
    LOAD
    + """
from sglang_blocklora.settings import Settings
import blocklora_patches.launch as launch
import sglang.srt.lora.lora_manager as m
print(m.LoRAManager.__name__)
with Settings().exported():
    launch.put_hooks_in_place()
print(m.LoRAManager.__name__)
"""
)


def test_settings_end_with_the_call_that_gave_them(ended: dict[str, Ended]) -> None:
    """Processes that ``frontend.engine`` starts have them, later ones do not; this one remembers them."""
    case = ended["ours, then stock"]
    assert case.status == 0, case.text
    marks = [line for line in case.text.splitlines() if line.rpartition(" ")[2] in ("True", "False")]
    assert marks == ["IN FORCE True", "CHILD True", "EXPORTED False", "KEPT True", "CHILD False"], case.text
    assert "which cannot run a stock one since" in case.text


def test_an_engine_of_ours_may_follow_a_stock_one(ended: dict[str, Ended]) -> None:
    """SGLang calls plugins once in a process, and did so when there were no settings."""
    assert ended["stock, then ours"].text.split() == ["LoRAManager", "BlockLoRAManager"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Every case, run."""
    read = "from sglang_blocklora.settings import Settings; print(Settings.from_environment())"
    with EVERYTHING.exported():
        exported = os.environ[SETTINGS_VARIABLE]
    assert SETTINGS_VARIABLE not in os.environ
    cases = {
        "all settings": ({SETTINGS_VARIABLE: exported}, read),
        "taken, in the launcher": (ON, TAKEN + CHECK),
        "taken, in a scheduler": (ON, TAKEN + SCHEDULER),
        "switched off": (ON | {SWITCH_VARIABLE: "0"}, LAUNCH.format(flags=["--tokenizer-worker-num", "2"])),
        "servers": ({}, "import inspect, sglang.launch_server as m; print(inspect.getsource(m.run_server))"),
        "HTTP/2": (ON, HTTP2),
        "two of ours": ({}, DOUBLE),
        "ours, then stock": ({}, ENGINE),
        "stock, then ours": ({}, STOCK_FIRST),
        **with_plugins(tmp_path_factory.mktemp("plugins")),
    }
    cases |= {name: (ON, textwrap.dedent(code) + "\n" + LOAD) for name, (code, _) in BROKEN.items()}
    patched = "from sglang.srt.plugins.hook_registry import HookRegistry; print('PATCHED', bool(HookRegistry._patched))"
    cases |= {name: (on, f"{code}\n{LOAD}{patched}") for name, (on, code) in UNKNOWN_RELEASES.items()}
    cases |= {name: ({SETTINGS_VARIABLE: text}, LOAD) for name, text in NOT_UNDERSTOOD.items()}
    cases |= {name: (ON | extra, LAUNCH.format(flags=flags)) for name, (flags, extra, _) in PAST_US.items()}
    return run_cases(cases)
