"""``make demo``: serve one small model with four adapters at TP 2 and ask them all the same question.

The server is a real SGLang server; the questions go through the ``openai`` client, where ``model`` names the adapter.
With ``--serve`` (``make serve``) it stays up until Ctrl-C. The activated adapter (``topic``) begins where the assistant
does: it finds the question in the cache, where the base model left it. Adapters are made by ``train_adapters.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import torch
from blocklora_testing import smollm2
from blocklora_testing.server import Server, ServerFailed, running
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sglang_blocklora import cpu_only
from sglang_blocklora.tools.inspect_adapter import inspect_adapter

HERE = Path(__file__).resolve().parent
ADAPTERS = HERE / "adapters"
BASE_NAME = "smollm2"
QUESTION = "What is the capital of France?"
MAX_TOKENS = 40
PLAIN_PROGRESS_S = 10  # where there is no terminal to draw a spinner on, a line this often


@dataclass(frozen=True)
class Reply:
    """One answer; ``tokens_per_s`` counts the tokens after the first one, None where there is just one.

    cached_tokens, prompt_tokens  of the prompt: found in the cache, and all
    """

    text: str
    tokens_per_s: float | None
    cached_tokens: int
    prompt_tokens: int


def adapter_folders() -> list[Path]:
    """Return the folders of the demo's adapters, plain LoRA first, then by number of blocks."""
    found = [config.parent for config in ADAPTERS.glob("*/adapter_config.json")]
    if not found:
        raise SystemExit(f"no adapter in {ADAPTERS}: run `python {HERE / 'train_adapters.py'}`")
    return sorted(found, key=lambda folder: (inspect_adapter(folder, None, [1]).nblocks, folder.name))


def server_flags(tp: int) -> list[str]:
    """Return SGLang's flags: TP size, adapters, and limits that keep a small machine small."""
    dtype = "float32" if cpu_only.is_cpu_only() else "bfloat16"
    return [
        *("--served-model-name", BASE_NAME, "--tp", str(tp), "--dtype", dtype),
        *("--context-length", "2048", "--max-total-tokens", "8192", "--enable-cache-report"),
        *("--lora-paths", *(f"{folder.name}={folder}" for folder in adapter_folders())),
    ]


def default_tp() -> int:
    """Return 2, or 1 on a machine with a single GPU."""
    return 2 if cpu_only.is_cpu_only() else min(2, torch.accelerator.device_count())


def connect(url: str) -> openai.OpenAI:
    """Return an ``openai`` client of the server at ``url``, reached directly whatever proxy is configured."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=httpx.Client(trust_env=False, timeout=120))


def ask(client: openai.OpenAI, model: str, question: str) -> Reply:
    """Ask ``model`` (the base model's or an adapter's name) and measure how fast the answer streams in."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces: list[str] = []
    arrivals: list[float] = []
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
            arrivals.append(time.monotonic())
    if not pieces or usage is None:
        raise ServerFailed(f"Model {model!r} gave an empty answer to {question!r}.")
    seconds, later = arrivals[-1] - arrivals[0], usage.completion_tokens - 1
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    return Reply("".join(pieces), later / seconds if seconds > 0 else None, cached, usage.prompt_tokens)


def answers_table(client: openai.OpenAI, tp: int, question: str, console: Console) -> Table:
    """Ask the base model and every adapter ``question`` and return a table with one row each."""
    table = Table(title=f"{question!r} at TP {tp}", show_lines=True, title_justify="left")
    for header in ("adapter", "n", "rank", "bytes per\nTP rank", "prompt\ncached", "tokens/s"):
        table.add_column(header, justify="left" if header == "adapter" else "right")
    table.add_column("answer", min_width=24)
    folders: list[Path | None] = [None, *adapter_folders()]
    for folder in folders:
        name = folder.name if folder else BASE_NAME
        with console.status(f"asking {name}"):
            reply = ask(client, name, question)
        cells = ["-", "-", "-"]
        if folder:
            found = inspect_adapter(folder, None, [tp])
            cells = [str(found.nblocks), str(found.rank), f"{max(found.tp[0].bytes_per_rank):,}"]
        if folder and found.invocation:
            name += "\n(activated)"
        cached = f"{reply.cached_tokens} of\n{reply.prompt_tokens}"
        speed = f"{reply.tokens_per_s:.1f}" if reply.tokens_per_s else "-"
        table.add_row(name if folder else f"{name}\n(base)", *cells, cached, speed, escape(reply.text))
    return table


def print_usage(url: str, console: Console) -> None:
    """Print how to reach the running server with curl and with the ``openai`` client."""
    name = adapter_folders()[-1].name
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0})
    lines = [
        f"Models: {', '.join([BASE_NAME, *(folder.name for folder in adapter_folders())])}. Stop with Ctrl-C.",
        "",
        f"curl {url}/v1/models",
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        "",
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{url}/v1", api_key="none")',
        f'question = {{"role": "user", "content": "{QUESTION}"}}',
        f'reply = client.chat.completions.create(model="{name}", messages=[question], temperature=0)',
        "print(reply.choices[0].message.content)",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def kept_on_failure(log: Path) -> Iterator[None]:
    """Delete ``log`` at the end of the block, unless an error leaves it: then the log says why."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        log.unlink(missing_ok=True)
        raise
    log.unlink(missing_ok=True)


@contextlib.contextmanager
def served(tp: int, port: int, console: Console) -> Iterator[Server]:
    """The base model's server for the length of the block, its start and its end shown."""
    model = smollm2.build()
    log = model.parent / f"server-{os.getpid()}.log"
    console.print(f"starting the server at TP {tp}, log in {log}", highlight=False, soft_wrap=True)
    began = shown = time.monotonic()

    def show(seconds: float, server: Server) -> None:
        nonlocal shown
        line = f"starting the server, {seconds:.0f} s: {' '.join(server.last_lines()[-1:])}"
        text = escape(line[: console.width - 4])
        status.update(text)
        if not console.is_terminal and time.monotonic() - shown > PLAIN_PROGRESS_S:
            shown = time.monotonic()
            console.print(text, highlight=False)

    with kept_on_failure(log), contextlib.ExitStack() as stack:
        with console.status("starting the server") as status:
            server = stack.enter_context(running(model, *server_flags(tp), log=log, port=port, waiting=show))
        console.print(f"server ready after {time.monotonic() - began:.0f} s", highlight=False)
        try:
            yield server
        finally:
            with console.status("stopping the server"):
                stack.close()


def run(args: argparse.Namespace, console: Console) -> None:
    """Start the server, then show the table or serve until Ctrl-C; stop all that was started."""
    tp = args.tp or default_tp()
    with served(tp, args.port, console) as server:
        if args.serve:
            print_usage(server.url, console)
            while True:
                server.check_running()
                time.sleep(1)
        try:
            console.print(answers_table(connect(server.url), tp, args.question, console))
        except (openai.OpenAIError, httpx.HTTPError) as error:
            raise ServerFailed(f"A request failed: {error!r}\n{server.tail()}") from error


def stop_on_signal(number: int, _frame: object) -> None:
    """Turn SIGTERM and SIGHUP into an exception, so that what was started is stopped on the way out."""
    raise SystemExit(128 + number)


def main() -> int:
    """Run the demo; returns 0, 1 on failure, 130 on Ctrl-C (0 with ``--serve``, which ends that way)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="keep the server running until Ctrl-C")
    parser.add_argument("--port", type=int, default=0, help="port of the server (default: a free one)")
    parser.add_argument("--tp", type=int, choices=(1, 2, 4), help="tensor-parallel size (default: 2, with one GPU 1)")
    parser.add_argument("--question", default=QUESTION, help="what to ask (default: %(default)s)")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop_on_signal)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    console = Console(width=None if sys.stdout.isatty() else 120)
    started = time.monotonic()
    try:
        run(args, console)
    except KeyboardInterrupt:
        console.print("stopped")
        return 0 if args.serve else 130
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    console.print(f"everything stopped, {time.monotonic() - started:.0f} s in all", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
