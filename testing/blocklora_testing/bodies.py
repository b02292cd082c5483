"""Bodies for every route of SGLang that takes a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHAT = {"messages": [{"role": "user", "content": "a"}]}
# Routes whose body or form has a model: route -> the rest of a body.
RESOLVES: dict[str, Mapping[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": CHAT | {"max_tokens": 2},
    "/invocations": CHAT | {"max_tokens": 2},
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
    "/v1/messages": CHAT | {"max_tokens": 2},
    "/api/chat": CHAT | {"stream": False, "options": {"num_predict": 2}},
    "/api/generate": {"prompt": "a", "stream": False, "options": {"num_predict": 2}},
}
# Known names are taken and make no difference: no adapter changes the tokenizer.
SAME_FOR_ALL: dict[str, Mapping[str, Any]] = {
    "/v1/messages/count_tokens": CHAT,
    "/tokenize": {"prompt": "a"},
    "/v1/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
    "/v1/detokenize": {"tokens": [5]},
    "/api/show": {},
}
BASE_ONLY: dict[str, Mapping[str, Any]] = {
    "/v1/classify": {"input": "a"},
    "/v1/score": {"query": "a", "items": ["b"], "label_token_ids": [5]},
    "/v1/decisions": {"input": "a", "questions": [{"id": "q", "type": "yes_no", "question": "b"}]},
    "/v1/systemone": {"state": "a", "questions": {"q": {"type": "noul", "instructions": "b"}}},
    "/v1/audio/transcriptions": {},
}
# Only with --is-embedding, which this process is not: named here, its resolution is tested below.
EMBEDDING: dict[str, Mapping[str, Any]] = {"/v1/embeddings": {"input": "a"}}
