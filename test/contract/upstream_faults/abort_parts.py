"""A request of several parts cannot be aborted by the id that its client gave: its parts have others."""

from __future__ import annotations


def fault() -> str | None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    request = GenerateReqInput(text=["x", "y"], rid="mine", sampling_params={"n": 2})
    request.normalize_batch_and_arguments()
    # POST /abort_request {"rid": "mine"} looks for exactly this id (TokenizerManager.abort_request).
    return f"'mine' runs as {request.rid}" if "mine" not in request.rid else None


if __name__ == "__main__":
    print(fault() or "mended")
