"""Adapters load under names that a request cannot reach: python hidden_names.py http://localhost:30000 ADAPTER"""

from live import Call, main


def fault(call: Call, adapter: str) -> str | None:
    base = call("/v1/models")[1]["data"][0]["id"]
    loaded = []
    for name in (base, "", "a:b"):  # the base model's; none; "model": "a:b" means adapter b of model a
        if call("/load_lora_adapter", {"lora_name": name, "lora_path": adapter})[0] == 200:
            loaded.append(repr(name))
            call("/unload_lora_adapter", {"lora_name": name}, seconds=5)
    return f"loaded as {', '.join(loaded)}, which no 'model' means; expected 400" if loaded else None


if __name__ == "__main__":
    main(fault)
