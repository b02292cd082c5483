"""Frontend programs on an engine of this process: a loopback HTTP server between ``RuntimeEndpoint`` and the engine.

SGLang's language reaches servers only. ``sgl.runtime(...)`` starts one and is a backend as it stands; this is for a
script that has an engine already, whose ``generate`` it calls too.

python examples/frontend/in_process_engine.py --model-path llama --adapters sql=/adapters/sql support=/adapters/support
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sglang_blocklora import frontend as sgl  # before anything that imports SGLang


@contextmanager
def endpoint(engine: Any) -> Iterator[Any]:
    """A backend over ``engine`` for the length of the block, which has the engine's event loop meanwhile.

    The engine's own blocking calls (``engine.generate``) work before and after, not inside.
    """
    loop = threading.Thread(target=engine.loop.run_forever)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(engine))
    threads = [loop, threading.Thread(target=server.serve_forever, args=(0.05,))]
    for thread in threads:
        thread.start()
    try:
        yield sgl.RuntimeEndpoint(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        engine.loop.call_soon_threadsafe(engine.loop.stop)
        for thread in threads:
            thread.join()


def handler_of(engine: Any) -> type[BaseHTTPRequestHandler]:
    """The requests of ``RuntimeEndpoint`` that a program makes, answered by ``engine``."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    manager = engine.tokenizer_manager

    def wait(call: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return await call()

        return asyncio.run_coroutine_threadsafe(run(), engine.loop).result()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            adapters = manager.lora_registry.get_all_adapters()
            models = {"data": [{"id": name, "parent": manager.served_model_name} for name in adapters]}
            self.reply(200, models if self.path == "/v1/models" else {"model_path": manager.model_path})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chunks = manager.generate_request(GenerateReqInput(**body), None)
            try:
                first = wait(chunks.__anext__)
            except ValueError as error:  # what a server answers with status 400 too
                self.reply(400, {"error": {"message": str(error)}})
                return
            if not body.get("stream"):
                self.reply(200, first)
                return
            self.send_response(200)
            self.end_headers()
            while first is not None:
                self.wfile.write(b"data: " + json.dumps(first).encode() + b"\n\n")
                first = wait(lambda: anext(chunks, None))
            self.wfile.write(b"data: [DONE]\n\n")

        def reply(self, status: int, content: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@sgl.function
def ask_all(s, question, adapters):
    s += "Question: " + question + "\nAnswer: "
    branches = s.fork(len(adapters))
    for branch, adapter in zip(branches, adapters, strict=True):
        branch += sgl.gen("answer", max_tokens=32, stop="\n", adapter=adapter)
    branches.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--adapters", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--question", default="How many orders were there last week?")
    options = parser.parse_args()
    names = [adapter.partition("=")[0] for adapter in options.adapters]
    engine = sgl.engine(model_path=options.model_path, tp=options.tp, lora_paths=options.adapters)
    try:
        print(engine.generate(options.question, {"max_new_tokens": 8}, adapter=names[0])["text"])
        with endpoint(engine) as backend:
            state = ask_all.run(question=options.question, adapters=names, backend=backend)
        for name, answer in zip(names, state["answer"], strict=True):
            print(f"{name}: {answer}")
    finally:
        engine.shutdown()


if __name__ == "__main__":  # SGLang's processes import this script again
    main()
