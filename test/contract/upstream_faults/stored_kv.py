"""KV that a storage backend keeps is named by an adapter's name and path: other bytes there find it after a restart."""

from __future__ import annotations

import tempfile
from array import array
from pathlib import Path


def fault() -> str | None:
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    names = []
    with tempfile.TemporaryDirectory() as folder:
        for weights in (b"old", b"new"):
            (Path(folder) / "adapter_model.safetensors").write_bytes(weights)
            adapter = LoRARef.deterministic_id("sql", folder)  # as --lora-paths sql=FOLDER has it
            names += get_storage_hash_str(RadixKey(array("q", range(16)), adapter), page_size=16)
    return f"both pages are {names[0]}" if names[0] == names[1] else None


if __name__ == "__main__":
    print(fault() or "mended")
