"""Measures a scrape of ``/metrics`` with many adapters, and what scraping costs a request that decodes meanwhile.

``python -m blocklora_testing.scrape --adapters 1000``: rounds with and without a scraper, in turns (A B B A).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from blocklora_testing.models import AdapterChoice, build_adapters, build_model
from blocklora_testing.server import Server, running

TOKENS = 200
PERIOD_SECONDS = 0.2  # of llm-d's endpoint picker it is 0.05, of Prometheus some seconds


def scrape_seconds(server: Server) -> float:
    """One scrape, from request to the last byte."""
    started = time.perf_counter()
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        answer.read()
    return time.perf_counter() - started


def token_ms(server: Server) -> float:
    """Median time between tokens of one stream."""
    body = {"input_ids": [5, 6, 7], "stream": True, "sampling_params": {"max_new_tokens": TOKENS, "ignore_eos": True}}
    request = urllib.request.Request(
        f"{server.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        times = [time.perf_counter() for line in answer if line.startswith(b"data: {")]
    return 1000 * statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


def while_scraping(server: Server, found: list[float]) -> float:
    """``token_ms`` while another thread scrapes."""
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(PERIOD_SECONDS):
            found.append(scrape_seconds(server))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        return token_ms(server)
    finally:
        stop.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = build_model(folder / "model", "llama", kv_heads=2)
        paths = build_adapters(model, folder / "adapters", {"one": AdapterChoice(rank=4, targets=("q_proj",))})
        flags = ["--enable-metrics", "--lora-paths"]
        flags += [f"adapter-{number:04}={paths['one']}" for number in range(arguments.adapters)]
        with running(model, *flags, log=folder / "log") as server:
            idle = sorted(scrape_seconds(server) for _ in range(50))
            busy: list[float] = []
            token_ms(server)
            alone, beside = [], []
            for number in range(arguments.rounds):
                order = [0, 1] if number % 2 == 0 else [1, 0]
                for scraping in order:
                    (beside if scraping else alone).append(
                        while_scraping(server, busy) if scraping else token_ms(server)
                    )
            _, page = server.call("/metrics")
    busy.sort()
    print(f"{arguments.adapters} adapters, {len(page) / 1024:.0f} KiB a scrape")
    for name, times in (("idle", idle), ("decoding", busy)):
        middle, late = times[len(times) // 2], times[int(len(times) * 0.99)]
        print(f"scrape, {name}: median {1000 * middle:.1f} ms, p99 {1000 * late:.1f} ms, {len(times)} scrapes")
    print(f"time between tokens: {statistics.median(alone):.2f} ms alone, {statistics.median(beside):.2f} ms scraped")


if __name__ == "__main__":
    main()
