"""Reads the launcher's flags of ours, and carries them to SGLang's processes in one environment variable."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from sglang_blocklora.memory.eviction import DEFAULT_STRATEGY, STRATEGIES
from sglang_blocklora.naming.folders import AdapterFolders

# Set by our launcher only: its absence is what keeps an installed but unused extension out of stock SGLang.
SETTINGS_VARIABLE = "SGLANG_BLOCKLORA_SETTINGS"
# "0" keeps the extension off, whoever launched the server.
SWITCH_VARIABLE = "SGLANG_BLOCKLORA"
# Our value of --schedule-policy and --load-balance-method. SGLang takes fixed lists there and is left at its defaults.
AFFINITY = "adapter-affinity"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launcher was asked for, alike in every process of its server.

    adapter_memory     "unified": adapters in the KV cache's slots; "static": in an arena of their own
    adapter_memory_mb  static: MiB per TP rank of that arena
    adapter_host_memory_gb  GiB per TP rank of host memory that keeps images of adapters; below it is disk
    adapter_read_timeout_s  seconds after which TP rank 0 gives up a read of an adapter's files
    adapter_root       adapters may only be loaded from below this folder; None: from anywhere
    route_by_adapter   data parallel replicas: a request goes to the replica that holds its adapter
    adapter_dirs       folders whose adapters are loaded when a request first names them
    adapter_loading_without_key  loads over HTTP are open to whoever reaches the server
    adapter_kernels    "torch", "triton", or "auto": triton on a GPU, torch elsewhere
    adapter_eviction   a key of ``memory.eviction.STRATEGIES``
    decision_log       path to which each TP rank appends its number and writes its decisions; None: off
    adapter_overlap    triton only: shrink runs on a second stream, beside the linear's own GEMM
    adapter_affinity   our order of the waiting queue; False: SGLang's, whichever was chosen
    adapter_max_wait_steps  scheduler steps for which a request may be overtaken
    adapter_weights    shares of adapters by name while others wait; 1 where none is given
    """

    adapter_memory: Literal["unified", "static"] = "unified"
    adapter_memory_mb: int = 1024
    adapter_host_memory_gb: float = 8.0
    adapter_root: str | None = None
    adapter_read_timeout_s: float = 120.0
    adapter_kernels: Literal["auto", "torch", "triton"] = "auto"
    adapter_overlap: bool = False
    decision_log: str | None = None
    adapter_eviction: str = DEFAULT_STRATEGY
    adapter_affinity: bool = True
    adapter_max_wait_steps: int = 16
    adapter_weights: dict[str, float] = {}  # msgspec copies it for each object
    adapter_dirs: tuple[str, ...] = ()
    route_by_adapter: bool = True
    adapter_loading_without_key: bool = False

    def __post_init__(self) -> None:
        if self.adapter_eviction not in STRATEGIES:
            raise ValueError(f"--adapter-eviction {self.adapter_eviction} must be one of {', '.join(STRATEGIES)}")

    def uses_triton(self, on_gpu: bool) -> bool:
        """Whether the Triton path computes the deltas."""
        return self.adapter_kernels == "triton" or (self.adapter_kernels == "auto" and on_gpu)

    @contextmanager
    def exported(self) -> Iterator[None]:
        """Within it, every process that is started has these settings; after it, none has them."""
        before = os.environ.get(SETTINGS_VARIABLE)
        os.environ[SETTINGS_VARIABLE] = msgspec.json.encode(self).decode()
        try:
            yield
        finally:
            if before is None:
                del os.environ[SETTINGS_VARIABLE]
            else:
                os.environ[SETTINGS_VARIABLE] = before

    @staticmethod
    def from_environment() -> Settings | None:
        """Settings of the launcher that started this process, or None where the extension is off.

        ``SettingsNotUnderstood`` where they are there and cannot be read, or have a field that is not known here.
        """
        text = os.environ.get(SETTINGS_VARIABLE)
        if text is None or os.environ.get(SWITCH_VARIABLE) == "0":
            return None
        try:
            return msgspec.json.decode(text, type=Settings, strict=True)
        except msgspec.DecodeError as error:
            raise SettingsNotUnderstood(
                f"{SETTINGS_VARIABLE} holds what this version does not understand: {error}. Found {text!r}. It is for "
                "the launcher to write: unset it and start python -m sglang_blocklora.launch_server, or start stock "
                f"SGLang with {SWITCH_VARIABLE}=0."
            ) from error

    @staticmethod
    def active() -> Settings | None:
        """Settings that this process runs with, or None where the extension is off."""
        return _kept or Settings.from_environment()

    @staticmethod
    def required() -> Settings:
        """``active``, where hooks are in place and thus settings are: ``RuntimeError`` where there are none."""
        settings = Settings.active()
        if settings is None:
            raise RuntimeError(f"the hooks of sglang-blocklora run without its settings ({SETTINGS_VARIABLE})")
        return settings

    def keep(self) -> None:
        """Run this process with these settings, also once they are no longer exported."""
        global _kept
        _kept = self

    @property
    def adapter_folders(self) -> AdapterFolders:
        """Where adapters are that no request has named yet."""
        return AdapterFolders(tuple(map(Path, self.adapter_dirs)))


class SettingsNotUnderstood(ValueError):
    """The exported settings are not this version's."""


_kept: Settings | None = None  # of this process
DEFAULTS = Settings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Our own launcher flags; SGLang's stay as they are."""
    group = parser.add_argument_group("sglang-blocklora")
    group.add_argument(
        "--adapter-memory",
        choices=["unified", "static"],
        default=DEFAULTS.adapter_memory,
        help="where adapter weights live: in the KV cache's slots, or in memory of their own (default: %(default)s)",
    )
    group.add_argument(
        "--adapter-memory-mb",
        type=int,
        default=None,
        help=f"static memory: MiB per TP rank for adapter weights (default: {DEFAULTS.adapter_memory_mb})",
    )
    group.add_argument(
        "--adapter-eviction",
        choices=list(STRATEGIES),
        default=DEFAULTS.adapter_eviction,
        help="which idle adapters stay when others, or unified memory's cached KV, give way (default: %(default)s)",
    )
    group.add_argument(
        "--adapter-host-memory-gb",
        type=float,
        default=DEFAULTS.adapter_host_memory_gb,
        help="GiB of host memory per TP rank for loaded adapters that are not in use; what does not fit is read from "
        "its folder again, always with 0 (default: %(default)s)",
    )
    group.add_argument(
        "--adapter-read-timeout",
        type=float,
        default=DEFAULTS.adapter_read_timeout_s,
        metavar="SECONDS",
        help="give up reading an adapter's files after so long; other requests go on meanwhile (default: %(default)s)",
    )
    group.add_argument(
        "--adapter-root",
        type=Path,
        default=None,
        help="load adapters only from below this folder, symbolic links followed (default: from anywhere)",
    )
    group.add_argument(
        "--adapter-loading-without-key",
        action="store_true",
        help="let whoever reaches the server load, unload and pin adapters; otherwise one that listens beyond this "
        "machine needs --admin-api-key, --api-key, --adapter-root or --adapter-dir for that",
    )
    group.add_argument(
        "--adapter-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="load an adapter that is not loaded from the folder of its name in here, when a request first names it; "
        "may be given several times",
    )
    group.add_argument(
        "--load-balance-method",
        default=AFFINITY,
        metavar="METHOD",
        help="with --dp-size above 1: adapter-affinity sends an adapter's requests to one replica unless that has more "
        "than its share; or one of SGLang's methods (default: %(default)s)",
    )
    group.add_argument(
        "--adapter-kernels",
        choices=["auto", "torch", "triton"],
        default=DEFAULTS.adapter_kernels,
        help="who computes the deltas; auto: triton on a GPU, torch elsewhere (default: %(default)s)",
    )
    group.add_argument(
        "--adapter-overlap",
        action="store_true",
        help="triton only: run shrink on a second stream beside the linear's own GEMM (not yet measured on a GPU)",
    )
    group.add_argument(
        "--adapter-decision-log",
        default=None,
        metavar="PATH",
        help="each TP rank writes its orders, loads and evictions to PATH.<rank>; all must be equal",
    )
    _add_scheduling_arguments(group)


def _add_scheduling_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--schedule-policy",
        default=AFFINITY,
        metavar="POLICY",
        help="order of the waiting queue: %(default)s (the default), or one of SGLang's",
    )
    group.add_argument(
        "--adapter-max-wait-steps",
        type=int,
        default=DEFAULTS.adapter_max_wait_steps,
        help=f"{AFFINITY}: steps for which a request may be overtaken (default: %(default)s)",
    )
    group.add_argument(
        "--adapter-weight",
        action="append",
        default=[],
        metavar="NAME=WEIGHT",
        help=f"{AFFINITY}: an adapter's share while others wait, of whom each has 1; may be repeated",
    )


def from_arguments(arguments: argparse.Namespace) -> Settings:
    """Settings from parsed flags. ``SystemExit`` with a message where a value cannot be."""
    root: Path | None = arguments.adapter_root
    if root is not None and not root.is_dir():
        raise SystemExit(f"--adapter-root {root} is not a folder")
    for folder in arguments.adapter_dir:
        if not folder.is_dir():
            raise SystemExit(f"--adapter-dir {folder} is not a folder")
        if root is not None and not folder.resolve().is_relative_to(root.resolve()):
            raise SystemExit(
                f"--adapter-dir {folder} is not below --adapter-root {root}: nothing in it could be loaded"
            )
    megabytes: int | None = arguments.adapter_memory_mb
    if megabytes is not None and arguments.adapter_memory != "static":
        raise SystemExit(
            "--adapter-memory-mb is the size of --adapter-memory static: add that flag, or drop this one (unified "
            "memory is the KV cache's own, sized by --mem-fraction-static or --max-total-tokens)"
        )
    if megabytes is not None and megabytes < 1:
        raise SystemExit(f"--adapter-memory-mb {megabytes} must be at least 1")
    if not 0 < arguments.adapter_read_timeout < float("inf"):
        raise SystemExit(f"--adapter-read-timeout {arguments.adapter_read_timeout} must be above 0")
    if arguments.adapter_max_wait_steps < 1:
        raise SystemExit(f"--adapter-max-wait-steps {arguments.adapter_max_wait_steps} must be at least 1")
    if not 0 <= arguments.adapter_host_memory_gb < float("inf"):
        raise SystemExit(f"--adapter-host-memory-gb {arguments.adapter_host_memory_gb} must be 0 or more")
    return Settings(
        adapter_memory=arguments.adapter_memory,
        adapter_memory_mb=DEFAULTS.adapter_memory_mb if megabytes is None else megabytes,
        adapter_host_memory_gb=arguments.adapter_host_memory_gb,
        adapter_root=str(root.resolve()) if root else None,
        adapter_read_timeout_s=arguments.adapter_read_timeout,
        adapter_kernels=arguments.adapter_kernels,
        adapter_overlap=arguments.adapter_overlap,
        decision_log=arguments.adapter_decision_log,
        adapter_eviction=arguments.adapter_eviction,
        adapter_affinity=arguments.schedule_policy == AFFINITY,
        adapter_max_wait_steps=arguments.adapter_max_wait_steps,
        adapter_weights=_weights(arguments.adapter_weight),
        adapter_dirs=tuple(str(folder.resolve()) for folder in arguments.adapter_dir),
        route_by_adapter=arguments.load_balance_method == AFFINITY,
        adapter_loading_without_key=arguments.adapter_loading_without_key,
    )


def _weights(texts: Sequence[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < float("inf") or name in weights:
            raise SystemExit(f"--adapter-weight {text}: expected NAME=WEIGHT, a positive number, once for each name")
        weights[name] = weight
    return weights
