"""Makes, from a backend of the language, one that names an adapter in every request (``lang/backend/``).

Such a bound backend is of a subclass of the backend's own class and shares everything with the one it was made from.
"""

from __future__ import annotations

import functools
import sys
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.utils import http_request
from sglang_blocklora.naming.choice import AdaptersNotSupported, InvocationUnknown, UnknownAdapter

# Where a backend keeps the adapter names it was last told, so that one look-up serves a whole program.
_KNOWN = "_blocklora_known_adapters"
# Where it keeps what activates them, as text.
_INVOCATIONS = "_blocklora_invocations"


class Bound:
    """What all bound backends have: their adapter, and ``unbound``, which answers with the base model."""

    unbound: BaseBackend
    adapter: str

    def __init__(self, unbound: BaseBackend, adapter: str) -> None:
        self.__dict__.update(vars(unbound))
        self.unbound = unbound
        self.adapter = adapter

    def invocation(self, text: str) -> str:
        """What activates the adapter, to be written behind ``text``; empty for one that is always active.

        Raises ``InvocationUnknown``.
        """
        raise InvocationUnknown(
            f"adapter {self.adapter!r}, invoke=True: this {type(self.unbound).__name__} does not tell what activates "
            "an adapter. Write the invocation into the program, or use RuntimeEndpoint and an sglang-blocklora server."
        )


class _BoundEndpoint(Bound):
    def _add_images(self, s: Any, data: dict[str, Any]) -> None:
        """Upstream completes every request here, just before it is sent."""
        super()._add_images(s, data)  # type: ignore[misc]
        data["lora_path"] = self.adapter

    def _assert_success(self, res: Any) -> None:
        try:
            super()._assert_success(res)  # type: ignore[misc]
        except RuntimeError:
            _check_served(self.unbound, self.adapter)  # it may have been unloaded since it was looked up
            raise

    def cache_prefix(self, prefix_str: str) -> None:
        """Upstream sends this request alone past ``_add_images``."""
        data = {"text": prefix_str, "sampling_params": {"max_new_tokens": 0}}
        self._generate_http_request(SimpleNamespace(images_=[]), data)  # type: ignore[attr-defined]

    def invocation(self, text: str) -> str:
        known: dict[str, str] = vars(self.unbound).setdefault(_INVOCATIONS, {})
        if self.adapter not in known:
            facts = self._facts()
            if facts is not None and facts["lora_id"] is None:  # a folder that nobody has named yet: this loads it
                self.cache_prefix(text or " ")
                facts = self._facts()
            if facts is None:
                return super().invocation(text)
            if facts["invocation"] and facts["invocation_text"] is None:
                raise InvocationUnknown(
                    f"adapter {self.adapter!r}, invoke=True: it is activated by tokens {facts['invocation']}, and no "
                    "text gives those. Send prompts as token ids, without the language."
                )
            known[self.adapter] = facts["invocation_text"] or ""
        return known[self.adapter]

    def _facts(self) -> dict[str, Any] | None:
        """What the server tells of the adapter; None where it is not one of ours."""
        backend: Any = self.unbound
        url = f"{backend.base_url}/adapters/{quote(self.adapter, safe='')}"
        answer = http_request(url, api_key=backend.api_key, verify=backend.verify)
        try:
            self._assert_success(answer)
        except RuntimeError:
            if answer.status_code != HTTPStatus.NOT_FOUND:
                raise
            return None
        facts: dict[str, Any] = answer.json()
        return facts


class _BoundOpenAI(Bound):
    def __init__(self, unbound: Any, adapter: str) -> None:
        super().__init__(unbound, adapter)
        self.spec_kwargs: dict[str, Any] = {}  # speculative calls collect their arguments here
        self.spec_format: list[Any] = []
        chat, completions = unbound.client.chat.completions, unbound.client.completions
        # The model's name is replaced in the request and not in the backend, which reads meaning into it ("o1").
        self.client = SimpleNamespace(
            chat=SimpleNamespace(completions=SimpleNamespace(create=self._with_adapter(chat.create))),
            completions=SimpleNamespace(create=self._with_adapter(completions.create)),
        )

    def _with_adapter(self, create: Any) -> Any:
        def create_with_adapter(**arguments: Any) -> Any:
            try:
                return create(**{**arguments, "model": self.adapter})
            except _openai().openai.NotFoundError:
                _check_served(self.unbound, self.adapter)  # it may have been unloaded since it was looked up
                raise

        return create_with_adapter


def bind(backend: Any, adapter: str | None) -> Any:
    """``backend`` as ``adapter`` sees it; None: the base model.

    Raises ``UnknownAdapter``, or ``AdaptersNotSupported`` where the backend could only answer with its one model.
    """
    backend = getattr(backend, "endpoint", backend)
    unbound = backend.unbound if isinstance(backend, Bound) else backend
    if adapter is None or unbound is None:
        return unbound
    if isinstance(backend, Bound) and backend.adapter == adapter:
        return backend
    mixin = _BoundEndpoint if isinstance(unbound, RuntimeEndpoint) else _BoundOpenAI if _is_openai(unbound) else None
    if mixin is None:
        raise AdaptersNotSupported(
            f"adapter {adapter!r}: {type(unbound).__name__} cannot choose an adapter. Use RuntimeEndpoint, Runtime "
            "or OpenAI (with base_url of an sglang-blocklora server) as backend."
        )
    _check_known(unbound, adapter)
    return _bound_class(mixin, type(unbound))(unbound, adapter)


def bound_adapter(backend: Any) -> str | None:
    """The adapter that ``backend`` answers with."""
    return backend.adapter if isinstance(backend, Bound) else None


@functools.cache
def _bound_class(mixin: type, backend: type) -> type:
    return type(f"{backend.__name__}WithAdapter", (mixin, backend), {})


def _is_openai(backend: Any) -> bool:
    return _openai() is not None and isinstance(backend, _openai().OpenAI)


def _openai() -> Any:
    """Upstream's module, or None. It is not imported here: the client may not be installed."""
    return sys.modules.get("sglang.lang.backend.openai")


def _check_known(backend: Any, adapter: str) -> None:
    if adapter not in getattr(backend, _KNOWN, ()):
        _check_served(backend, adapter)


def _check_served(backend: Any, adapter: str) -> None:
    """``UnknownAdapter`` unless the server has the adapter now."""
    if isinstance(backend, RuntimeEndpoint):
        where = backend.base_url
        answer = http_request(f"{where}/v1/models", api_key=backend.api_key, verify=backend.verify)
        backend._assert_success(answer)
        known = {model["id"] for model in answer.json()["data"] if model.get("parent")}
    else:
        where = str(backend.client.base_url)
        known = {model.id for model in backend.client.models.list() if getattr(model, "parent", None)}
    setattr(backend, _KNOWN, known)
    if adapter not in known:
        raise UnknownAdapter(adapter, where, known)
