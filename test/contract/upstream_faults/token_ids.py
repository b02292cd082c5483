"""Token ids outside the vocabulary reach the scheduler, and may end it: python token_ids.py http://localhost:30000"""

from live import Call, main

BAD = (10**6, -1, 2**40)


def fault(call: Call, adapter: str) -> str | None:
    found = []
    for token in BAD:
        status, _ = call("/generate", {"input_ids": [5, token], "sampling_params": {"max_new_tokens": 1}})
        if status != 400:
            found.append(f"{token}: {status or 'no answer'}")
    return f"expected 400 for each of these token ids: {', '.join(found)}" if found else None


if __name__ == "__main__":
    main(fault)
