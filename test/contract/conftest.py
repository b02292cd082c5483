"""SGLang's HTTP process with our hooks of it, over a tiny model, for each file that asks for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocklora_testing.http_process import HTTPProcess, hooked


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer and 256 tokens."""
    from blocklora_testing.models import build_model

    return build_model(tmp_path_factory.mktemp("tiny") / "model", "llama", layers=1)


@pytest.fixture(scope="module")
def served(tiny_llama: Path) -> Iterator[HTTPProcess]:
    """It serves ``llama`` with one adapter, ``sql``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from blocklora_patches.http import aborts, door, messages, model_names, ollama, registry, responses
        from sglang.srt.lora.lora_registry import LoRARef

        modules = (aborts, door, messages, model_names, ollama, registry, responses)
        with hooked([hook for module in modules for hook in module.HOOKS]):
            process = HTTPProcess(tiny_llama, "--served-model-name", "llama", "--enable-lora", "--max-lora-rank", "64")
            ref = LoRARef(lora_name="sql", lora_path="/sql")
            process.run(process.manager.lora_registry.register(ref))
            process.manager.lora_ref_cache["sql"] = ref
            yield process
            process.close()


@pytest.fixture
def process(served: HTTPProcess) -> Iterator[HTTPProcess]:
    """``served``, of which a test leaves no request behind."""
    yield served
    served.scheduler.received.clear()
    served.scheduler.holds = False
    assert served.manager.rid_to_state == {}
