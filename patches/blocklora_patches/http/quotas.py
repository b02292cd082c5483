"""Holds requests to the limits of tenants and adapters, with ``--tenants``, and charges them (docs/tenancy.md).

``tokenizer_manager.py`` asks this: every request begins and ends there, however it came and whatever becomes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

from sglang.srt.runtime_context import get_observability
from sglang_blocklora.requests.values import BadRequest
from sglang_blocklora.tenancy.file import OPERATOR, Tenant
from sglang_blocklora.tenancy.quotas import Charge, NeverFits, QuotaExceeded

from blocklora_patches.http import answers, metrics, tenants


@contextmanager
def charged(obj: Any) -> Iterator[None]:
    """Within it a request may begin; after it none of it runs."""
    try:
        yield
    finally:
        charge = getattr(obj, "blocklora_charge", None)
        if charge is not None:
            charge.end()


def begin(obj: Any) -> None:
    """Let a normalized request begin, and mark its parts. Raises ``TooManyRequests`` and ``BadRequest``."""
    tenancy = tenants.serving()
    if tenancy is None:
        return
    each = getattr(obj, "parallel_sample_num", 1)
    parts = [obj] if obj.is_single else [obj[i] for i in range(obj.batch_size)]
    counts: Counter[str | None] = Counter()
    for part in parts:
        counts[part.lora_path or None] += each
    tenant = tenants.caller()
    try:
        charge = tenancy.quotas.begin(tenant, counts)
    except NeverFits as error:
        raise BadRequest(str(error)) from error
    except QuotaExceeded as error:
        if (usage := _usage()) is not None:
            usage.refused(_label(tenant), error.limit)
        raise answers.refused(obj.blocklora_client, TooManyRequests(error)) from error
    obj.blocklora_charge = charge
    for part in parts:
        part.blocklora_charge = charge
        part.blocklora_answers = each
        part.blocklora_charged_adapter = (
            part.lora_path or None
        )  # upstream takes it from what caches a prompt of n answers
        part.blocklora_generated = 0


class TooManyRequests(answers.Refusal):
    """Answered with a 429 and the seconds to wait, in one form on every route: OpenAI's and Anthropic's at once."""

    def __init__(self, exceeded: QuotaExceeded) -> None:
        super().__init__(429, str(exceeded), {"Retry-After": str(exceeded.retry_after_s)})

    def body(self) -> dict[str, Any]:
        error = {"message": self.detail, "type": "rate_limit_error", "param": None, "code": 429}
        return {"type": "error", "error": error}


def charge_prompt(obj: Any, prompt: Sized, max_new_tokens: int | None, context_tokens: int) -> None:
    """A prompt is about to be sent; its length is known now.

    prompt          its token ids or embeddings
    max_new_tokens  the most that each of its answers may have; None: as many as the context holds
    """
    charge: Charge | None = getattr(obj, "blocklora_charge", None)
    if charge is None:
        return
    tokens = len(prompt)
    longest = max(0, context_tokens - tokens)
    generated = longest if max_new_tokens is None else min(max_new_tokens, longest)
    charge.tokens(obj.blocklora_charged_adapter, tokens)
    charge.reserve(obj.blocklora_charged_adapter, tokens + obj.blocklora_answers * generated)
    if (usage := _usage()) is not None:
        usage.prompt(_label(charge.tenant), obj.blocklora_charged_adapter, obj.blocklora_answers, tokens)


def charge_generated(states: Mapping[str, Any], output: Any) -> None:
    """Charge the tokens that schedulers generated; they tell each request's so far.

    states  id -> state of all that is asked
    """
    if tenants.serving() is None or getattr(output, "completion_tokens", None) is None:
        return
    for rid, so_far in zip(output.rids, output.completion_tokens, strict=True):
        obj = states[rid].obj if rid in states else None
        charge: Charge | None = getattr(obj, "blocklora_charge", None)
        if obj is None or charge is None or so_far <= obj.blocklora_generated:
            continue
        new, obj.blocklora_generated = so_far - obj.blocklora_generated, so_far
        charge.tokens(obj.blocklora_charged_adapter, new)
        if (usage := _usage()) is not None:
            usage.generated(_label(charge.tenant), obj.blocklora_charged_adapter, new)


def _usage() -> Any:
    return metrics.usage() if get_observability().enable_metrics else None


def _label(tenant: Tenant | None) -> str:
    return OPERATOR if tenant is None else tenant.name
