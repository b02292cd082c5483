"""A session's turn with replace and without rid raises in the scheduler, which ends with it."""

from __future__ import annotations

from types import SimpleNamespace


def fault() -> str | None:
    from sglang.srt.managers.io_struct import SessionParams
    from sglang.srt.session.session_controller import Session, SessionReqNode

    session = Session(capacity_of_str_len=100)
    for rid in ("a", "b"):
        session.req_nodes[rid] = SessionReqNode(SimpleNamespace(rid=rid, finished_reason="stop"), None)
    turn = SimpleNamespace(session_params=SessionParams(id="s", replace=True))
    try:
        session.create_req(turn, tokenizer=None, vocab_size=100)
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    except Exception:  # the turns are gone; a whole request would be needed to go on
        return None
    return None


if __name__ == "__main__":
    print(fault() or "mended")
