"""An empty prompt in a batch is answered, from what the last step left: python empty_prompt.py http://localhost:30000"""

from live import Call, main


def fault(call: Call, adapter: str) -> str | None:
    alone, _ = call("/generate", {"input_ids": [], "sampling_params": {"max_new_tokens": 1}})
    batch, _ = call("/generate", {"input_ids": [[5], []], "sampling_params": {"max_new_tokens": 1}})
    return f"alone it is a {alone}, in a batch a {batch}; expected 400" if batch == 200 else None


if __name__ == "__main__":
    main(fault)
