"""Fixtures: tiny models with PEFT adapters and the tokens PEFT expects, made once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from blocklora_testing.case import ADMIN_KEY, NAMES, NEW_TOKENS, Case
from blocklora_testing.server import Server, running
from sglang_blocklora import cpu_only

cpu_only.install_shims()  # before anything imports transformers or SGLang


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers (``-n 2``) the files that start servers go first, so that none is left alone at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.parent.name != "e2e")


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Case]:
    """``case(family, kv_heads)``: base, plain and n in 1, 2, 3, 4, 8 on a tiny model of that family."""
    made: dict[tuple[str, int], Case] = {}

    def make(family: str, kv_heads: int = 2) -> Case:
        if (family, kv_heads) not in made:
            made[family, kv_heads] = _make(tmp_path_factory.mktemp(family), family, kv_heads)
        return made[family, kv_heads]

    return make


def _make(folder: Path, family: str, kv_heads: int) -> Case:
    from blocklora_testing.architectures.tiny import modules_of
    from blocklora_testing.models import VOCAB, AdapterChoice, build_adapters, build_model, peft_tokens

    model = build_model(folder / "model", family, kv_heads=kv_heads)
    targets = modules_of(model)
    choices = {
        "plain": AdapterChoice(targets=targets),
        "n1": AdapterChoice(1, rank=4, targets=targets),
        "n2": AdapterChoice(2, rank=6, targets=targets),
        "n3": AdapterChoice(3, rank=12, use_rslora=True, targets=targets),
        "n4": AdapterChoice(4, rank=8, targets=targets),
        "n8": AdapterChoice(8, rank=16, targets=targets),
    }
    if family != "phi3":  # q and v alone do not exist there: q, k and v are one module
        some = {"v_proj", targets[0], "o_proj"} & {*targets}
        choices["partial"] = AdapterChoice(2, rank=4, targets=tuple(sorted(some)))
        choices["mixed"] = AdapterChoice(2, rank=8, rank_pattern={targets[0]: 4, targets[-1]: 10}, targets=targets)
    adapters = build_adapters(model, folder / "adapters", choices)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (5, 23)]
    return Case(model, adapters, prompts, peft_tokens(model, adapters, prompts, NEW_TOKENS))


@pytest.fixture(scope="session")
def api_case(case: Callable[[str, int], Case]) -> Case:
    """What ``api_server`` serves."""
    return case("llama", 2)


@pytest.fixture(scope="session")
def api_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``--adapter-dir`` of ``api_server``, empty."""
    return tmp_path_factory.mktemp("adapter-dir").resolve()


@pytest.fixture(scope="session")
def api_server(api_case: Case, api_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server at TP 2 that tests of the HTTP API and of the frontend language share; each leaves it as it was."""
    log = tmp_path_factory.mktemp("api-server") / "log"
    flags = ["--tp", "2", "--max-loras-per-batch", "4", "--max-running-requests", "4"]
    flags += ["--served-model-name", "llama", "--enable-metrics", "--admin-api-key", ADMIN_KEY]
    flags += ["--adapter-dir", str(api_folder)]
    flags += ["--max-total-tokens", "3072"]  # too few for all adapters of the tests
    flags += ["--lora-paths", *(f"{name}={api_case.adapters[source]}" for name, source in NAMES.items())]
    with running(api_case.model, *flags, log=log) as server:
        yield server
