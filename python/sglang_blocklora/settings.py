"""Describes the launcher's flags of ours, and carries their values to all processes in one environment variable."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from sglang_blocklora.adapters.spooled import spooled_hash
from sglang_blocklora.flags import Flag, check, folder, share
from sglang_blocklora.memory.eviction import DEFAULT_STRATEGY, STRATEGIES
from sglang_blocklora.naming.folders import AdapterFolders
from sglang_blocklora.sources.cache import is_cached
from sglang_blocklora.sources.urls import is_below, is_url, place
from sglang_blocklora.tenancy.file import tenants_file

# Set by our launcher only: its absence is what keeps an installed but unused extension out of stock SGLang.
SETTINGS_VARIABLE = "SGLANG_BLOCKLORA_SETTINGS"
# "0" keeps the extension off, whoever launched the server.
SWITCH_VARIABLE = "SGLANG_BLOCKLORA"
# Our value of --schedule-policy and --load-balance-method. SGLang takes fixed lists there and is left at its defaults.
AFFINITY = "adapter-affinity"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launcher was asked for, alike in every process of its server. Each field is set by the flag it names.

    ``ValueError`` naming the flags whose values cannot be.
    """

    adapter_memory: Annotated[
        Literal["auto", "unified", "static"],
        Flag(
            help="where adapters live. unified: in the KV cache's slots, each a prefix of its KV; static: in an arena "
            "of their own; auto: unified, or static where the model or a flag rules that out (a warning says why)"
        ),
    ] = "auto"
    adapter_memory_mb: Annotated[
        int,
        Flag(
            help="static memory: MiB of the arena, per TP rank; loaded adapters beyond it take turns",
            at_least=1,
            only=("adapter_memory", "static"),
        ),
    ] = 1024
    adapter_eviction: Annotated[
        str,
        Flag(
            help="which idle adapters stay when others, or unified memory's cached KV, give way (docs/memory.md)",
            choices=tuple(STRATEGIES),
        ),
    ] = DEFAULT_STRATEGY
    adapter_host_memory_gb: Annotated[
        float,
        Flag(
            help="GiB of host memory, per TP rank, for loaded adapters; what is beyond it is read from disk again",
            at_least=0,
        ),
    ] = 8.0
    adapter_read_timeout_s: Annotated[
        float,
        Flag(
            help="time after which a read of an adapter's files is given up; other requests go on meanwhile",
            name="--adapter-read-timeout",
            metavar="SECONDS",
            above=0,
        ),
    ] = 120.0
    adapter_roots: Annotated[
        tuple[str, ...],
        Flag(
            help="load adapters only from below this folder, symbolic links followed, or this URL (docs/sources.md)",
            name="--adapter-root",
            metavar="DIR",
            parse=place,
            told="any folder, URLs of --adapter-dir",
        ),
    ] = ()
    adapter_loading_without_key: Annotated[
        bool,
        Flag(
            help="whoever reaches the server may load, unload and pin adapters; otherwise one that listens beyond this "
            "machine needs --admin-api-key, --api-key, --adapter-root or --adapter-dir for that (docs/api.md)"
        ),
    ] = False
    adapter_dirs: Annotated[
        tuple[str, ...],
        Flag(
            help="an adapter that is not loaded is loaded from the folder of its name in here when a request names it; "
            "s3://, gs://, hf://, https:// and others too (docs/sources.md)",
            name="--adapter-dir",
            metavar="DIR",
            parse=place,
            told="none",
        ),
    ] = ()
    adapter_spool_dir: Annotated[
        str | None,
        Flag(
            help="where adapters that come as tensors are kept while they are loaded, in a folder of the server's own "
            "(docs/rollouts.md); with several nodes all of them must reach it",
            metavar="DIR",
            parse=folder,
            told="/dev/shm where there is room, else a temporary folder",
        ),
    ] = None
    adapter_spool_gb: Annotated[float, Flag(help="GiB that they may take together", above=0)] = 8.0
    adapter_cache_dir: Annotated[
        str | None,
        Flag(
            help="where adapters that were fetched from URLs are kept; with several nodes all of them must reach it",
            metavar="DIR",
            parse=folder,
            told="sglang-blocklora in $XDG_CACHE_HOME or ~/.cache",
        ),
    ] = None
    adapter_cache_gb: Annotated[float, Flag(help="GiB that they may take together", above=0)] = 32.0
    adapter_trust_pickle: Annotated[
        bool,
        Flag(
            help="read tensors over HTTP in SGLang's serialised form too, which is a pickle: it can run code in the "
            "server, and a client that may load adapters may send it"
        ),
    ] = False
    tenants: Annotated[
        str | None,
        Flag(
            help="a .toml or .json file of tenants: their keys, adapters and limits (docs/tenancy.md); needs --api-key",
            metavar="FILE",
            parse=tenants_file,
            told="whoever may generate may use all adapters",
        ),
    ] = None
    load_balance_method: Annotated[
        str,
        Flag(
            help=f"with --dp-size: {AFFINITY} sends an adapter's requests to one replica unless that has more than its "
            "share; or one of SGLang's methods (docs/data_parallel.md)",
            metavar="METHOD",
        ),
    ] = AFFINITY
    adapter_kernels: Annotated[
        Literal["auto", "torch", "triton"],
        Flag(help="who computes the adapters' part; auto: triton on a GPU, torch elsewhere"),
    ] = "auto"
    adapter_overlap: Annotated[
        Literal["off", "stream", "launch"],
        Flag(
            help="triton: shrink on a second stream, beside the linear's own product, or expand launched while shrink "
            "ends (neither measured on a GPU yet)"
        ),
    ] = "off"
    schedule_policy: Annotated[
        str,
        Flag(
            help=f"order of the waiting queue. {AFFINITY}: what is cached and resident first, nobody starves "
            "(docs/scheduler.md); or one of SGLang's",
            metavar="POLICY",
        ),
    ] = AFFINITY
    adapter_max_wait_steps: Annotated[
        int, Flag(help=f"{AFFINITY}: scheduler steps for which a request may be overtaken", at_least=1)
    ] = 128
    adapter_round_chunks: Annotated[
        int,
        Flag(help=f"{AFFINITY}: prefill chunks that an adapter may take before others have their turn", at_least=1),
    ] = 4
    adapter_weights: Annotated[
        dict[str, float],
        Flag(
            help=f"{AFFINITY}: an adapter's share while others wait",
            name="--adapter-weight",
            metavar="NAME=WEIGHT",
            parse=share,
            told="1 each",
        ),
    ] = {}  # msgspec copies it for each object
    decision_log: Annotated[
        str | None,
        Flag(
            help="each TP rank writes its orders, loads and evictions to PATH.<rank>; all must be equal",
            name="--adapter-decision-log",
            metavar="PATH",
            told="off",
        ),
    ] = None
    accept_unknown_sglang: Annotated[
        bool,
        Flag(
            help="run with an SGLang release that was never tested, if all that is used of it looks as in the last one "
            "that was (docs/releases.md)"
        ),
    ] = False

    def __post_init__(self) -> None:
        check(self)
        for directory in self.adapter_dirs:
            if self.adapter_roots and not _lies_below(directory, self.adapter_roots):
                raise ValueError(
                    f"--adapter-dir {directory} is not below --adapter-root {' or '.join(self.adapter_roots)}: "
                    "nothing in it could be loaded"
                )

    @property
    def adapter_affinity(self) -> bool:
        """Whether the order of the waiting queue is ours."""
        return self.schedule_policy == AFFINITY

    @property
    def route_by_adapter(self) -> bool:
        """Whether a request goes to the data parallel replica of its adapter."""
        return self.load_balance_method == AFFINITY

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
        return _folders(self.adapter_dirs)

    @property
    def adapter_urls(self) -> tuple[str, ...]:
        """The same of those that have to be fetched."""
        return tuple(filter(is_url, self.adapter_dirs))

    @property
    def adapter_cache(self) -> Path:
        """Where fetched adapters are kept, whether or not there is such a folder yet."""
        if self.adapter_cache_dir is not None:
            return Path(self.adapter_cache_dir)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-blocklora"

    def may_fetch(self, url: str) -> bool:
        """Whether a client may have the adapter at ``url`` fetched."""
        return is_below(url, self.adapter_roots or self.adapter_dirs)

    def root_of(self, path: str) -> str | None:
        """The folder that the adapter at ``path`` must not lead out of, links followed; None: it may lie anywhere."""
        if spooled_hash(Path(path)) is not None:
            return str(Path(path).parent)
        if is_cached(Path(path), self.adapter_cache):
            return str(self.adapter_cache.resolve())
        root = _folders(self.adapter_roots or self.adapter_dirs).root_of(path)
        if root is None and self.adapter_roots:
            return self.adapter_roots[0]
        return None if root is None else str(root)


def _folders(places: Sequence[str]) -> AdapterFolders:
    return AdapterFolders(tuple(Path(one) for one in places if not is_url(one)))


def _lies_below(directory: str, roots: Sequence[str]) -> bool:
    if is_url(directory):
        return is_below(directory, roots)
    return any(Path(directory).is_relative_to(root) for root in roots)


class SettingsNotUnderstood(ValueError):
    """The exported settings are not this version's."""


_kept: Settings | None = None  # of this process
DEFAULTS = Settings()
