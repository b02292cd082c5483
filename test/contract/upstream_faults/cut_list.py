"""A list of adapters that is longer than that of the prompts is cut in silence.

python cut_list.py http://localhost:30000 ADAPTER   (a server with --enable-lora)
"""

from live import Call, main


def fault(call: Call, adapter: str) -> str | None:
    call("/load_lora_adapter", {"lora_name": "cut", "lora_path": adapter})
    body = {"text": ["x", "y"], "lora_path": [None, "cut", "cut"], "sampling_params": {"max_new_tokens": 1}}
    return "three adapters for two prompts are taken; expected 400" if call("/generate", body)[0] == 200 else None


if __name__ == "__main__":
    main(fault)
