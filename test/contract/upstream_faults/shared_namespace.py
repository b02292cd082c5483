"""A client's extra_key and an adapter's id are joined without a mark between them: KV is shared across adapters."""

from __future__ import annotations

from array import array


def fault() -> str | None:
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    def key(extra_key: str | None, lora_id: str | None) -> str | None:
        return Req("r", "", array("q", [1]), SamplingParams(), extra_key=extra_key, lora_id=lora_id).extra_key

    known = LoRARef.deterministic_id("sql", "/adapters/sql")  # GET /v1/models lists name and path
    if key(known, None) == key(None, known):
        return "a client without an adapter can name an adapter's namespace of the radix cache: its extra_key"
    if key("a", "bc") == key("ab", "c"):
        return "two pairs of extra_key and adapter have one namespace of the radix cache"
    return None


if __name__ == "__main__":
    print(fault() or "mended")
