"""SGLang's HTTP process with our hooks of it, over a tiny model, for each file that asks for it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocklora_testing.adapter_world import Schedulers, World
from blocklora_testing.http_process import HTTPProcess, hooked
from sglang_blocklora.settings import Settings


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer and 256 tokens."""
    from blocklora_testing.models import build_model

    return build_model(tmp_path_factory.mktemp("tiny") / "model", "llama", layers=1)


@contextlib.contextmanager
def our_process(model: Path, name: str) -> Iterator[HTTPProcess]:
    """SGLang's process with all that is ours of it."""
    from blocklora_patches.http import facts, model_names, routes, tenants, versions
    from blocklora_patches.http.tokenizer_manager import AdapterTokenizerManager

    flags = ["--served-model-name", name, "--enable-lora", "--max-lora-rank", "64", "--lora-target-modules", "all"]
    with hooked([*facts.HOOKS, *model_names.HOOKS, *tenants.HOOKS, *versions.HOOKS]):
        process = HTTPProcess(model, *flags, manager_class=AdapterTokenizerManager)
        theirs = list(process.app.router.routes)  # the application is the same for all processes
        routes.add_to(process.app, process.manager)
        yield process
        process.app.router.routes[:] = theirs
        process.close()


@pytest.fixture(scope="module")
def served(tiny_llama: Path) -> Iterator[HTTPProcess]:
    """It serves ``llama`` with one adapter, ``sql``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from sglang.srt.lora.lora_registry import LoRARef

        with our_process(tiny_llama, "llama") as process:
            ref = LoRARef(lora_name="sql", lora_path="/sql")
            process.run(process.manager.lora_registry.register(ref))
            process.manager.lora_ref_cache["sql"] = ref
            yield process


@pytest.fixture
def process(served: HTTPProcess) -> Iterator[HTTPProcess]:
    """``served``, of which a test leaves no request behind."""
    yield served
    served.scheduler.received.clear()
    served.scheduler.holds = False
    assert served.manager.rid_to_state == {}


@pytest.fixture(scope="module")
def hooked_process(tiny_llama: Path) -> Iterator[HTTPProcess]:
    """It serves ``tiny`` with all hooks and routes of the HTTP process, and no adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        with our_process(tiny_llama, "tiny") as process:
            yield process


@pytest.fixture
def world(hooked_process: HTTPProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """``hooked_process`` as new, over made-up schedulers; a test leaves no request behind."""
    process = hooked_process
    world = World(process, tmp_path_factory.mktemp("disk"))
    process.manager.init_lora()
    process.manager.is_pause = False
    process.manager.rid_to_state.clear()
    world.scheduler = process.scheduler = Schedulers(process.manager)
    process.manager._dispatch_to_scheduler = world.scheduler.dispatch
    process.manager._async_dispatch_to_scheduler = world.scheduler.dispatch_later
    process.manager.blocklora_updates._send = world.scheduler.dispatch
    process.manager.set_internal_state_communicator._send = world.scheduler.dispatch
    with Settings().exported():
        yield world
    assert world.scheduler.wrong == []
    assert process.manager.rid_to_state == {}


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Iterator[Path]:
    """``--adapter-dir`` of ``world``, with the adapters a and b."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with Settings(adapter_dirs=(str(tmp_path),)).exported():
        yield tmp_path
