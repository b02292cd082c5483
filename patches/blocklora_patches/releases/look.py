"""Describes how something of SGLang looks: a function's parameters, and attributes of a class's objects."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from functools import cache
from inspect import Parameter
from pathlib import Path
from typing import Any


def resolve(path: str) -> Any:
    """The module, or what it holds, at a dotted ``path``. ``ImportError`` or ``AttributeError`` if there is none."""
    module, rest = path, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or "."):
                raise  # the module is there, and what it imports is not
            module, _, name = module.rpartition(".")
            if not module:
                raise
            rest.insert(0, name)
    for name in rest:
        found = getattr(found, name)
    return found


def parameters(found: Any) -> str | None:
    """Names of the parameters of ``found``, ``*`` before the first that must be named; None: it cannot be called."""
    if not callable(found):
        return None
    texts: list[str] = []
    for parameter in inspect.signature(found).parameters.values():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            texts.append(f"*{parameter.name}")
        elif parameter.kind is Parameter.VAR_KEYWORD:
            texts.append(f"**{parameter.name}")
        else:
            if parameter.kind is Parameter.KEYWORD_ONLY and not any(text.startswith("*") for text in texts):
                texts.append("*")
            texts.append(parameter.name)
    return ", ".join(texts)


def has_attribute(owner: type, name: str) -> bool:
    """Whether objects of ``owner`` have ``name``: the class or a base defines, annotates or sets it on ``self``."""
    missing = object()
    if inspect.getattr_static(owner, name, missing) is not missing:
        return True
    return any(name in vars(base).get("__annotations__", ()) or name in _set_on_self(base) for base in owner.__mro__)


@cache
def _set_on_self(owner: type) -> frozenset[str]:
    source = getattr(sys.modules.get(owner.__module__), "__file__", None)
    if source is None:
        return frozenset()
    return _assigned(source).get(owner.__qualname__, frozenset())


@cache
def _assigned(source: str) -> dict[str, frozenset[str]]:
    """Class -> names that its methods set on ``self``, of all classes at the top of the Python file ``source``."""
    if not source.endswith(".py"):
        return {}
    classes = [node for node in ast.parse(Path(source).read_bytes()).body if isinstance(node, ast.ClassDef)]
    return {
        owner.name: frozenset(
            node.attr
            for node in ast.walk(owner)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        )
        for owner in classes
    }
