"""Decides which modules an adapter's config selects, as PEFT does: targets, exclusions and choice of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_blocklora.adapters.errors import AdapterError, brief
from sglang_blocklora.adapters.patterns import Pattern, compile_pattern

PLAIN_NAME = re.compile(r"[\w.]+")
# PEFT takes the first number that stands between two parts of the name, where layers_pattern is not given.
FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """PEFT's choice of modules; ``names`` None for any (what the weights hold is what was adapted).

    names, excluded  names that end a module's path, or an expression for all of it
    parameters       names that end the path of a parameter of experts (``target_parameters``)
    layers           indices of the only layers, empty for all
    layers_patterns  what stands before the index; empty for anything
    """

    names: frozenset[str] | Pattern | None
    parameters: frozenset[str]
    excluded: frozenset[str] | Pattern
    layers: tuple[int, ...]
    layers_patterns: tuple[str, ...]

    @staticmethod
    def read(adapter: str, raw: Mapping[str, Any]) -> Targets:
        """From the keys of ``adapter_config.json``. Raises ``AdapterError``."""
        names = _names(adapter, raw, "target_modules")
        if isinstance(raw.get("target_modules"), str) and raw["target_modules"].lower() == "all-linear":
            names = None
        parameters = _names(adapter, raw, "target_parameters") or frozenset()
        if isinstance(parameters, Pattern):
            raise _wrong(adapter, "target_parameters", raw["target_parameters"], "a list of names")
        if parameters and not raw.get("target_modules"):
            names = frozenset()
        layers = _list(raw.get("layers_to_transform"))
        patterns = _list(raw.get("layers_pattern"))
        if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
            raise _wrong(adapter, "layers_to_transform", layers, "layer indices")
        if not all(isinstance(pattern, str) and PLAIN_NAME.fullmatch(pattern) for pattern in patterns):
            raise _wrong(adapter, "layers_pattern", patterns, "names of the list of layers")
        if layers and isinstance(names, Pattern):
            raise _wrong(adapter, "layers_to_transform", layers, "none beside an expression in target_modules")
        return Targets(
            names=names,
            parameters=parameters,
            excluded=_names(adapter, raw, "exclude_modules") or frozenset(),
            layers=tuple(layers),
            layers_patterns=tuple(patterns),
        )

    def selects(self, module: str) -> bool:
        """Whether PEFT adapts ``module``, a path in the model that was trained, or one expert of a parameter there."""
        if module.endswith("]"):
            return self.selects_parameter(module.partition("[")[0])
        if _is_among(module, self.excluded):
            return False
        if self.names is None or (isinstance(self.names, frozenset) and module in self.names):
            return True
        return _is_among(module, self.names) and (not self.layers or self._in_layers(module))

    def selects_parameter(self, parameter: str) -> bool:
        """Whether PEFT adapts a parameter of experts; neither exclusions nor the choice of layers concern it."""
        return any(parameter == one or parameter.endswith(f".{one}") for one in self.parameters)

    def _in_layers(self, module: str) -> bool:
        found = FIRST_NUMBER.match(module) if not self.layers_patterns else None
        for pattern in self.layers_patterns:
            found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", module)
            if found:
                break
        return found is not None and int(found["layer"]) in self.layers

    def without_weights(self, modules: Iterable[str]) -> list[str]:
        """Names that no module of the weights ends with: PEFT starts those at zero."""
        if not isinstance(self.names, frozenset):
            return []
        return sorted(self.names.difference(*map(_endings, modules)))


def _endings(module: str) -> set[str]:
    """The path and each part of it that follows a dot."""
    parts = module.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _is_among(module: str, names: frozenset[str] | Pattern) -> bool:
    return names.matches(module) if isinstance(names, Pattern) else not names.isdisjoint(_endings(module))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None or value == "" else [value]


def _names(adapter: str, raw: Mapping[str, Any], key: str) -> frozenset[str] | Pattern | None:
    value = raw.get(key)
    if not value:
        return None
    if isinstance(value, str):
        return compile_pattern(adapter, key, value)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(adapter, key, value, "a list of module names, or one regular expression")
    return frozenset(value)


def _wrong(adapter: str, key: str, value: Any, expected: str) -> AdapterError:
    return AdapterError(adapter, f"{key} = {brief(value)}", expected, "Mend adapter_config.json.")
