"""A stand-in for a server, which keeps what it is asked."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ADAPTERS = ("a", "b", "c")


class Endpoint:
    """A server that keeps the requests it gets and answers with ``<adapter>``, or base.

    facts  what ``GET /adapters/NAME`` tells of an adapter, 404 where there is nothing
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.looked_up = 0
        self.adapter_names = list(ADAPTERS)
        self.facts: dict[str, dict[str, Any]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    outer.looked_up += 1
                    cards = [
                        {"id": "base", "parent": None},
                        *({"id": name, "parent": "base"} for name in outer.adapter_names),
                    ]
                    self.reply({"object": "list", "data": [card | {"object": "model"} for card in cards]})
                elif self.path.startswith("/adapters/"):
                    outer.looked_up += 1
                    name = self.path.removeprefix("/adapters/")
                    self.reply(outer.facts.get(name, {}), status=200 if name in outer.facts else 404)
                else:
                    self.reply({"model_path": "base"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body | {"path": self.path})
                asked = body.get("lora_path") or body.get("model")
                if asked not in (None, "base", *outer.adapter_names):
                    self.reply({"error": {"message": "no such adapter"}}, status=404)
                    return
                if self.path != "/generate":
                    answer: Any = self.completion(body)
                elif isinstance(body.get("text"), list):
                    answer = [self.choice(text, body.get("lora_path")) for text in body["text"]]
                else:
                    n = body["sampling_params"].get("n", 1)
                    one = {"text": f"<{body.get('lora_path') or 'base'}>", "meta_info": {"prompt_tokens": 3}}
                    answer = [one] * n if n > 1 else one  # as SGLang answers
                self.reply(answer, stream=body.get("stream", False))

            def choice(self, text: str, adapter: str | None) -> dict:
                """The choice that names the request's adapter is the likeliest."""
                logprob = -1.0 if text.endswith(adapter or "base") else -5.0
                return {"meta_info": {"input_token_logprobs": [[logprob, 1, "?"]] * 2, "output_token_logprobs": []}}

            def completion(self, body: dict) -> dict:
                text = f"<{body['model']}>"
                part = {"index": 0, "finish_reason": "stop"}
                part |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
                if body.get("stream"):
                    part["delta"] = {"content": text}
                usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
                return {"id": "1", "object": "x", "created": 1, "model": "m", "choices": [part], "usage": usage}

            def reply(self, answer: Any, stream: bool = False, status: int = 200) -> None:
                data = json.dumps(answer)
                payload = f"data: {data}\n\ndata: [DONE]\n\n" if stream else data
                self.send_response(status)
                self.send_header("Content-Type", "text/event-stream" if stream else "application/json")
                self.end_headers()
                self.wfile.write(payload.encode())

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def adapters(self) -> list[str | None]:
        return [request.get("lora_path") for request in self.requests]
