"""An adapter cannot be unloaded once a request with it had n > 1: the unload waits for ever.

python unload_after_several.py http://localhost:30000 ADAPTER   (a server with --enable-lora)
"""

from live import Call, main


def fault(call: Call, adapter: str) -> str | None:
    call("/load_lora_adapter", {"lora_name": "several", "lora_path": adapter})
    call("/generate", {"text": "x", "lora_path": "several", "sampling_params": {"n": 2, "max_new_tokens": 1}})
    status, _ = call("/unload_lora_adapter", {"lora_name": "several"}, seconds=10)
    return "the unload has no answer after 10 s" if status == 0 else None


if __name__ == "__main__":
    main(fault)
