"""The benchmarks' client: a scripted server stands in, so that what it must have sent and measured is known."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from benchmark.serving.client import SGLANG, Answer, play, summary
from benchmark.serving.workload import Session, Turn

BROKEN = 99  # a prompt that begins with it is refused


class Scripted(BaseHTTPRequestHandler):
    """Answers with the prompt's length, then that plus one and so on, all but the first token in one chunk."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        length = len(body["input_ids"])
        if body["input_ids"][0] == BROKEN:
            self.send_error(400)
            return
        self.send_response(200)
        self.end_headers()
        tokens = [length + i for i in range(body["sampling_params"]["max_new_tokens"])]
        meta = {"prompt_tokens": length, "cached_tokens": length // 2}
        for seen in (1, len(tokens)):
            chunk = json.dumps({"output_ids": tokens[:seen], "meta_info": meta})
            self.wfile.write(f"data: {chunk}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        server.bodies = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def turn(tokens: list[int], new_tokens: int) -> Turn:
    return Turn(np.array(tokens), new_tokens, 0.0)


def test_a_turn_carries_the_conversation_before_it(server):
    sessions = [
        Session(0.0, 1, (turn([1, 2, 3], 4), turn([7], 2))),
        Session(0.0, 0, (turn([BROKEN], 2), turn([8], 2))),
    ]
    answers, wall_s = play(f"http://127.0.0.1:{server.server_port}", sessions, [None, "sql"], "test")
    sent = {len(body["input_ids"]): (body["input_ids"], body["lora_path"]) for body in server.bodies}
    assert sent == {
        3: ([1, 2, 3], "sql"),
        8: ([1, 2, 3, 3, 4, 5, 6, 7], "sql"),
        1: ([BROKEN], None),
    }
    assert [answer.tokens for answer in answers] == [[3, 4, 5, 6], [8, 9], [], []]
    assert [answer.error is None for answer in answers] == [True, True, False, False]
    assert [len(answer.itl_s) for answer in answers] == [3, 1, 0, 0]
    figures = summary(answers, wall_s, slo_ttft_s=60)
    assert figures["failed_requests"] == 2
    assert figures["slo_attainment"] == 0.5
    assert figures["kv_hit_rate"] == (1 + 4) / (3 + 8)


def test_figures_of_known_answers():
    quick = Answer(0, 3, ttft_s=0.1, last_s=0.5, tokens=[1, 2, 3], itl_s=[0.1, 0.3], prompt_tokens=10, cached_tokens=0)
    slow = Answer(1, 2, ttft_s=0.3, last_s=0.7, tokens=[1, 2], itl_s=[0.4], prompt_tokens=30, cached_tokens=30)
    figures = summary([quick, slow], wall_s=2.0, slo_ttft_s=0.2)
    assert figures["ttft_ms_p50"] == pytest.approx(200)
    assert figures["tpot_ms_p50"] == pytest.approx(300)
    assert figures["itl_ms_p50"] == pytest.approx(300)
    assert figures["worst_adapter_ttft_ms_p99"] == pytest.approx(300)
    assert figures["output_tokens_per_s"] == 2.5
    assert figures["slo_attainment"] == 0.5
    assert figures["kv_hit_rate"] == 0.75


def test_a_chunk_of_several_tokens_shares_its_gap():
    answer = Answer(0, 4)
    for at_s, count in ((0.2, 1), (0.8, 4)):
        meta = {"prompt_tokens": 1, "cached_tokens": 0}
        SGLANG.receive(answer, at_s, {"output_ids": list(range(count)), "meta_info": meta})
    assert answer.ttft_s == 0.2
    assert answer.itl_s == pytest.approx([0.2, 0.2, 0.2])
    assert answer.tpot_s == pytest.approx(0.2)


def test_when_everything_failed_the_first_reason_is_told():
    with pytest.raises(RuntimeError, match="404 no such adapter"):
        summary([Answer(0, 1, error="404 no such adapter")], 1.0, 1.0)
