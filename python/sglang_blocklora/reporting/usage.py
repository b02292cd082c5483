"""Counts what each tenant uses of each adapter, as Prometheus series.

Import it only once ``PROMETHEUS_MULTIPROC_DIR`` is set, as SGLang's own metrics.
"""

from __future__ import annotations

from prometheus_client import Counter

from sglang_blocklora.reporting.prometheus import PREFIX, LabelBudget


class UsageMetrics:
    """Tenants are told by the names that the operator gave them, never by a key. At most one per process."""

    def __init__(self, budget: LabelBudget) -> None:
        self._budget = budget
        labels = ("tenant", "adapter")
        self._requests = Counter(f"{PREFIX}tenant_requests_total", "Prompts, times the answers of each.", labels)
        self._prompt = Counter(f"{PREFIX}tenant_prompt_tokens_total", "Tokens of prompts.", labels)
        self._generated = Counter(f"{PREFIX}tenant_generation_tokens_total", "Generated tokens.", labels)
        self._refused = Counter(
            f"{PREFIX}tenant_refusals_total", "Requests answered with a 429, by the limit met.", ("tenant", "limit")
        )

    def prompt(self, tenant: str, adapter: str | None, answers: int, tokens: int) -> None:
        """A prompt that is about to be sent, and how many answers it shall have."""
        label = self._budget.label(adapter)
        self._requests.labels(tenant, label).inc(answers)
        self._prompt.labels(tenant, label).inc(tokens)

    def generated(self, tenant: str, adapter: str | None, tokens: int) -> None:
        self._generated.labels(tenant, self._budget.label(adapter)).inc(tokens)

    def refused(self, tenant: str, limit: str) -> None:
        """A request was refused for a limit of its tenant or of an adapter."""
        self._refused.labels(tenant, limit).inc()
