"""An engine and a runtime of the user's own process at TP 2, in a script as a user writes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from blocklora_testing.case import NEW_TOKENS, Case
from blocklora_testing.models import build_model, peft_tokens
from blocklora_testing.server import free_port

EXAMPLES = Path(__file__).parents[2] / "examples/frontend"
SCRIPT = """
import json, sys

import in_process_engine
import requests
from sglang_blocklora import frontend as sgl

NAMES = ["n2", "plain", None]


@sgl.function
def program(s):
    s += "hello"
    branches = s.fork(3)
    for branch, adapter in zip(branches, NAMES):
        branch += sgl.gen("x", adapter=adapter)
    branches.join()
    s += sgl.gen("several", n=2, adapter="n2")


@sgl.function
def select(s):
    s += "pick: " + sgl.select("x", choices=["alpha", "omega"], adapter="n2")


@sgl.function
def default(s):
    s += "hello" + sgl.gen("x")


@sgl.function
def unknown(s):
    s += "x" + sgl.gen("x", adapter="nobody")


def main():
    task = json.loads(sys.argv[1])
    found = {}
    use_engine(task, found)
    use_runtime(task, found)
    print("FOUND" + json.dumps(found))


def use_engine(task, found):
    greedy = {"temperature": 0, "max_new_tokens": 8}
    engine = sgl.engine(**task["options"])
    try:
        def tokens(adapter):
            sampling = {"temperature": 0, "max_new_tokens": task["new_tokens"], "ignore_eos": True}
            return engine.generate(input_ids=task["prompt"], sampling_params=sampling, adapter=adapter)["output_ids"]

        found["tokens"] = [tokens(adapter) for adapter in NAMES]
        found["direct"] = [engine.generate("hello", greedy, lora_path=adapter)["text"] for adapter in NAMES]
        try:
            engine.generate("hello", greedy, adapter="nobody")
        except ValueError as error:
            found["error"] = str(error)
        with in_process_engine.endpoint(engine) as backend:
            state = program.run(backend=backend, **greedy)
            found["program"], found["several"] = state["x"], state["several"]
            found["select"] = select.run(backend=backend)["x"]
            streamed = default.run(backend=backend, adapter="n2", stream=True, **greedy)
            found["stream"] = "".join(streamed.text_iter())
            try:
                unknown.run(backend=backend)
            except sgl.UnknownAdapter as error:
                found["unknown"] = str(error)
        found["after"] = tokens("n2")
        found["from tensors"] = from_tensors(engine, task["folders"], tokens)
        found["base"] = [base_from_tensors(engine, folder, task) for folder in (task["other"], task["model"])]
    finally:
        engine.shutdown()


def from_tensors(engine, folders, tokens):
    # Every way in which SGLang's own tests load tensors, and an update.
    import safetensors.torch
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    def contents(name):
        tensors = safetensors.torch.load_file(folders[name] + "/adapter_model.safetensors")
        with open(folders[name] + "/adapter_config.json") as file:
            return tensors, json.load(file)

    found = []
    load = engine.load_lora_adapter_from_tensors

    def note(result, name="tensors"):
        found.append([result.success, result.error_message, result.success and tokens(name)])

    note(load("tensors", *contents("n3")))
    note(load("tensors", *contents("n4")))
    note(load("tensors", *contents("n4"), load_inplace=True))
    note(load("bad", {"x": contents("n4")[0].popitem()[1]}, contents("n4")[1]), "bad")
    note(Engine.load_lora_adapter_from_tensors(engine, "theirs", *contents("n8")), "theirs")
    tensors, config = contents("n1")
    bucket = FlattenedTensorBucket(named_tensors=list(tensors.items()))
    flat = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}

    def packed():  # what is sent can be opened once
        return [MultiprocessingSerializer.serialize(flat, output_str=True) for _ in range(2)]

    note(load("bucket", packed(), config, load_format="flattened_bucket"), "bucket")
    theirs = Engine.load_lora_adapter_from_tensors(engine, "bucket2", packed(), config, load_format="flattened_bucket")
    note(theirs, "bucket2")
    note(engine.load_lora_adapter("tensors", folders["n3"], load_inplace=True))
    for name in ("tensors", "theirs", "bucket", "bucket2"):
        assert engine.unload_lora_adapter(name).success
    return found


def base_from_tensors(engine, folder, task):
    # Another base model under the adapters that are there; tokens cached before, and the versions that answered.
    import safetensors.torch

    greedy = {"temperature": 0, "max_new_tokens": task["new_tokens"], "ignore_eos": True}
    prompts = [task["prompt"]] * len(NAMES)

    def generate():
        return engine.generate(input_ids=prompts, sampling_params=greedy, lora_path=NAMES)

    def versions(answers):
        return [answer["meta_info"].get("adapter_version") for answer in answers]

    before = [generate(), generate()][1]
    session = hasattr(engine, "begin_weight_update")  # asked for since 0.5.22
    if session:
        engine.begin_weight_update()
    tensors = safetensors.torch.load_file(folder + "/model.safetensors")
    success, message = engine.update_weights_from_tensor(list(tensors.items()))
    if session:
        engine.end_weight_update()
    after = generate()
    return {
        "done": [success, message],
        "cached": [[answer["meta_info"]["cached_tokens"] for answer in answers] for answers in (before, after)],
        "versions": [versions(before), versions(after)],
        "tokens": [answer["output_ids"] for answer in after],
    }


def use_runtime(task, found):
    greedy = {"temperature": 0, "max_new_tokens": 8}
    runtime = sgl.runtime(**task["options"])
    try:
        found["runtime"] = program.run(backend=runtime, **greedy)["x"]
        found["runtime default"] = default.run_batch([{}, {}], backend=runtime, adapter="plain", **greedy)[1]["x"]
        streamed = default.run(backend=runtime, adapter="n2", stream=True, **greedy)
        found["runtime stream"] = "".join(streamed.text_iter())
        found["runtime adapters"] = requests.get(runtime.url + "/adapters").json()["total"]
        try:
            unknown.run(backend=runtime)
        except sgl.UnknownAdapter as error:
            found["runtime unknown"] = str(error)
    finally:
        runtime.shutdown()


if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def llama(case) -> Case:
    return case("llama", 2)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another base model of the same shape."""
    return build_model(tmp_path_factory.mktemp("other") / "model", "llama", kv_heads=2, seed=9)


@pytest.fixture(scope="module")
def found(llama: Case, other: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the script found."""
    script = tmp_path_factory.mktemp("engine") / "program.py"
    script.write_text(SCRIPT)
    options = {
        "model_path": str(llama.model),
        "tp": 2,
        "dtype": "float32",
        "max_total_tokens": 16384,
        "nccl_port": free_port(),
        "lora_paths": [f"{name}={llama.adapters[name]}" for name in ("n2", "plain")],
    }
    folders = {name: str(folder) for name, folder in llama.adapters.items()}
    task = {"options": options, "prompt": llama.prompts[0], "new_tokens": NEW_TOKENS, "folders": folders}
    task |= {"model": str(llama.model), "other": str(other)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, json.dumps(task)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert "FOUND" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.split("FOUND")[1])


def test_generate_chooses_the_adapter_as_peft_answers(found: dict, llama: Case) -> None:
    assert found["tokens"] == [llama.expected[name][0] for name in ("n2", "plain", None)]
    assert "n2" in found["error"]


def test_programs_run_on_the_engine(found: dict) -> None:
    assert found["program"] == found["direct"]
    assert len(set(found["direct"])) == 3
    assert found["several"][0] == found["several"][1]
    assert found["select"] in ("alpha", "omega")
    assert found["stream"] == "hello" + found["direct"][0]
    assert "Loaded: n2, plain." in found["unknown"]


def test_the_engine_is_its_own_again_afterwards(found: dict, llama: Case) -> None:
    assert found["after"] == llama.expected["n2"][0]


def test_programs_run_on_a_runtime_with_our_extension(found: dict) -> None:
    assert found["runtime"] == found["direct"]
    assert found["runtime default"] == found["direct"][1]
    assert found["runtime stream"] == "hello" + found["direct"][0]
    assert found["runtime adapters"] == 2, "GET /adapters is ours alone"
    assert "Loaded: n2, plain." in found["runtime unknown"]


def test_adapters_come_as_tensors_and_are_updated(found: dict, llama: Case) -> None:
    expected = ["n3", "already loaded", "n4", "tensor 'x'", "n8", "n1", "n1", "n3"]
    for (success, message, tokens), wanted in zip(found["from tensors"], expected, strict=True):
        if wanted in llama.expected:
            assert (success, tokens) == (True, llama.expected[wanted][0]), message
        else:
            assert not success
            assert wanted in message


def test_new_base_weights_from_tensors_drop_the_kv_that_became_wrong(found: dict, llama: Case, other: Path) -> None:
    """All of it was the base model's work; adapters and their versions stay."""
    names = ["n2", "plain", None]
    adapters = {name: llama.adapters[name] for name in names if name}
    fresh = peft_tokens(other, adapters, llama.prompts[:1], NEW_TOKENS)
    assert all(fresh[name][0] != llama.expected[name][0] for name in names)
    for update, expected in zip(found["base"], (fresh, llama.expected), strict=True):
        assert update["done"][0], update["done"][1]
        before, after = update["cached"]
        assert (before, after) == ([len(llama.prompts[0]) - 1] * 3, [0] * 3)
        assert update["tokens"] == [expected[name][0] for name in names]
        versions, later = update["versions"]
        assert versions == later
        assert (len(set(versions)), versions[2]) == (3, None)
