"""Stands in for SGLang's manager of adapters (``lora/lora_manager.py``)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import LoRAUpdateOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.runner import get_capture_lora_variant, get_is_capture_mode
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_exec, get_flags, get_parallel, get_schedule
from sglang_blocklora.adapters.loading import Found, LocalShard, Report, merge, read_adapter
from sglang_blocklora.batch.delta_adder import DeltaAdder
from sglang_blocklora.batch.torch_adder import TorchAdder
from sglang_blocklora.batch.triton_adder import TritonAdder
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.eviction import STRATEGIES
from sglang_blocklora.memory.images import ImageStore
from sglang_blocklora.memory.loaded import LoadedAdapter
from sglang_blocklora.memory.pool import AdapterPool
from sglang_blocklora.memory.reads import Decision, LocalBoard, Reads, StoreBoard
from sglang_blocklora.memory.static_arena import StaticArena
from sglang_blocklora.memory.static_pool import StaticPool
from sglang_blocklora.memory.transfer import Transfer
from sglang_blocklora.memory.unified_pool import KVArena, UnifiedPool
from sglang_blocklora.requests.activation import runs
from sglang_blocklora.settings import Settings
from torch.distributed.distributed_c10d import _get_default_store

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.model.experts import AdaptedExpertsMethod, adaptable_experts
from blocklora_patches.model.grouped_experts import GroupedExpertsMethod
from blocklora_patches.model.linear import adapt_linear
from blocklora_patches.model.linears import adaptable_linears, build_spec, is_compared
from blocklora_patches.model.self_check import FirstPass, check_linears
from blocklora_patches.model.vocabulary import adapt_vocabulary, adaptable_vocabulary
from blocklora_patches.releases.current import release

logger = logging.getLogger(__name__)


def most_prefill_tokens() -> int:
    """Tokens of the largest prefill batch; without chunked prefill a single longer prompt goes beyond it."""
    chunk = get_schedule().chunked_prefill_size or 0
    return chunk if chunk > 0 else int(get_schedule().max_prefill_tokens)


class BlockLoRAManager(release.ManagerBase):
    """What the scheduler and the model runner call as SGLang's manager of adapters, over an ``AdapterPool``.

    One lives in each TP rank's process. Nothing of upstream's slot pool, backends or LoRA layers is used; its
    ``__init__`` is not called, because it builds them.
    """

    memory_pool = None  # upstream's gauges of its slot pool are left out
    _step: TritonAdder | TorchAdder | None = None  # until the arena exists

    def start(
        self,
        base_model: torch.nn.Module,
        base_hf_config: Any,
        max_loras_per_batch: int,
        dtype: torch.dtype,
        max_lora_rank: int | None,
        target_modules: Iterable[str] | None,
        lora_paths: list[LoRARef] | None,
    ) -> None:
        """What ``__init__`` does, whose parameters are the release's."""
        settings, tp_rank, tp_size = Settings.required(), get_parallel().tp_rank, get_parallel().tp_size
        self._max_rank = max_lora_rank or 256
        self._prefill_graph_tokens = 0  # of the largest prefill graph
        self.device = next(base_model.parameters()).device
        self.lora_refs: dict[str, LoRARef] = {}
        self._linears = linears = adaptable_linears(base_model)
        targets = set(target_modules or {"all"})
        self._first_pass: FirstPass | None = None
        self._unknown = None if is_compared(base_model) else base_model
        uses_triton = settings.uses_triton(self.device.type == "cuda")
        self._experts, no_experts = adaptable_experts(base_model, linears, uses_triton)
        config = base_hf_config.get_text_config()
        self._model = base_model
        self._vocabulary, no_vocabulary = adaptable_vocabulary(base_model, linears)
        spec = build_spec(linears, self._experts, self._vocabulary, config, targets, dtype, tp_rank, tp_size)
        self._spec = dataclasses.replace(spec, no_experts=no_experts, no_vocabulary=no_vocabulary)
        if self._unknown is not None:
            self._spec = check_linears(base_model, linears, self._spec)
            logger.info("%s was not compared with PEFT; its linears were checked", type(base_model).__name__)
        self.unified = settings.adapter_memory == "unified"
        self.decisions = DecisionLog(settings.decision_log, tp_rank)
        self._loading: dict[int, tuple[LoRARef, Any]] = {}  # number of a read -> whom it is for, and who asked
        self._unloaded: set[str] = set()  # lora_ids of those that were unloaded since
        board = StoreBoard(_get_default_store(), tp_rank, tp_size) if tp_size > 1 else LocalBoard()
        self.reads = Reads(tp_rank, board, settings.adapter_read_timeout_s)
        self.pool: AdapterPool
        images, transfer = self._image_store(settings), Transfer(self.device)
        if self.unified:
            self.pool = UnifiedPool(max_loras_per_batch, images, self.decisions, transfer)
        else:
            slots = settings.adapter_memory_mb * 2**20 // self.slot_bytes
            arena = StaticArena(len(linears), slots, self._spec.row_width, dtype, self.device)
            strategy = STRATEGIES[settings.adapter_eviction]()
            self.pool = StaticPool(arena, max_loras_per_batch, images, self.decisions, strategy, transfer)
            self._install_step(settings)
            logger.info("block-diagonal LoRA: %d MiB = %d slots", settings.adapter_memory_mb, slots)
        for ref in lora_paths or []:
            result = self._load_at_start(ref)
            if not result.success:
                raise ValueError(f"--lora-paths: {result.error_message}")

    def _image_store(self, settings: Settings) -> ImageStore:
        """Where images of adapters are that are not in use; ``self._read`` reads an adapter's part."""
        pinned = self.device.type == "cuda"

        def read(name: str, path: str, *, hash_contents: bool = True) -> Found:
            return read_adapter(
                name,
                path,
                self._spec,
                self._max_rank,
                settings.root_of(path),
                pin_memory=pinned,
                hash_contents=hash_contents,
            )

        self._read = read
        return ImageStore(
            int(settings.adapter_host_memory_gb * 2**30),
            self.slot_bytes,
            lambda adapter: self._read(adapter.name, adapter.path, hash_contents=False),
            self.reads,
            self.decisions,
            pinned=pinned,
        )

    def _install_step(self, settings: Settings) -> None:
        """Put the batch's deltas behind every linear; the arena exists."""
        if settings.uses_triton(self.device.type == "cuda"):
            triton = TritonAdder(
                self._spec,
                self.pool,
                self._max_rank,
                self.device,
                settings.adapter_overlap,
                most_prefill_tokens(),
                invariant=get_exec().deterministic.enable_deterministic_inference,
                choices=max((experts.top_k for experts in self._experts.values()), default=0),
            )
            if self.device.type == "cuda":
                triton.compile()
            own: TritonAdder | TorchAdder = triton
        else:
            own = TorchAdder(self._spec, self.pool)
        self._step = own
        if self._vocabulary is not None:
            adapt_vocabulary(self._model, self._vocabulary, own)
        step: DeltaAdder = own
        if self._unknown is not None:
            step = self._first_pass = FirstPass(step, self._unknown, self._linears)
        for layer, modules in enumerate(self._linears):
            for index, (_, module) in enumerate(modules):
                adapt_linear(module, step, layer, index)
        for layer, experts in self._experts.items():
            grouped = isinstance(self._step, TritonAdder)
            method = GroupedExpertsMethod if grouped else AdaptedExpertsMethod
            experts.quant_method = method(experts, self._step, layer)

    def bind_kv_pool(self, k_buffers: list[torch.Tensor], v_buffers: list[torch.Tensor], total_slots: int) -> None:
        """Unified memory: adapters live in these buffers, each [slots, KV heads, head dimension], one per layer."""
        settings = Settings.required()
        arena = KVArena(k_buffers, v_buffers)
        widths = {plane.shape[1] for layer in arena.planes for plane in layer}
        if widths != {self._spec.row_width}:
            raise ValueError(
                f"--adapter-memory unified does not support K and V rows of {sorted(widths)} elements (they must all "
                f"have {self._spec.row_width}). Use --adapter-memory static."
            )
        self.pool.bind_arena(arena, total_slots)
        self._install_step(settings)
        logger.info("block-diagonal LoRA: adapters share the KV pool's %d slots", total_slots)

    def begin_load(self, ref: LoRARef, request: Any) -> None:
        """Start to read an adapter. ``end_load`` gives ``request`` back, in the same step on every TP rank."""
        read = partial(self._read, ref.lora_name, ref.lora_path)
        self._loading[self.reads.start(ref.lora_name, ref.lora_path, read)] = (ref, request)

    def end_load(self, decision: Decision) -> tuple[Any, LoRAUpdateOutput] | None:
        """Take an adapter that all TP ranks have read, or refuse it on all of them; the request and what to answer.

        The answer's ``loaded_adapters`` is the content hash by ``lora_id``.
        None where the read was not a load's, but brought a loaded adapter's image back.
        """
        if self.pool.images.arrived(decision):
            return None
        (ref, request), local = self._loading.pop(decision.number), self.reads.finish(decision)
        if ref.lora_id in self._unloaded:
            self._unloaded.remove(ref.lora_id)
            return request, self._refuse(f"adapter {ref.lora_name!r} was unloaded while it was read")
        return request, self._take(ref, decision.report, local)

    def _load_at_start(self, ref: LoRARef) -> LoRAUpdateOutput:
        """Load while no request can be waiting: the ranks wait for each other."""
        if any(adapter.name == ref.lora_name for adapter in self.pool.loaded.values()):
            return self._refuse(f"adapter {ref.lora_name!r}: a name that is given twice")
        report, local = self._read(ref.lora_name, ref.lora_path)
        reports = [report] if self._spec.tp_size == 1 else get_parallel().tp_group.all_gather_object(report)
        return self._take(ref, merge(ref.lora_name, ref.lora_path, reports), local)

    def _take(self, ref: LoRARef, agreed: Report, local: LocalShard | None) -> LoRAUpdateOutput:
        name, pinned = ref.lora_name, bool(ref.pinned)
        if agreed.error is not None or local is None:
            return self._refuse(agreed.error or f"adapter {name!r}: nothing was read")
        if isinstance(self._step, TritonAdder) and (parts := self._step.not_captured(local.shard.parts)):
            return self._refuse(
                f"adapter {name!r}: found weights on {' and '.join(sorted(parts))}; expected none, since CUDA graphs "
                "were captured without such an adapter. Give one with --lora-paths, or start with --disable-cuda-graph."
            )
        if reason := self.pool.reason_not_to_add(agreed.slots, pinned):
            advice = "Start the server with a larger --adapter-memory-mb, or unload or unpin others."
            return self._refuse(f"adapter {name!r}: {reason}. {advice}")
        adapter = LoadedAdapter(
            name=name,
            path=ref.lora_path,
            shard=local.shard,
            slots=agreed.slots,
            pinned=pinned,
            content_hash=agreed.content_hash,
            image_digest=local.image_digest,
        )
        self.pool.add(ref.lora_id, adapter, local.image)
        self.lora_refs[ref.lora_id] = ref
        return LoRAUpdateOutput(success=True, loaded_adapters={ref.lora_id: agreed.content_hash})

    def _load_lora_adapter(self, lora_ref: LoRARef) -> LoRAUpdateOutput:
        """Upstream's load waits for the files; ``scheduler.adapter_updates`` calls ``begin_load`` in its place."""
        raise NotImplementedError("adapters are loaded with begin_load and end_load")

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot on this TP rank, over all layers and both planes."""
        return len(self._spec.layers) * 2 * self._spec.row_width * self._spec.dtype.itemsize

    def _refuse(self, message: str) -> LoRAUpdateOutput:
        logger.warning("%s", message)
        return self.create_lora_update_result(success=False, error_message=message)

    def load_lora_adapter_from_tensors(
        self, lora_ref: LoRARef, tensors: Any, config_dict: Any, added_tokens_config: Any = None
    ) -> LoRAUpdateOutput:
        """Upstream sends every rank all tensors; the HTTP process keeps them as a folder, which is loaded."""
        raise NotImplementedError("adapters are loaded with begin_load and end_load")

    def _unload_lora_adapter(self, lora_ref: LoRARef) -> LoRAUpdateOutput:
        if lora_ref.lora_id in self.pool.loaded:
            self.pool.remove(lora_ref.lora_id)
            del self.lora_refs[lora_ref.lora_id]
        elif any(ref.lora_id == lora_ref.lora_id for ref, _ in self._loading.values()):
            self._unloaded.add(lora_ref.lora_id)
        return self.create_lora_update_result(success=True)

    def validate_lora_batch(self, lora_ids: set[str | None]) -> bool:
        """Whether these adapters can run in one batch; base-model requests (None) always fit."""
        return self.pool.bring_in(key for key in lora_ids if key is not None)

    def fetch_new_loras(self, new_loras: set[str | None], running_loras: set[str | None] = frozenset()) -> None:  # type: ignore[assignment]
        self.pool.begin_step(key for key in new_loras | running_loras if key is not None)

    def prepare_lora_batch(self, forward_batch: ForwardBatch) -> None:
        """Group the batch's tokens by adapter. Requests without one take no part."""
        if self._first_pass is not None:
            self._first_pass.begin()
        mode, lora_ids = forward_batch.forward_mode, forward_batch.lora_ids
        if mode.is_target_verify():  # each draft token of a request is one of a decode batch, with the same adapter
            drafts = forward_batch.spec_info.draft_token_num
            lora_ids = [lora_id for lora_id in lora_ids for _ in range(drafts)]
        decode = mode.is_decode() or mode.is_target_verify()
        if decode and get_is_capture_mode():
            if get_capture_lora_variant() == "nolora":
                self._step.reset()
            else:
                self._step.prepare_capture("decode", len(lora_ids))
        elif get_flags().dp.capturing_prefill_graph:
            self._step.prepare_capture("prefill", forward_batch.extend_num_tokens)
        elif decode:
            self._step.prepare(lora_ids, None)
        else:
            before, counts = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
            self._step.prepare(*runs(lora_ids, before, counts))

    def reset_lora_batch(self) -> None:
        self._step.reset()

    def init_graphs(self, max_tokens: int) -> None:
        """Called before decode graphs of up to ``max_tokens`` tokens are captured."""
        self._step.init_graphs("decode", max_tokens)

    def init_prefill_cuda_graph_batch_info(self, max_num_tokens: int, max_num_requests: int | None = None) -> None:
        """Called before prefill graphs of up to ``max_num_tokens`` tokens are captured; any number of requests fit."""
        self._step.init_graphs("prefill", max_num_tokens)
        self._prefill_graph_tokens = max_num_tokens

    @property
    def supports_prefill_cuda_graph(self) -> bool:
        """Whether prefill graphs are to be captured."""
        return Settings.required().uses_triton(self.device.type == "cuda")

    @property
    def prefill_cuda_graph_max_bs(self) -> int | None:
        """The most requests of a batch that replays a prefill graph: one for each token."""
        return self._prefill_graph_tokens or None

    def can_use_prefill_cuda_graph(self, forward_batch: ForwardBatch) -> bool:
        """Whether a prefill graph may replay the batch, of which upstream knows nothing but its size."""
        mode, tokens = forward_batch.forward_mode, forward_batch.extend_num_tokens
        return mode.is_extend() and not mode.is_cuda_graph() and 0 < (tokens or 0) <= self._prefill_graph_tokens

    def init_cuda_graph_moe_buffers(self, max_bs: int, max_loras: int, compute_dtype: Any, moe_layer: Any) -> None:
        """MoE layers are not adapted."""


HOOKS = (
    Hook(
        "sglang.srt.lora.lora_manager.LoRAManager",
        BlockLoRAManager,
        HookType.REPLACE,
        process=Process.SCHEDULER,
        why="Adapters live in rows of an arena and their deltas need no collective.",
        retire_when="SGLang can choose a LoRA manager",
    ),
)
