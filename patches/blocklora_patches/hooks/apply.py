"""Puts hooks in place, and makes sure that each one took and stays."""

from __future__ import annotations

import inspect
import pkgutil
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource

from blocklora_patches.hooks.hook import Hook

_OURS = HookSource("blocklora", "sglang-blocklora")
_placed: dict[Hook, Any] = {}  # what has stood at a hook's target since we put it there
_overridden: set[str] = set()  # of SGLang's classes by subclasses of ours


def apply(hooks: Iterable[Hook], subclasses: Iterable[type] = ()) -> None:
    """Put ``hooks`` in place, and nobody else's; those that are there already stay.

    subclasses  of ours, which SGLang uses for its own: what they override counts as hooked

    ``SystemExit`` naming each target that another plugin has hooked. ``ValueError`` where two of ours share one: the
    registry would decide which runs first, so one handler has to call both.
    """
    new = [hook for hook in hooks if hook not in _placed]
    targets = Counter(hook.target for hook in [*_placed, *new])
    doubles = [target for target, count in targets.items() if count > 1]
    if doubles:
        raise ValueError(f"two hooks on {', '.join(doubles)}: write one handler that calls both, in the order meant")
    _overridden.update(
        f"{base.__module__}.{base.__qualname__}.{name}"
        for subclass in subclasses
        for base in subclass.__mro__[1:]
        for name in vars(subclass)
    )
    _stop(_rivals(new))
    for hook in new:
        HookRegistry.register(hook.target, hook.handler, hook.kind, source=_OURS)
    # Classes first, as in the registry: hooks on their methods are meant for what replaces them.
    for hook in sorted(new, key=lambda hook: not _is_class(hook)):
        # Not apply_hooks(): it logs a hook that fails and goes on, and it puts in place what other plugins have
        # registered so far, after which it passes over what yet others add to the same targets.
        HookRegistry._apply_target(hook.target, HookRegistry._hooks[hook.target])
        HookRegistry._patched.add(hook.target)
    _placed.update((hook, _standing(hook.target)) for hook in new)


def check() -> None:
    """``SystemExit`` naming each of our hooks that is no longer in place, and each that another plugin competes with.

    To be called when all plugins have run: SGLang passes over hooks that a later one registers on our targets.
    """
    moved = [
        f"{hook.target}: replaced by {_name(found)}"
        for hook, ours in _placed.items()
        if (found := _standing(hook.target)) is not ours
    ]
    _stop([*_rivals(_placed), *moved])


def _stop(wrong: list[str]) -> None:
    if wrong:
        raise SystemExit(
            "sglang-blocklora and other code change the same functions of SGLang, and one of the two would be left "
            "out:\n  "
            + "\n  ".join(wrong)
            + "\nName the plugins that are to run in SGLANG_PLUGINS (comma-separated, blocklora among them), uninstall "
            "the other one, or start stock SGLang (python -m sglang.launch_server)."
        )


def _rivals(own: Collection[Hook]) -> list[str]:
    """One line for each hook of another plugin on a target of ``own`` or a method of a class of ours."""
    targets = {hook.target for hook in own} | _overridden
    classes = {hook.target for hook in own if _is_class(hook)}
    return [
        f"{target}: hooked by sglang-blocklora and, {kind.value}, by {_plugin(source)} ({_name(handler)})"
        for target, hooks in HookRegistry._hooks.items()
        for kind, handler, source in hooks
        if source != _OURS and (target in targets or target.rpartition(".")[0] in classes)
    ]


def _is_class(hook: Hook) -> bool:
    return isinstance(hook.handler, type)


def _standing(target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return inspect.getattr_static(pkgutil.resolve_name(owner), name)


def _name(it: Any) -> str:
    return f"{getattr(it, '__module__', '?')}.{getattr(it, '__qualname__', repr(it))}"


def _plugin(source: HookSource | None) -> str:
    if source is None:
        return "unknown code"
    return f"plugin {source.plugin_name}" + (f" of {source.dist_name}" if source.dist_name else "")
