"""An adapter that was unloaded is loaded again by a request: python unload_undone.py http://localhost:30000 ADAPTER"""

from live import Call, main


def fault(call: Call, adapter: str) -> str | None:
    call("/load_lora_adapter", {"lora_name": "gone", "lora_path": adapter})
    call("/unload_lora_adapter", {"lora_name": "gone"})
    status, _ = call("/generate", {"text": "x", "lora_path": "gone", "sampling_params": {"max_new_tokens": 1}})
    return "an adapter that was unloaded answers; expected 400" if status == 200 else None


if __name__ == "__main__":
    main(fault)
