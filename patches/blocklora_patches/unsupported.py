"""Modes of SGLang that adapters cannot be served with yet: one table, one message at start-up."""

from __future__ import annotations

from sglang.srt.runtime_context import get_lora, get_parallel, get_spec


def refuse_unsupported() -> None:
    """``ValueError`` naming every flag that is on and not supported, and the way out."""
    table = (
        ("--pp-size", get_parallel().pp_size > 1, "a TP rank would hold only some layers of an adapter"),
        ("--enable-dp-attention", get_parallel().enable_dp_attention, "tokens of one batch differ between ranks"),
        ("--enable-lora-overlap-loading", bool(get_lora().enable_lora_overlap_loading), "it drives SGLang's slot pool"),
        (
            "--speculative-algorithm",
            get_spec().speculative_algorithm is not None,
            "verification batches are not grouped by adapter yet",
        ),
    )
    wrong = [f"{flag} ({why})" for flag, on, why in table if on]
    if wrong:
        raise ValueError(
            "sglang-blocklora does not support " + ", ".join(wrong) + ". Drop these flags, or start stock SGLang "
            "(python -m sglang.launch_server)."
        )
