"""Loads, unloads and pins adapters in the HTTP process, on its event loop, without one holding up another.

An adapter is its ``lora_id``. Its name is there from the moment that every replica has loaded it to the moment that
somebody unloads it or ``--max-loaded-loras`` puts it out. Then the name is free at once: requests that have the adapter
finish with it, and after the last one the schedulers drop it. An update of a name is a load beside it and one
assignment: from then on requests find the new adapter, and the old one goes as if it were unloaded. Loads, updates,
pins and unloads of one name happen one after another in the order of asking; those of other names do not wait for them.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
from sglang.srt.entrypoints.openai.protocol import DEFAULT_MODEL_NAME
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import (
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    SetInternalStateReq,
    UnloadLoRAAdapterReqInput,
)
from sglang.srt.runtime_context import get_lora
from sglang_blocklora.adapters.content_hash import version
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.spool import Incoming, Spool
from sglang_blocklora.naming.folders import is_unicode
from sglang_blocklora.naming.model_names import reason_not_to_name
from sglang_blocklora.naming.single_flight import SingleFlight
from sglang_blocklora.naming.turns import Tasks, Turns
from sglang_blocklora.settings import DEFAULTS, Settings
from sglang_blocklora.sources.cache import FolderCache
from sglang_blocklora.sources.downloads import Downloads
from sglang_blocklora.sources.urls import BadURL, located

from blocklora_patches.http.facts import facts_of
from blocklora_patches.http.registry import POLL_SECONDS, RequestsInFlight
from blocklora_patches.scheduler.control import PIN

logger = logging.getLogger(__name__)

# Names whose last error is kept; those of adapters that were repaired or unloaded go earlier.
KEPT_ERRORS = 1000


class NotLoaded(LookupError):
    """No adapter of that name is loaded."""


class PinRefused(ValueError):
    """The schedulers do not pin this adapter as well."""


class Adapters:
    """What happens to the adapters of one tokenizer manager.

    errors    name -> what last went wrong with an adapter of that name
    on_use    the loads that requests wait for, one for all that name the same adapter
    draining  lora_id -> adapter whose name is gone, or another's, and that requests may still have
    spool     folders of those that came as tensors
    downloads folders of those that came from a URL
    """

    def __init__(self, tokenizer_manager: Any) -> None:
        self.errors: dict[str, str] = {}
        self.on_use = SingleFlight()
        self._manager = tokenizer_manager
        self.requests = RequestsInFlight(tokenizer_manager)
        self._wanted: Counter[str] = Counter()
        self._turns = Turns()
        self._tasks = Tasks()
        self.draining: dict[str, LoRARef] = {}
        self._hashes: dict[str, str] = {}  # lora_id -> content hash
        # Content hashes of --lora-paths are the schedulers' to tell.
        self._asking = SingleFlight()
        self._untold = {ref.lora_id for ref in self.loaded.values()}
        settings = Settings.active() or DEFAULTS
        where = settings.adapter_spool_dir
        self.spool = Spool(Path(where) if where else None, int(settings.adapter_spool_gb * 2**30))
        self.downloads = Downloads(FolderCache(settings.adapter_cache, int(settings.adapter_cache_gb * 2**30)))

    @property
    def loaded(self) -> Mapping[str, LoRARef]:
        """Those that a request finds by name, least recently used first, as they are at each look."""
        return MappingProxyType(self._manager.lora_registry._registry)

    async def hashes_of(self, lora_ids: Collection[str | None]) -> list[str | None]:
        """Content hash of each adapter that is loaded, None for the base model's requests."""
        if not self._untold.isdisjoint(lora_ids):
            await self._asking.run("hashes", self._ask_for_hashes)
        return [self.hash_of(lora_id) for lora_id in lora_ids]

    async def _ask_for_hashes(self) -> None:
        told = await facts_of(self._manager).now()
        known = {one.lora_id: one.content_hash for one in told.adapters if one.lora_id in self._untold}
        self._hashes.update(known)
        self._untold.clear()

    def hash_of(self, lora_id: str | None) -> str | None:
        """``hashes_of`` one whose hash was asked for or told before."""
        return None if lora_id is None else self._hashes.get(lora_id)

    def version_of_name(self, name: str) -> str | None:
        """The version that a request would be answered by now, where it is known."""
        content_hash = self.hash_of(self.loaded[name].lora_id) if name in self.loaded else None
        return content_hash and version(content_hash)

    async def load(
        self, name: str, path: str, pinned: bool = False, *, found_by_name: bool = False, update: bool = False
    ) -> Any:
        """Load an adapter on every replica or on none; SGLang's answer.

        found_by_name  a request that names it after ``--max-loaded-loras`` put it out finds its path anew; one that is
                       not found so is remembered
        update         take the place of the adapter that has the name, if one has
        pinned         pin it too, also where it is the one that has the name already; a pin that is there stays
        """
        return await asyncio.shield(self._tasks.start(self._load(name, path, pinned, found_by_name, update)))

    async def load_received(self, name: str, received: Incoming, config: Any, pinned: bool, update: bool) -> Any:
        """As ``load``, of an adapter whose weights have come. Raises what ``Incoming.finish`` does."""
        return await asyncio.shield(self._tasks.start(self._load_received(name, received, config, pinned, update)))

    async def _load_received(self, name: str, received: Incoming, config: Any, pinned: bool, update: bool) -> Any:
        path = str(await asyncio.to_thread(received.finish, config))
        try:
            return await self._load(name, path, pinned, False, update)
        finally:
            self.spool.release(path)
            self._sweep()

    async def _load(self, name: str, path: str, pinned: bool, found_by_name: bool, update: bool) -> LoRAUpdateOutput:
        async with self._turns.of(name):
            with self.wanted([name] if update else ()):
                return await self._load_in_turn(name, path, pinned, found_by_name, update)

    async def _load_in_turn(self, name: str, path: str, pinned: bool, found_by_name: bool, update: bool) -> Any:
        old = self.loaded.get(name) if update else None
        refusal = self._reason_not_to_load(name, path, old)
        if refusal is None:
            ref = LoRARef(lora_name=name, lora_path=path, pinned=pinned and old is None)
            if old is not None and old.lora_path == path and path in self.spool:  # the very same bytes
                ref, refusal = old, await self._keep(old, pinned)
            else:
                refusal = await self._load_on_replicas(ref)
                if refusal is None and old is not None:
                    ref, refusal = await self._prepare_switch(old, ref, pinned)
        if refusal is not None:
            logger.info("%s", refusal)
            if found_by_name or name in self._manager.lora_ref_cache:
                self._keep_error(name, refusal)
            return LoRAUpdateOutput(success=False, error_message=refusal, loaded_adapters=self._paths())
        if ref is not old:
            if name in self.loaded:
                self._take_name(self.loaded[name])
            self._manager.lora_registry.add(ref)  # nothing is awaited since the old one went
            if not found_by_name:
                self._manager.lora_ref_cache[name] = ref
        self.errors.pop(name, None)
        self._make_room_beside(ref)
        return LoRAUpdateOutput(success=True, loaded_adapters=self._paths())

    async def _prepare_switch(self, old: LoRARef, new: LoRARef, pinned: bool) -> tuple[LoRARef, str | None]:
        """Whom requests shall find by the name: the new adapter with the old one's pin, or the old one where both are
        the same; or why the new one is taken away again.
        """
        refusal = None
        if old.lora_id in self._untold:
            await self.hashes_of([old.lora_id])
        if self.hash_of(old.lora_id) == self.hash_of(new.lora_id) is not None:
            await self._unload_on_replicas(new)
            return old, await self._keep(old, pinned)
        if pinned or old.pinned:
            if old.pinned:  # both together may be more than may be pinned
                await self._set_pinned(old, False)
            if await self._set_pinned(new, True):
                return msgspec.structs.replace(new, pinned=True), None
            refusal = _too_many_pinned(old.lora_name)
            await self._unload_on_replicas(new)
            if old.pinned:
                await self._set_pinned(old, True)
        return new, refusal

    async def _keep(self, ref: LoRARef, pinned: bool) -> str | None:
        """The same bytes came again: pin the adapter where that is asked for; None, or why it is not pinned."""
        if pinned and not ref.pinned:
            try:
                await self._pin_ref(ref, True)
            except PinRefused:
                return _too_many_pinned(ref.lora_name)
        return None

    def reason_not_to_name(self, name: str) -> str | None:
        """Why no adapter can be called ``name``, or None."""
        return reason_not_to_name(name, self._manager.served_model_name, DEFAULT_MODEL_NAME)

    def _reason_not_to_load(self, name: str, path: str, old: LoRARef | None) -> str | None:
        problem = self.reason_not_to_name(name)
        if problem is not None:
            return problem
        if not path or "\0" in path or not is_unicode(path):
            return f"adapter {name!r}: {path!a} is no path. Give the adapter's folder."
        try:
            located(path)
        except BadURL as error:
            return f"adapter {name!r}: {error}. Give the URL of the adapter's folder."
        loaded = self.loaded
        if old is not None:
            return None
        if name in loaded:
            return (
                f"adapter {name!r}: a name that is already loaded. Update it (load_inplace), unload it first, or pick "
                "another."
            )
        limit = get_lora().max_loaded_loras
        if limit is not None and sum(bool(ref.pinned) for ref in loaded.values()) >= limit:
            return f"adapter {name!r}: all {limit} adapters of --max-loaded-loras are pinned. Unpin or unload one."
        return None

    async def _load_on_replicas(self, ref: LoRARef) -> str | None:
        """None, or why it is loaded nowhere."""
        logger.info("adapter %r: loading it from %s", ref.lora_name, ref.lora_path)
        try:
            folder = await self.downloads.folder(ref.lora_name, ref.lora_id, ref.lora_path)
        except AdapterError as error:
            return str(error)
        asked = LoadLoRAAdapterReqInput(
            lora_name=ref.lora_name, lora_path=folder, pinned=ref.pinned, lora_id=ref.lora_id
        )
        answers = await self._manager.blocklora_updates(asked)
        refusals = [answer.error_message for answer in answers if not answer.success]
        if 0 < len(refusals) < len(answers):
            await self._unload_on_replicas(ref)
        if refusals:
            self.downloads.release(ref.lora_id)
            return refusals[0]
        self._hashes.update(answers[0].loaded_adapters or {})
        return None

    async def _unload_on_replicas(self, ref: LoRARef) -> str | None:
        """None, or what the schedulers say against it."""
        asked = UnloadLoRAAdapterReqInput(lora_name=ref.lora_name, lora_id=ref.lora_id)
        answers = await self._manager.blocklora_updates(asked)
        self._hashes.pop(ref.lora_id, None)
        self.downloads.release(ref.lora_id)
        return next((answer.error_message for answer in answers if not answer.success), None)

    async def unload(self, name: str) -> LoRAUpdateOutput:
        """Take an adapter's name away at once; SGLang's answer when its last request has ended and it is dropped.

        A download of it is stopped. Under ``/pause_generation`` requests do not end: if it has any, the answer comes at
        once. Raises ``NotLoaded``.
        """
        stopped = self.downloads.cancel(name)
        unloading = await asyncio.shield(self._tasks.start(self._forget(name, stopped)))
        refusal = None if unloading is None else await self._dropped(*unloading)
        return LoRAUpdateOutput(success=refusal is None, error_message=refusal, loaded_adapters=self._paths())

    async def _forget(self, name: str, stopped: bool) -> tuple[LoRARef, asyncio.Task[str | None]] | None:
        """Take the name away; None where it had none yet, or ``--max-loaded-loras`` put the adapter out."""
        async with self._turns.of(name):
            remembered = self._manager.lora_ref_cache.pop(name, None)
            self.errors.pop(name, None)
            ref = self.loaded.get(name)
            self._sweep()
            if ref is not None:
                return ref, self._take_name(ref)
            if remembered is None and not stopped:
                raise NotLoaded(name)
            return None

    async def _dropped(self, ref: LoRARef, drop: asyncio.Task[str | None]) -> str | None:
        """The outcome of ``drop``; None where it waits for requests that are paused."""
        while not drop.done():
            if self._manager.is_pause and ref.lora_id in self.requests.adapters():
                return None
            await asyncio.wait({drop}, timeout=POLL_SECONDS)
        return drop.result()

    def _take_name(self, ref: LoRARef) -> asyncio.Task[str | None]:
        """From now on no request finds the adapter; the task ends when the schedulers have dropped it."""
        self._manager.lora_registry.remove(ref)
        self.draining[ref.lora_id] = ref
        logger.info("adapter %r: unloading it after its last request", ref.lora_name)
        return self._tasks.start(self._drop(ref))

    async def _drop(self, ref: LoRARef) -> str | None:
        """None, or what the schedulers say against it."""
        if ref.pinned:
            await self._set_pinned(ref, False)
        await self.requests.ended(ref.lora_id)
        refusal = await self._unload_on_replicas(ref)
        if refusal is not None:
            logger.error("adapter %r (%s) was not unloaded: %s", ref.lora_name, ref.lora_id, refusal)
        del self.draining[ref.lora_id]
        self._sweep()
        return refusal

    def _sweep(self) -> None:
        """Remove the folders of adapters that came as tensors and that nothing can name or have any more."""
        refs = [*self.loaded.values(), *self._manager.lora_ref_cache.values(), *self.draining.values()]
        for folder in self.spool.keep_only({ref.lora_path for ref in refs}):
            self._tasks.start(asyncio.to_thread(shutil.rmtree, folder))

    def _make_room_beside(self, newcomer: LoRARef | None = None) -> None:
        """Put out the least recently used of those above ``--max-loaded-loras``, but none that a request waits for."""
        limit = get_lora().max_loaded_loras
        loaded = self.loaded
        excess = len(loaded) - limit if limit is not None else 0
        idle = [ref for ref in loaded.values() if not ref.pinned and not self._wanted[ref.lora_name]]
        for ref in [ref for ref in idle if ref is not newcomer][: max(0, excess)]:
            self._take_name(ref)

    @contextmanager
    def wanted(self, names: Collection[str]) -> Iterator[None]:
        """Inside the block ``--max-loaded-loras`` puts none of ``names`` out; meanwhile more may be loaded."""
        self._wanted.update(names)
        try:
            yield
        finally:
            self._wanted.subtract(names)
            self._wanted = +self._wanted
            self._make_room_beside()

    async def set_pinned(self, name: str, pinned: bool) -> None:
        """Pin an adapter on every replica or on none, or unpin it. Raises ``NotLoaded`` and ``PinRefused``."""
        await asyncio.shield(self._tasks.start(self._pin(name, pinned)))

    async def _pin(self, name: str, pinned: bool) -> None:
        async with self._turns.of(name):
            ref = self.loaded.get(name)
            if ref is None:
                raise NotLoaded(name)
            await self._pin_ref(ref, pinned)

    async def _pin_ref(self, ref: LoRARef, pinned: bool) -> None:
        name = ref.lora_name
        if not await self._set_pinned(ref, pinned):
            await self._set_pinned(ref, False)
            raise PinRefused(name)
        if self.loaded.get(name) is not ref:  # put out meanwhile
            raise NotLoaded(name)
        new = msgspec.structs.replace(ref, pinned=pinned)
        self._manager.lora_registry._registry[name] = new
        if name in self._manager.lora_ref_cache:
            self._manager.lora_ref_cache[name] = new
        self._make_room_beside()  # an unpinned one may have to go

    async def _set_pinned(self, ref: LoRARef, pinned: bool) -> bool:
        """Whether every replica did."""
        request = SetInternalStateReq(server_args={f"{PIN}{ref.lora_id}": int(pinned)})
        return all(await self._manager.set_internal_state(request))

    def _paths(self) -> dict[str, str | None]:
        return {name: ref.lora_path for name, ref in self.loaded.items()}

    def _keep_error(self, name: str, message: str) -> None:
        self.errors.pop(name, None)
        self.errors[name] = message
        if len(self.errors) > KEPT_ERRORS:
            del self.errors[next(iter(self.errors))]


def _too_many_pinned(name: str) -> str:
    return f"adapter {name!r}: it needs more slots than may be pinned. Unpin it or others first."


def adapters_of(tokenizer_manager: Any) -> Adapters:
    """The one ``Adapters`` of a tokenizer manager."""
    return tokenizer_manager.blocklora_adapters
