"""Reads an adapter's weights: names and shapes from the header of ``adapter_model.safetensors``, then parts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

from sglang_blocklora.adapters.config import AdapterConfig
from sglang_blocklora.adapters.errors import AdapterError, brief, listed
from sglang_blocklora.adapters.experts import OfExpert, experts_of, is_wrapper
from sglang_blocklora.adapters.files import unreadable
from sglang_blocklora.adapters.tensor_names import FactorName, is_base_weight, parse_name, why_not
from sglang_blocklora.adapters.weights_file import DTYPES, StoredTensor, WeightsFile
from sglang_blocklora.sharding.architectures import suffix_of
from sglang_blocklora.sharding.cut import Factor
from sglang_blocklora.sharding.vocabulary import KINDS

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PART_NAME = re.compile(r"adapter_model-\d+-of-\d+\.(safetensors|bin)")


class Checkpoint:
    """The weights file of one adapter, open for reading parts. A context manager.

    shapes  module path in the model that was trained -> {"A": (rows, columns), "B": ...}; both factors are present.
            A wrapper of all experts of a layer is one module for each (``experts.py``)
    """

    def __init__(self, adapter: str, folder: Path, config: AdapterConfig) -> None:
        self.adapter = adapter
        self.path = folder / WEIGHTS_NAME
        try:
            self._file = WeightsFile(self.path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _missing(adapter, folder) from error
        except OSError as error:
            raise unreadable(adapter, self.path, error) from error
        except ValueError as error:
            raise AdapterError(
                adapter, f"{self.path} that cannot be read ({error})", "a whole safetensors file", "Copy it again."
            ) from error
        self._names: dict[tuple[str, Factor], str] = {}
        self._experts: dict[str, OfExpert] = {}
        self._turns: dict[tuple[str, str], torch.Tensor] = {}
        try:
            self.shapes = self._split_experts(config, self._index())
        except AdapterError:
            self._file.close()
            raise

    def _index(self) -> Mapping[str, Mapping[Factor, tuple[int, int]]]:
        shapes: dict[str, dict[Factor, tuple[int, int]]] = {}
        others = []
        for tensor, stored in sorted(self._file.tensors.items()):
            name = parse_name(tensor)
            if name is None:
                others.append((tensor, stored))
                continue
            other = self._names.setdefault(name, tensor)
            if other != tensor:
                raise AdapterError(
                    self.adapter,
                    f"tensors {brief(other)} and {brief(tensor)}, which are the same lora_{name.factor}",
                    "one of each",
                    "Save one adapter into the file.",
                    name.module,
                )
            shapes.setdefault(name.module, {})[name.factor] = self._checked_shape(name, stored)
        for module, factors in shapes.items():
            if len(factors) == 1:
                missing = "B" if "A" in factors else "A"
                raise AdapterError(self.adapter, f"no lora_{missing}", "both factors", "Save it again.", module)
        self._check_others(others, shapes)
        if not shapes:
            raise AdapterError(self.adapter, f"no tensor in {self.path}", "LoRA weights", "Save the adapter again.")
        return shapes

    def _check_others(
        self, others: Sequence[tuple[str, StoredTensor]], shapes: Mapping[str, Mapping[Factor, tuple[int, int]]]
    ) -> None:
        """Tensors that are no factors: the base model's embeddings and head, which PEFT saves beside factors on them.

        LoRA freezes what it is on, so in a vocabulary of the same size they are the base model's own.
        """
        own = {
            (factors["A"][1], factors["B"][0]) if part == "embedding" else (factors["B"][0], factors["A"][1])
            for name, (_, part) in KINDS.items()
            for module, factors in shapes.items()
            if suffix_of(module) == name
        }
        for tensor, stored in others:
            if not own or not is_base_weight(tensor):
                raise AdapterError(
                    self.adapter,
                    f"tensor {brief(tensor)}",
                    "only base_model.model.<module>.lora_A.weight and .lora_B.weight",
                    why_not(tensor),
                )
            if tuple(stored.shape) not in own:
                raise AdapterError(
                    self.adapter,
                    f"tensor {brief(tensor)} of shape {brief(list(stored.shape))}",
                    f"the base model's own, {list(min(own))}, as PEFT saves it beside an adapter on it",
                    "Check that adapter and base model have the same vocabulary: new tokens are not served.",
                )

    def _split_experts(
        self, config: AdapterConfig, shapes: Mapping[str, Mapping[Factor, tuple[int, int]]]
    ) -> Mapping[str, Mapping[Factor, tuple[int, int]]]:
        split = {name: factors for name, factors in shapes.items() if not is_wrapper(name)}
        for module, part, own in experts_of(self.adapter, config, shapes):
            self._experts[module] = part
            split[module] = own
        return split

    def _checked_shape(self, name: FactorName, stored: StoredTensor) -> tuple[int, int]:
        if stored.dtype not in DTYPES:
            raise AdapterError(
                self.adapter,
                f"lora_{name.factor} of type {stored.dtype}",
                f"one of {', '.join(DTYPES)}",
                "Save the adapter in a floating-point type.",
                name.module,
            )
        if len(stored.shape) != 2:
            raise AdapterError(
                self.adapter,
                f"lora_{name.factor} of shape {brief(list(stored.shape))}",
                "a matrix",
                "Gather the weights before saving (DeepSpeed ZeRO-3 and FSDP keep parts of them on each rank).",
                name.module,
            )
        rows, columns = stored.shape
        return rows, columns

    def read(self, module: str, factor: Factor, rows: slice | None, columns: slice | None) -> torch.Tensor:
        """Part of a factor; only its bytes are touched. Raises ``AdapterError`` on NaN or Inf."""
        part = self._experts.get(module)
        if part is None:
            return self._read(module, factor, rows, columns)
        if factor == "A":
            return self._read(part.wrapper, "A", part.rows_of_a(rows), columns)
        # Experts take turns in the columns, so rows are read once for all of them: at most gate's and up's.
        key = (part.wrapper, str(rows))
        if key not in self._turns:
            others = {known: turns for known, turns in self._turns.items() if known[0] == part.wrapper}
            self._turns = {**others, key: self._read(part.wrapper, "B", rows, None)}
        return self._turns[key][:, part.columns_of_b(columns)]

    def _read(self, module: str, factor: Factor, rows: slice | None, columns: slice | None) -> torch.Tensor:
        try:
            tensor = self._file.read(self._names[module, factor], rows, columns)
        except OSError as error:
            raise AdapterError(
                self.adapter, f"lora_{factor} that cannot be read ({error})", "a whole file", "Copy it again.", module
            ) from error
        if not _is_finite(tensor):
            raise AdapterError(
                self.adapter,
                f"NaN or Inf in lora_{factor}",
                "finite weights",
                "The training run diverged: use an earlier checkpoint.",
                module,
            )
        return tensor

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are. A sum, the quicker look, is not where one of them is not, or where it is too large."""
    return math.isfinite(tensor.sum()) or all(map(math.isfinite, torch.aminmax(tensor)))  # NaN would be both of them


def _missing(adapter: str, folder: Path) -> AdapterError:
    """What to say where there is no file of weights."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return unreadable(adapter, folder, error)
    if PICKLE_NAME in names:
        return AdapterError(
            adapter,
            f"only {PICKLE_NAME} in {folder}",
            f"{WEIGHTS_NAME} (unpickling a .bin file can run any code in it)",
            "Load it where you trust it with PEFT and save_pretrained(..., safe_serialization=True).",
        )
    parts = [name for name in names if PART_NAME.fullmatch(name)]
    if parts:
        return AdapterError(
            adapter,
            f"{listed(parts)} in {folder}",
            f"the weights in one file, {WEIGHTS_NAME}, as PEFT writes and reads them",
            "Put the parts' tensors into one file.",
        )
    return AdapterError(
        adapter, f"no {WEIGHTS_NAME} in {folder}", "a PEFT adapter folder", "Give the adapter's own folder."
    )
