"""Reads off the hooks and the source of this package what a release's contract holds.

Symbols are what is hooked, what is imported, what is used of an imported module or class, and what our subclasses
override. Attributes are those a hook uses of its ``self``, those our subclasses use of theirs, and those listed in
``attributes.py`` and in the release's module; methods among them become symbols, with their parameters.
"""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook
from blocklora_patches.install import HOOKS
from blocklora_patches.language import activate
from blocklora_patches.porting.attributes import ELSEWHERE, FRONTEND, SERVER
from blocklora_patches.releases.contract import Contract, Part
from blocklora_patches.releases.current import release
from blocklora_patches.releases.look import has_attribute, parameters, resolve

_PACKAGE = "blocklora_patches"
_ROOT = Path(__file__).parents[2]
_OWN_PREFIX = "blocklora"  # of what we keep on upstream's objects


def contract() -> Contract:
    """The contract with the installed SGLang, in which nothing of ours is in place yet."""
    own = release.ATTRIBUTES
    listed = {owner: (*SERVER.get(owner, ()), *own.get(owner, ())) for owner in SERVER | own}
    roots = [*(f"{_PACKAGE}.{name}" for name in ("plugin", "install", "launch")), release.__name__]
    return Contract(
        server=_part([*HOOKS], _closure(*roots), listed),
        frontend=_part([*activate.hooks()], _closure(f"{_PACKAGE}.language.activate"), FRONTEND),
    )


def _part(hooks: list[Hook], files: list[Path], listed: dict[str, tuple[str, ...]]) -> Part:
    paths, called = {hook.target for hook in hooks}, set[str]()
    attributes: dict[str, set[str]] = defaultdict(set, {owner: set(names) for owner, names in listed.items()})
    for file in files:
        source = _Source(file)
        paths |= source.used()
        called |= source.called()
        for owner, name in source.inherited():
            attributes[owner].add(name)
    for hook in hooks:
        for owner, name in _used_of_self(hook):
            attributes[owner].add(name)
    for owner, names in attributes.items():
        methods = {name for name in names if callable(inspect.getattr_static(resolve(owner), name, None))}
        paths |= {f"{owner}.{name}" for name in methods}
        names -= methods
    missing = [
        f"{owner}.{name}"
        for owner, names in attributes.items()
        for name in sorted(names)
        if not has_attribute(resolve(owner), name)
    ]
    if missing:
        raise SystemExit("No class of the installed SGLang has these attributes:\n  " + "\n  ".join(missing))
    return Part(
        symbols={path: _parameters(path, path in called) for path in sorted(paths)},
        attributes={owner: sorted(names) for owner, names in sorted(attributes.items()) if names},
    )


def _parameters(path: str, called: bool) -> str | None:
    """How ``path`` can be called, but for classes that we only look at."""
    found = resolve(path)
    return parameters(found) if called or not isinstance(found, type) else None


def _closure(*modules: str) -> list[Path]:
    """Files of this package that ``modules`` import, directly or not, and their own."""
    done = set()
    found: list[Path] = []
    waiting = [*modules]
    while waiting:
        module = waiting.pop()
        file = _ROOT / (module.replace(".", "/") + ".py")
        if module in done or not file.is_file():
            continue
        done.add(module)
        found.append(file)
        for name in _Source(file).imported.values():
            if name.startswith(_PACKAGE):
                waiting += [name, name.rpartition(".")[0]]
    return sorted(found)


class _Source:
    """A file of ours, and what it takes from SGLang."""

    def __init__(self, file: Path) -> None:
        self.tree = ast.parse(file.read_text())
        self.module = ".".join(file.relative_to(_ROOT).with_suffix("").parts)
        self.imported: dict[str, str] = {}  # name in the file -> dotted path
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                self.imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                self.imported |= {alias.asname or alias.name: alias.name for alias in node.names}
        self.upstream = {name: path for name, path in self.imported.items() if path.split(".")[0] == "sglang"}

    def used(self) -> set[str]:
        """What is imported of SGLang, and what is used of the modules and classes among it."""
        paths = set(self.upstream.values())
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and isinstance(node.ctx, ast.Load):
                path = self.upstream.get(node.value.id)
                if path and (inspect.ismodule(resolve(path)) or inspect.isclass(resolve(path))):
                    paths.add(f"{path}.{node.attr}")
        return paths

    def called(self) -> set[str]:
        """What is called of what is imported."""
        calls = [node.func for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        return {self.upstream[call.id] for call in calls if isinstance(call, ast.Name) and call.id in self.upstream}

    def inherited(self) -> Iterator[tuple[str, str]]:
        """(upstream class, name) of what our subclasses override, and what they use of ``self`` and do not have."""
        for owner in (node for node in self.tree.body if isinstance(node, ast.ClassDef)):
            ours = resolve(f"{self.module}.{owner.name}")
            upstream = next((base for base in ours.__mro__ if base.__module__.split(".")[0] == "sglang"), None)
            if upstream is None:
                continue
            base = f"{upstream.__module__}.{upstream.__qualname__}"
            own = {node.name for node in owner.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            own |= {target.id for node in owner.body for target in _targets(node) if isinstance(target, ast.Name)}
            yield from ((base, name) for name in sorted(own) if has_attribute(upstream, name))
            yield from ((base, name) for name in _names_of("self", owner) - own if has_attribute(upstream, name))


def _targets(node: ast.stmt) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []


def _used_of_self(hook: Hook) -> Iterator[tuple[str, str]]:
    """(upstream class, attribute) of what a method's handler uses of its ``self``."""
    owner = hook.target.rpartition(".")[0]
    if not inspect.isclass(resolve(owner)) or isinstance(hook.handler, type):
        return
    handler = _function(hook.handler)
    arguments = [argument.arg for argument in handler.args.args]
    position = 0 if hook.kind in (HookType.BEFORE, HookType.REPLACE) else 1
    if position < len(arguments):
        names = sorted(_names_of(arguments[position], handler))
        yield from ((owner, name) for name in names if f"{owner}.{name}" not in ELSEWHERE)


def _names_of(variable: str, tree: ast.AST) -> set[str]:
    """Attributes of ``variable`` that code uses, but for our own."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == variable
        and not node.attr.startswith((_OWN_PREFIX, "__"))
    }


@cache
def _function(handler: object) -> ast.FunctionDef | ast.AsyncFunctionDef:
    code = handler.__code__  # type: ignore[attr-defined]
    for node in ast.walk(_parsed(code.co_filename)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = [node.lineno, *(decorator.lineno for decorator in node.decorator_list)]
            if min(lines) == code.co_firstlineno:
                return node
    raise LookupError(f"no source of {handler}")


@cache
def _parsed(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text())
