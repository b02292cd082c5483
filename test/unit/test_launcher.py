"""The launcher's own part: flags, settings, model names, import direction. Nothing here imports SGLang."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sglang_blocklora import configuration, cpu_only, flags, launch_server
from sglang_blocklora.naming import model_names
from sglang_blocklora.settings import SETTINGS_VARIABLE, SWITCH_VARIABLE, Settings

REPOSITORY = Path(__file__).parents[2]


def test_defaults_for_adapters_are_added_and_the_users_flags_win() -> None:
    own = ["--adapter-memory", "static", "--adapter-memory-mb", "7"]
    settings, argv = launch_server.parse(["--model-path", "m", "--max-loras-per-batch=5", *own])
    assert settings == Settings(adapter_memory="static", adapter_memory_mb=7)
    assert argv[:3] == ["--model-path", "m", "--max-loras-per-batch=5"]
    assert argv.count("--enable-lora") == 1
    assert "--max-loras-per-batch" not in argv
    assert not {"--adapter-memory", "--adapter-memory-mb", "--radix-cache-backend"} & set(argv)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--max-loaded-loras", "8"], "8"),
        (["--max-loaded-loras=1"], "1"),
        (["--max-loaded-loras", "64"], "64"),
        (["--max-loaded-loras", "1000"], "64"),
        ([], "64"),
    ],
)
def test_a_batch_has_no_more_adapters_than_may_be_loaded(given: list[str], expected: str) -> None:
    _, argv = launch_server.parse(given)
    assert argv[argv.index("--max-loras-per-batch") + 1] == expected


@pytest.mark.parametrize("given", [[], ["--adapter-memory", "unified"]])
def test_unified_memory_and_what_may_become_it_bring_its_cache(given: list[str]) -> None:
    settings, argv = launch_server.parse(["--model-path", "m", *given])
    assert settings.adapter_memory == (given[1] if given else "auto")
    assert argv[argv.index("--radix-cache-backend") + 1] == "blocklora"


def test_our_schedule_policy_is_the_default_and_sglangs_can_be_chosen() -> None:
    settings, argv = launch_server.parse(["--adapter-weight", "a=2", "--adapter-weight", "b=c=0.5"])
    assert settings.adapter_affinity
    assert settings.adapter_weights == {"a": 2.0, "b=c": 0.5}
    assert "--schedule-policy" not in argv
    assert launch_server.parse(["--schedule-policy", "adapter-affinity"]) == launch_server.parse([])
    settings, argv = launch_server.parse(["--schedule-policy=lpm"])
    assert not settings.adapter_affinity
    assert argv[:2] == ["--schedule-policy", "lpm"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--adapter-root", "/nowhere"],
        ["--adapter-dir", "/nowhere"],
        ["--adapter-dir", "/tmp", "--adapter-root", "/usr"],
        ["--adapter-memory", "elastic"],
        ["--adapter-kernels", "numpy"],
        ["--adapter-eviction", "mru"],
        ["--adapter-max-wait-steps", "1.5"],
        ["--adapter-host-memory-gb", "much"],
        ["--adapter-host-memory-gb", "-1"],
        ["--adapter-host-memory-gb", "inf"],
        ["--adapter-host-memory-gb", "nan"],
        ["--adapter-read-timeout", "0"],
        ["--adapter-memory-mb", "0", "--adapter-memory", "static"],
        ["--adapter-memory-mb", "64"],  # of no use to unified memory
        ["--adapter-max-wait-steps", "0"],
        ["--adapter-round-chunks", "0"],
        ["--adapter-weight", "a"],
        ["--adapter-weight", "=1"],
        ["--adapter-weight", "a=0"],
        ["--adapter-weight", "a=nan"],
        ["--adapter-weight", "a=1", "--adapter-weight", "a=2"],
        ["--config", "flags.yaml"],  # SGLang's: the defaults of this launcher would override it
    ],
)
def test_impossible_flags_stop_with_a_message(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match=argv[0]):
        launch_server.parse(argv)


def test_kernels_are_tritons_where_asked_for_and_on_a_gpu() -> None:
    for kernels, on_gpu, expected in (
        ("triton", False, True),
        ("auto", True, True),
        ("torch", True, False),
        ("auto", False, False),
    ):
        assert Settings(adapter_kernels=kernels).uses_triton(on_gpu) == expected


def test_sglangs_load_balance_methods_are_passed_on_and_ours_is_not() -> None:
    for given in ([], ["--load-balance-method", "adapter-affinity"]):
        settings, argv = launch_server.parse(given)
        assert settings.route_by_adapter
        assert "--load-balance-method" not in argv
    settings, argv = launch_server.parse(["--load-balance-method=total_tokens"])
    assert not settings.route_by_adapter
    assert argv[:2] == ["--load-balance-method", "total_tokens"]


def test_settings_reach_other_processes_and_the_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTINGS_VARIABLE, raising=False)
    assert Settings.active() is None
    with pytest.raises(RuntimeError, match=SETTINGS_VARIABLE):
        Settings.required()
    settings = Settings(
        adapter_memory_mb=3, adapter_roots=("/root",), adapter_weights={"a": 2.0}, adapter_dirs=("/root/a",)
    )
    with settings.exported():
        assert Settings.active() == Settings.required() == settings
        with Settings().exported():
            assert Settings.active() == Settings()
        assert Settings.active() == settings
        monkeypatch.setenv(SWITCH_VARIABLE, "0")
        assert Settings.active() is None
        monkeypatch.delenv(SWITCH_VARIABLE)
    assert Settings.active() is None


TENANTS = str(REPOSITORY / "deploy/tenants.toml")
GIVEN = {
    "--adapter-memory": (["static"], "static"),
    "--adapter-memory-mb": (["3"], 3),
    "--adapter-eviction": (["lru"], "lru"),
    "--adapter-host-memory-gb": (["0.5"], 0.5),
    "--adapter-read-timeout": (["7"], 7.0),
    "--adapter-root": (["/", "S3://bucket/"], ("/", "s3://bucket")),
    "--adapter-loading-without-key": ([], True),
    "--adapter-dir": (["/usr/", "/tmp/../usr"], ("/usr", "/usr")),
    "--adapter-spool-dir": (["/usr"], "/usr"),
    "--adapter-spool-gb": (["2"], 2.0),
    "--adapter-cache-dir": (["/usr"], "/usr"),
    "--adapter-cache-gb": (["3"], 3.0),
    "--adapter-trust-pickle": ([], True),
    "--tenants": ([TENANTS], TENANTS),
    "--load-balance-method": (["total_tokens"], "total_tokens"),
    "--adapter-kernels": (["torch"], "torch"),
    "--adapter-overlap": (["stream"], "stream"),
    "--schedule-policy": (["fcfs", "lpm"], "lpm"),
    "--adapter-max-wait-steps": (["2"], 2),
    "--adapter-round-chunks": (["2"], 2),
    "--adapter-weight": (["a=2", "b=0.5"], {"a": 2.0, "b": 0.5}),
    "--adapter-decision-log": (["log"], "log"),
    "--accept-unknown-sglang": ([], True),
}


def test_every_flag_sets_its_field() -> None:
    """... and none is forgotten here: a value for each, all of them at once."""
    assert [option.flag for option in flags.options(Settings)] == [*GIVEN], "a new flag needs a value above"
    argv = [text for flag, (values, _) in GIVEN.items() for text in ([flag] if not values else [])]
    argv += [f"{flag}={value}" for flag, (values, _) in GIVEN.items() for value in values]
    settings, rest = launch_server.parse(argv)
    for option in flags.options(Settings):
        assert getattr(settings, option.name) == GIVEN[option.flag][1], option.flag
        assert getattr(settings, option.name) != option.default, "a value that differs from the default"
    assert not set(GIVEN) - {"--schedule-policy", "--load-balance-method"} & set(rest)


def test_flags_are_told_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    launch_server.parse(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for option in flags.options(Settings):
        assert f"{option.flag} " in told
        assert f"(default: {option.told})" in told


def test_the_documented_flags_are_those_there_are() -> None:
    """``python -m sglang_blocklora.configuration > docs/configuration.md`` after a change."""
    assert (REPOSITORY / "docs/configuration.md").read_text() == configuration.page()
    assert all(f"| `{option.flag}" in configuration.page() for option in flags.options(Settings))


@pytest.mark.parametrize(
    ("model", "adapter"),
    [("base", None), ("default", None), ("a", "a"), ("base:a", "a"), ("default:a", "a"), ("x:y", "x:y")],
)
def test_model_names(model: str, adapter: str | None) -> None:
    assert model_names.resolve_model(model, "base", "default", ["a", "x:y"]) == adapter


@pytest.mark.parametrize("model", ["", "b", "base:b", "other:a", "a:base", "base:"])
def test_unknown_model_names_list_the_known_ones(model: str) -> None:
    with pytest.raises(model_names.UnknownModel, match=r"Base model: base\. Adapters: a, x:y\."):
        model_names.resolve_model(model, "base", "default", ["x:y", "a"])


@pytest.mark.parametrize(("tp", "cores", "expected"), [(1, 4, "0,1,2,3"), (2, 4, "0,1|2,3"), (3, 2, "0|1|0")])
def test_cores_are_dealt_out_among_ranks(monkeypatch: pytest.MonkeyPatch, tp: int, cores: int, expected: str) -> None:
    monkeypatch.setattr(cpu_only, "is_cpu_only", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    for name in ("SGLANG_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    added = cpu_only.prepare(tp)
    assert added["--device"] == ["cpu"]
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == expected
    assert os.environ["OMP_NUM_THREADS"] == str(max(1, cores // tp))


def test_nothing_is_prepared_where_there_is_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_only, "is_cpu_only", lambda: False)
    monkeypatch.setattr(cpu_only, "install_shims", lambda: pytest.fail("a shim on a machine with an accelerator"))
    before = dict(os.environ)
    assert cpu_only.prepare(2) == {}
    assert dict(os.environ) == before


ALLOWED = {
    "kernels": {"blocklora_kernels"},
    "python": {"blocklora_kernels", "sglang_blocklora"},
    "patches": {"blocklora_kernels", "sglang_blocklora", "blocklora_patches", "sglang"},
}
# These reach SGLang, through patches/ only.
DOORS = {f"python/sglang_blocklora/{name}.py" for name in ("launch_server", "frontend", "doctor/upstream")}


@pytest.mark.parametrize("root", ALLOWED)
def test_imports_go_one_way(root: str) -> None:
    ours = {"blocklora_kernels", "sglang_blocklora", "blocklora_patches", "sglang"}
    for path in (REPOSITORY / root).rglob("*.py"):
        name = path.relative_to(REPOSITORY).as_posix()
        allowed = ALLOWED[root] | ({"blocklora_patches"} if name in DOORS else set())
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                package = module.split(".")[0]
                assert package not in ours - allowed, f"{name} imports {module}"


def test_the_mechanism_imports_without_sglang() -> None:
    code = (
        "import sys; sys.modules['sglang'] = None\n"
        "import sglang_blocklora.adapters.loading, sglang_blocklora.memory.static_pool\n"
        "import sglang_blocklora.batch.torch_adder\n"
        "import sglang_blocklora.launch_server, sglang_blocklora.route, blocklora_kernels.reference"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ranks_of_all_replicas_share_the_cores() -> None:
    assert launch_server.rank_count([]) == 1
    assert launch_server.rank_count(["--tp", "2", "--dp-size=3"]) == 6
    assert launch_server.rank_count(["--data-parallel-size", "2"]) == 2
