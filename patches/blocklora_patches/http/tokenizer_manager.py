"""SGLang's tokenizer manager with many adapters: all requests, loads and unloads of every way in lead through it.

It stands for SGLang's class where that is made (``entrypoints/engine.py``), in place of a hook for each method. What a
method does is in the file that it calls.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from sglang.srt.entrypoints.openai.protocol import DEFAULT_MODEL_NAME
from sglang.srt.managers.io_struct import ContinueGenerationReqInput, LoRAUpdateOutput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_lora, get_parallel
from sglang.utils import TypeBasedDispatcher
from sglang_blocklora.naming.model_names import known_adapters, reason_not_to_name
from sglang_blocklora.requests.values import BadRequest
from sglang_blocklora.settings import Settings

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http import (
    aborts,
    activation,
    door,
    load_on_use,
    metrics,
    permission,
    quotas,
    replicas,
    tensors,
    versions,
)
from blocklora_patches.http.adapters import Adapters, NotLoaded
from blocklora_patches.http.registry import AdapterRegistry
from blocklora_patches.http.updates import AdapterUpdates


class AdapterTokenizerManager(TokenizerManager):
    """What is overridden of SGLang's, and why.

    blocklora_adapters  what happens to adapters
    blocklora_updates   the way of loads and unloads to the schedulers
    """

    def init_lora(self) -> None:
        """Names of ``--lora-paths`` that no request could reach are refused."""
        super().init_lora()
        self.lora_registry = AdapterRegistry(get_lora().lora_paths)
        self.blocklora_adapters = Adapters(self)
        for name in self.lora_ref_cache:
            problem = reason_not_to_name(name, self.served_model_name, DEFAULT_MODEL_NAME)
            if problem is not None:
                raise ValueError(f"--lora-paths: {problem}")

    def init_communicators(self) -> None:
        """Upstream sends one adapter update at a time, so a slow load holds up all others, and takes a late answer for
        the next one's."""
        super().init_communicators()
        updates = AdapterUpdates(self._dispatch_to_scheduler, get_parallel().dp_size)
        self.blocklora_updates = updates
        dispatcher = TypeBasedDispatcher([(LoRAUpdateOutput, updates.handle_recv)])
        dispatcher += self._result_dispatcher  # which adds what is not there yet
        self._result_dispatcher = dispatcher

    # Requests, in the order in which one passes these.

    async def generate_request(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        """Upstream sends a scheduler whatever clients write, and drops a route's adapter on the way."""
        state = getattr(request, "state", None)
        if hasattr(state, "blocklora_adapter"):  # of the route's model (model_names.py)
            obj.lora_path = state.blocklora_adapter
        obj.is_single = True  # read when a stream has ended, also one that is refused here
        obj.blocklora_client = request
        aborts.note(obj)
        door.check_as_written(obj)
        try:
            with quotas.charged(obj):
                async with aclosing(super().generate_request(obj, request)) as answers:
                    async for answer in answers:
                        yield answer
        except door.NO_SHAPE as error:
            if door.is_normalized(obj):
                raise
            raise BadRequest(
                f"The prompts of the request and what goes with them have no shape that fits: {error}"
            ) from error

    def _init_req_state(self, obj: Any, request: Any = None) -> None:
        """A batch is refused before any part of it runs."""
        if not hasattr(obj, "is_single"):  # one part of a request, which has been here as a whole
            aborts.check(obj)
            super()._init_req_state(obj, request)
            return
        door.check_normalized(obj, self.model_config)
        aborts.mark(obj)
        load_on_use.refuse_others(self, obj.lora_path if isinstance(obj.lora_path, list) else [obj.lora_path])
        quotas.begin(obj)
        super()._init_req_state(obj, request)

    async def _handle_batch_request(self, obj: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Upstream has made a state for each of n answers, which nothing removes, and makes others for them later."""
        for rid in obj.rid[obj.batch_size :]:
            self.rid_to_state.pop(rid, None)
        async with aclosing(super()._handle_batch_request(obj, *args, **kwargs)) as answers:
            with self.blocklora_adapters.requests.batch(obj):  # all are asked for before the first one comes
                answer = await anext(answers, None)
            while answer is not None:
                yield answer
                answer = await anext(answers, None)

    async def _resolve_lora_path(self, obj: Any) -> None:
        """Upstream loads what it knew once, as often as requests ask at the same time, and nothing else."""
        names = load_on_use.names_of(obj)
        with self.blocklora_adapters.wanted(names):
            await load_on_use.load_missing(self, names)
            # Without a pause in which one could go again, upstream takes the ids down.
            await super()._resolve_lora_path(obj)

    async def _validate_and_resolve_lora(self, obj: Any) -> None:
        """Upstream's requests take whatever has the adapter's name."""
        await super()._validate_and_resolve_lora(obj)
        ids = obj.lora_id if isinstance(obj.lora_id, list) else [obj.lora_id]
        hashes = await self.blocklora_adapters.hashes_of(ids)
        if obj.blocklora_client is not None:
            versions.decided(obj.blocklora_client, hashes)

    def _wait_one_response(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        """Upstream's answers do not tell which contents of an adapter gave them."""
        answers = super()._wait_one_response(obj, request)
        content_hash = self.blocklora_adapters.hash_of(obj.lora_id)
        return answers if content_hash is None else versions.told(answers, content_hash)

    def _create_tokenized_object(self, obj: Any, input_text: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """A value of another type than the scheduler declares is found out in the middle of everybody's batch."""
        aborts.check(obj)
        door.check_tokenized(obj, input_ids, self.model_config.vocab_size)
        make = functools.partial(super()._create_tokenized_object, obj, input_text, input_ids, *args, **kwargs)
        made = door.checked_types(make)
        prompt = input_ids if input_ids is not None else obj.input_embeds
        quotas.charge_prompt(obj, prompt, made.sampling_params.max_new_tokens, self.context_len)
        return made

    async def score_request(self, *args: Any, **kwargs: Any) -> Any:
        """A score is asked for by other names than those of the request that it becomes."""
        score = super().score_request
        door.check_score(inspect.signature(score).bind(*args, **kwargs).arguments, self.model_config.vocab_size)
        return await score(*args, **kwargs)

    async def _send_one_request(self, tokenized_obj: Any) -> None:
        """Upstream chooses replicas without a look at adapters."""
        replicas.choose(self, [tokenized_obj])
        await super()._send_one_request(tokenized_obj)

    async def _send_batch_request(self, tokenized_objs: Sequence[Any]) -> None:
        """As ``_send_one_request``."""
        replicas.choose(self, tokenized_objs)
        await super()._send_batch_request(tokenized_objs)

    async def _handle_batch_output(self, recv_obj: Any) -> None:
        """Upstream tells nobody what requests generate whose clients ask for no metrics or are gone."""
        quotas.charge_generated(self.rid_to_state, recv_obj)
        await super()._handle_batch_output(recv_obj)

    def collect_metrics(self, state: Any, recv_obj: Any, i: int) -> None:
        """Upstream's series do not tell adapters apart."""
        metrics.count(self, state, recv_obj, i)
        super().collect_metrics(state, recv_obj, i)

    def update_request_meta_info(
        self, meta_info: dict[str, Any], state: Any, customized_info: Any, index: int, finish_reason: Any
    ) -> None:
        """Upstream makes lists of a value for each token."""
        rest = activation.tell(meta_info, state, customized_info, index)
        super().update_request_meta_info(meta_info, state, rest, index, finish_reason)

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """Upstream knows the parts of a request by ids of their own only."""
        if abort_all or not rid:
            super().abort_request(rid, abort_all)
            return
        for part in aborts.end(rid, self.rid_to_state):
            super().abort_request(part)

    async def pause_generation(self, obj: Any) -> None:
        """Upstream waits for the requests that it aborts, also while schedulers are paused and end none, and holds what
        a continue needs meanwhile."""
        if obj.mode == "abort" and self.is_pause:
            async with self.is_pause_cond:
                await self._async_dispatch_to_scheduler(ContinueGenerationReqInput())
        await super().pause_generation(obj)

    # Adapters.

    async def load_lora_adapter(self, obj: Any, request: Any = None) -> LoRAUpdateOutput:
        """Upstream loads one adapter at a time, takes any name, refuses replicas, and waits for the requests of what
        ``--max-loaded-loras`` puts out."""
        self.auto_create_handle_loop()
        path = await permission.allowed_path(request, obj.lora_path)
        return await self.blocklora_adapters.load(obj.lora_name, path, bool(obj.pinned))

    async def load_lora_adapter_from_tensors(self, obj: Any, request: Any = None) -> LoRAUpdateOutput:
        """Upstream gives every TP rank all tensors, out of a pickle, and cannot read them again once they went."""
        self.auto_create_handle_loop()
        permission.check_bringing(request)
        try:
            weights = tensors.from_upstream(obj, trusted=request is None)
        except tensors.NotTaken as error:
            return LoRAUpdateOutput(success=False, error_message=str(error))
        return await tensors.load(self.blocklora_adapters, weights)

    async def unload_lora_adapter(self, obj: Any, request: Any = None) -> LoRAUpdateOutput:
        """Upstream holds up every other load and unload until the last request of the adapter has ended, loads it again
        when a request names it, and refuses replicas."""
        self.auto_create_handle_loop()
        permission.check(request)
        try:
            return await self.blocklora_adapters.unload(obj.lora_name)
        except NotLoaded:
            known = known_adapters(self.blocklora_adapters.loaded, ())
            return LoRAUpdateOutput(
                success=False, error_message=f"The adapter '{obj.lora_name}' is not loaded. {known}"
            )


def _launch_subprocesses(cls: Any, *args: Any, **kwargs: Any) -> None:
    if Settings.from_environment() is None:
        raise RuntimeError(
            "An engine of sglang-blocklora was started in this process, which cannot run a stock one since. Start it "
            "with sglang_blocklora.frontend.engine(...), or in another process."
        )


_ENGINE = "sglang.srt.entrypoints.engine"
HOOKS = (
    # By this name, and not where the class is defined: other plugins may hook what is not overridden of it.
    Hook(
        f"{_ENGINE}.TokenizerManager",
        AdapterTokenizerManager,
        HookType.REPLACE,
        process=Process.HTTP,
        why="Servers, runtimes and engines have our tokenizer manager; each method says why.",
        retire_when="SGLang asks plugins for the class of the tokenizer manager",
    ),
    Hook(
        f"{_ENGINE}.Engine._launch_subprocesses",
        _launch_subprocesses,
        HookType.BEFORE,
        process=Process.HTTP,
        why="A stock engine would have our half of the HTTP process and SGLang's half of the scheduler.",
        retire_when="hooks can be taken back",
    ),
)
