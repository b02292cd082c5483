"""``adapter_model.safetensors``: names and shapes from the header, and reads of parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.weights_file import DTYPES, WeightsFile
from sglang_blocklora.sharding.cut import Factor

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


class Checkpoint:
    """The weights file of one adapter, open for reading parts. A context manager.

    shapes  module path -> {"A": (rows, columns), "B": ...}; both factors are present
    """

    def __init__(self, adapter: str, folder: Path) -> None:
        self.adapter = adapter
        self.path = folder / WEIGHTS_NAME
        if not self.path.is_file():
            self._refuse_missing(folder)
        try:
            self._file = WeightsFile(self.path)
        except (OSError, ValueError) as error:
            raise AdapterError(
                adapter, f"{self.path} that cannot be read ({error})", "a whole safetensors file", "Copy it again."
            ) from error
        self._names: dict[tuple[str, Factor], str] = {}
        try:
            self.shapes = self._index()
        except AdapterError:
            self._file.close()
            raise

    def _refuse_missing(self, folder: Path) -> None:
        if (folder / PICKLE_NAME).exists():
            raise AdapterError(
                self.adapter,
                f"only {PICKLE_NAME} in {folder}",
                f"{WEIGHTS_NAME} (unpickling a .bin file can run any code in it)",
                "Load it where you trust it with PEFT and save_pretrained(..., safe_serialization=True).",
            )
        raise AdapterError(
            self.adapter, f"no {WEIGHTS_NAME} in {folder}", "a PEFT adapter folder", "Give the adapter's own folder."
        )

    def _index(self) -> Mapping[str, Mapping[Factor, tuple[int, ...]]]:
        shapes: dict[str, dict[Factor, tuple[int, ...]]] = {}
        for name in sorted(self._file.tensors):
            match = TENSOR_NAME.fullmatch(name)
            if match is None:
                raise AdapterError(
                    self.adapter,
                    f"tensor {name!r}",
                    "only base_model.model.<module>.lora_A.weight and .lora_B.weight",
                    _advice(name),
                )
            factor: Factor = "A" if match["factor"] == "A" else "B"
            part = self._file.tensors[name]
            if part.dtype not in DTYPES:
                raise AdapterError(
                    self.adapter,
                    f"lora_{factor} of type {part.dtype}",
                    f"one of {', '.join(DTYPES)}",
                    "Save the adapter in a floating-point type.",
                    match["module"],
                )
            self._names[match["module"], factor] = name
            shapes.setdefault(match["module"], {})[factor] = part.shape
        if not shapes:
            raise AdapterError(self.adapter, f"no tensor in {self.path}", "LoRA weights", "Save the adapter again.")
        for module, factors in shapes.items():
            if len(factors) == 1:
                missing = "B" if "A" in factors else "A"
                raise AdapterError(self.adapter, f"no lora_{missing}", "both factors", "Save it again.", module)
        return shapes

    def read(self, module: str, factor: Factor, rows: slice | None, columns: slice | None) -> torch.Tensor:
        """Part of a stored factor; only its bytes are touched. Raises ``AdapterError`` on NaN or Inf."""
        try:
            tensor = self._file.read(self._names[module, factor], rows, columns)
        except OSError as error:
            raise AdapterError(
                self.adapter, f"lora_{factor} that cannot be read ({error})", "a whole file", "Copy it again.", module
            ) from error
        if not torch.isfinite(tensor).all():
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


def _advice(tensor: str) -> str:
    if "lora_magnitude_vector" in tensor:
        return "DoRA is not served: train without use_dora."
    if "lora_embedding" in tensor or "embed_tokens" in tensor or "lm_head" in tensor:
        return "Embeddings and lm_head are not served: train without them in target_modules."
    if tensor.endswith(".bias"):
        return "Trained biases are not served: train with bias='none' and lora_bias=False."
    return "Save it with PEFT's save_pretrained; fully trained modules are not served."
