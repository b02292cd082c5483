"""Lets tenants in by their keys and shows them their own adapters, with ``--tenants`` (docs/tenancy.md).

Who asks is decided where SGLang checks keys (``utils/auth.py``) and is a context variable from there on, so that no
route has to hand it on. The operator, who has SGLang's own key, and calls within the process are no tenant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_serving
from sglang.srt.utils.auth import AuthDecision, AuthLevel
from sglang_blocklora.settings import Settings
from sglang_blocklora.tenancy.file import Tenant, Tenants, key_hash, read
from sglang_blocklora.tenancy.quotas import Quotas

from blocklora_patches.hooks.hook import Hook, Process

V = TypeVar("V")

# What a tenant may ask for: path -> methods. All else of SGLang tells of others, or is the operator's.
ROUTES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "/generate",
            "/v1/completions",
            "/v1/chat/completions",
            "/v1/responses",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/embeddings",
            "/v1/score",
            "/v1/classify",
            "/v1/decisions",
            "/v1/systemone",
            "/v1/rerank",
            "/v1/tokenize",
            "/v1/detokenize",
            "/v1/audio/transcriptions",
            "/tokenize",
            "/detokenize",
            "/encode",
            "/classify",
            "/invocations",
            "/api/chat",
            "/api/generate",
            "/api/show",
        ),
        ("POST",),
    ),
    **dict.fromkeys(("/v1/models", "/adapters", "/api/tags", "/model_info", "/get_model_info", "/ping"), ("GET",)),
}
BELOW = ("/v1/models/", "/adapters/")  # with GET

_caller: ContextVar[Tenant | None] = ContextVar("blocklora_tenant", default=None)
_serving: Tenancy | None = None


class Tenancy:
    """The tenants of a server: whose each key is, and what they have used.

    path         of their file
    total_slots  of the KV caches of all replicas
    """

    def __init__(self, path: str, total_slots: int) -> None:
        self.path = path
        tenants = read(path)
        self.by_hash = tenants.by_hash()
        self.quotas = Quotas(tenants, total_slots)

    def take(self, tenants: Tenants) -> None:
        """Let these take the place of those before; requests that run go on."""
        self.by_hash, self.quotas.tenants = tenants.by_hash(), tenants

    def tenant_of(self, authorization: str | None) -> Tenant | None:
        """Whose key an Authorization header carries."""
        scheme, _, key = (authorization or "").partition(" ")
        return self.by_hash.get(key_hash(key)) if scheme.lower() == "bearer" else None


def serving() -> Tenancy | None:
    """The tenants of this process's server, None without ``--tenants``."""
    return _serving


def serve(total_slots: int) -> None:
    """Read the file that the settings name, if they name one. ``ValueError`` where it cannot be."""
    global _serving
    settings = Settings.active()
    _serving = Tenancy(settings.tenants, total_slots) if settings is not None and settings.tenants else None


def read_for_server(path: str) -> Tenants:
    """The file at ``path``, for a server that runs. ``ValueError`` where it cannot be, or gives away SGLang's keys."""
    tenants, keys = read(path), get_serving()
    tenants.refuse_keys({"--api-key": keys.api_key, "--admin-api-key": keys.admin_api_key})
    return tenants


def caller() -> Tenant | None:
    """Who asks, None for the operator."""
    return _caller.get()


def may_use(adapter: str) -> bool:
    """Whether who asks may know and name ``adapter``."""
    tenant = _caller.get()
    return tenant is None or tenant.may_use(adapter)


def visible(adapters: Mapping[str, V]) -> Mapping[str, V]:
    """Those of ``adapters``, by name, that who asks may know, as they are at each look."""
    tenant = _caller.get()
    return adapters if tenant is None else _Visible(adapters, tenant)


class _Visible(Mapping[str, V]):
    """Those of many adapters that a tenant may know; one is looked up without a look at the others."""

    def __init__(self, adapters: Mapping[str, V], tenant: Tenant) -> None:
        self._adapters = adapters
        self._tenant = tenant

    def __getitem__(self, name: str) -> V:
        if not self._tenant.may_use(name):
            raise KeyError(name)
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return filter(self._tenant.may_use, self._adapters)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _decide_request_auth(original: Callable[..., AuthDecision], **asked: Any) -> AuthDecision:
    decision = original(**asked)
    tenancy, tenant = serving(), None
    if tenancy is not None and not decision.allowed:
        tenant = tenancy.tenant_of(asked["authorization_header"])
    _caller.set(tenant)
    if tenant is None:
        return decision
    method, path = asked["method"], asked["path"]
    allowed = method in ROUTES.get(path, ()) or (method == "GET" and path.startswith(BELOW))
    return AuthDecision(allowed=allowed and asked["auth_level"] == AuthLevel.NORMAL, error_status_code=403)


HOOKS = (
    Hook(
        "sglang.srt.utils.auth.decide_request_auth",
        _decide_request_auth,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream knows one key for all who generate.",
        retire_when="upstream asks a registry who has a key",
    ),
)
