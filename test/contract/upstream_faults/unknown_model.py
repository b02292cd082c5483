"""A model that nobody knows is answered by the base model: python unknown_model.py http://localhost:30000"""

from live import Call, main

ASKED = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
}


def fault(call: Call, adapter: str) -> str | None:
    answered = [path for path, body in ASKED.items() if call(path, body | {"model": "nobody"})[0] == 200]
    return f"model 'nobody' is answered on {', '.join(answered)}; expected 404" if answered else None


if __name__ == "__main__":
    main(fault)
