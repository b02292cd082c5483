"""Where unified memory does not hold a model, static memory is chosen, and tokens are PEFT's there too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blocklora_testing.models import VOCAB, AdapterChoice, build_adapters, build_model, peft_tokens
from blocklora_testing.server import Server, ServerFailed, running

NEW_TOKENS = 12
NARROW = "a K row of 12 elements (KV heads of a TP rank times head dimension must be a multiple of 8)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A KV head on each of two TP ranks, of a width that kernels cannot read in vectors."""
    folder = tmp_path_factory.mktemp("narrow") / "model"
    return build_model(folder, "llama", head_dim=12, hidden_size=144)


def test_static_memory_is_chosen_with_one_warning(model: Path, tmp_path: Path) -> None:
    adapters = build_adapters(model, tmp_path / "adapters", {"plain": AdapterChoice(), "n2": AdapterChoice(2)})
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB, (count,), generator=generator).tolist() for count in (5, 40)]
    expected = peft_tokens(model, adapters, prompts, NEW_TOKENS)
    asked = [(i, name) for i in range(len(prompts)) for name in expected]
    paths = ["--lora-paths", *(f"{name}={path}" for name, path in adapters.items())]
    flags = ("--tp", "2", "--enable-streaming-session", *paths)
    with running(model, *flags, log=tmp_path / "log", warm=True) as server:
        for _ in range(2):
            found = server.many([(prompts[i], name) for i, name in asked], NEW_TOKENS)
            assert found == [expected[name][i] for i, name in asked]
        check_streaming_session(server, model, adapters)
        (warning,) = [line for line in server.log_text().splitlines() if "an arena of their own" in line]
        assert f"1024 MiB on each TP rank, because the KV cache's slots cannot hold them with {NARROW}" in warning


def check_streaming_session(server: Server, model: Path, adapters: dict[str, Path]) -> None:
    """Its turns go on from one KV, with one adapter; one that names another is refused, and the session lives on."""
    first, second = [3, 1, 4], [1, 5, 9, 2]
    head = peft_tokens(model, {"n2": adapters["n2"]}, [first], 4)["n2"][0]
    tail = peft_tokens(model, {"n2": adapters["n2"]}, [first + head + second], 4)["n2"][0]
    status, session = server.call("/open_session", {"capacity_of_str_len": 1000, "streaming": True})
    assert status == 200
    session = session.strip('"')

    def turn(prompt: list[int], adapter: str | None) -> tuple[int, dict]:
        sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
        body = {"input_ids": prompt, "lora_path": adapter, "sampling_params": sampling}
        return server.call("/generate", body | {"session_params": {"id": session}})

    assert turn(first, "n2")[1]["output_ids"] == head
    for other in (None, "plain"):
        status, answer = turn(second, other)
        assert (status, "the same adapter" in str(answer)) == (400, True)
    assert turn(second, "n2")[1]["output_ids"] == tail
    assert server.call("/close_session", {"session_id": session})[0] == 200


def test_unified_memory_that_was_asked_for_is_refused(model: Path, tmp_path: Path) -> None:
    flags = ("--tp", "2", "--adapter-memory", "unified")
    with pytest.raises(ServerFailed) as error, running(model, *flags, log=tmp_path / "log", warm=True):
        pass
    assert f"--adapter-memory unified does not support {NARROW}. Use --adapter-memory static." in str(error.value)
