"""A streaming session's turn goes on from the session's KV, whichever adapter computed it and the turn names."""

from __future__ import annotations

from types import SimpleNamespace


def fault() -> str | None:
    from sglang.srt.session.streaming_session import StreamingSession

    sessions = StreamingSession(SimpleNamespace(page_size=1))
    kept = SimpleNamespace(kv=SimpleNamespace(holds_kv=True), extra_key="sql", lora_id="sql")
    sessions.slots["s"] = kept
    of = SimpleNamespace(streaming=True, session_id="s")
    turn = SimpleNamespace(session=of, to_finish=None, extra_key=None, lora_id=None)
    return "a turn of the base model gets the KV of an adapter" if sessions.find_active_slot(turn) is kept else None


if __name__ == "__main__":
    print(fault() or "mended")
