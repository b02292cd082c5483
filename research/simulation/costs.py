"""What things cost: Llama-3.1-8B in bfloat16 on one H100 80GB (SXM), every constant with its source.

A forward step is a roofline: the larger of arithmetic and memory traffic, plus what launching it costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_blocklora.sharding.layout import place

MIB = 2**20
GIB = 2**30
# One token of the simulated tree stands for a page of 16: the same for all systems, and the tree is 16 times cheaper.
PAGE_TOKENS = 16
CHUNK_TOKENS = 8192  # --chunked-prefill-size of SGLang on an 80 GB GPU


@dataclass(frozen=True)
class Model:
    """Llama-3.1-8B: the shapes of its config.json."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 14336
    parameters: float = 8.03e9
    item_bytes: int = 2

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's K and V over all layers: 128 KiB."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.item_bytes

    def adapter_slots(self, rank: int, nblocks: int = 1) -> int:
        """Slots of an adapter of all seven linears on one GPU, by the layout that serving uses."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        columns = [(self.hidden, (q, kv, kv)), (self.hidden, (self.intermediate, self.intermediate))]
        rows = [(q, self.hidden), (self.intermediate, self.hidden)]
        sizes = []
        for inputs, outputs in columns:
            sizes += [len(outputs) * rank * inputs, *(out * rank // nblocks for out in outputs)]
        for inputs, out in rows:
            sizes += [rank * inputs // nblocks, out * rank]
        return place(sizes, kv).rows


@dataclass(frozen=True)
class Costs:
    """Seconds of everything that takes time. Published, measured, or assumed where nothing better was found.

    peak_flops, hbm_bandwidth   published: "NVIDIA H100 Tensor Core GPU" data sheet, SXM: 989 TFLOP/s of dense bf16,
                                3.35 TB/s
    mfu                         assumed share of the peak in prefill; "Efficiently Scaling Transformer Inference"
                                (arXiv 2211.05102) reports 0.76 for large batches on TPUs
    mbu                         assumed share of the bandwidth; a profile of an H100 found 0.78 for weights and 0.42 to
                                0.57 for KV (mikamirai.com/blog/gpu-memory-bandwidth)
    lora_efficiency             assumed: a rank-r GEMM reaches a tenth of what a dense one does; then r = 64 adds 20 %
                                to prefill, which is what S-LoRA (arXiv 2311.03285) reports LoRA to cost
    step_s, lora_step_s         assumed: what CUDA graphs leave of a step's launches; shrink and expand of 4 linears in
                                32 layers at about 3 us
    pcie_bandwidth              published sample of nvbandwidth, pinned memory to H100: 55.6 GB/s of PCIe 5.0's 64
    copies_per_adapter, copy_s  stock, by its code (lora/mem_pool.py): one copy per tensor (A and B of qkv, o, gate_up
                                and down in 32 layers), launched in a Python loop; 10 us each is assumed. That it pins
                                every tensor anew at every load is left out, which favours stock
    scatter_copies              ours, by memory/: one index_copy_ per plane and layer
    host_step_s                 assumed: the scheduler's own time, hidden behind the GPU unless longer (overlap)
    plain_match_s, prefix_match_s  measured on one CPU core, 1,024 cached tokens: 15 us in SGLang's tree and 32 us
                                behind an adapter of 2,560 slots; charged with a margin
    """

    model: Model = Model()
    peak_flops: float = 989e12
    hbm_bandwidth: float = 3.35e12
    mfu: float = 0.5
    mbu: float = 0.7
    lora_efficiency: float = 0.1
    step_s: float = 0.5e-3
    lora_step_s: float = 0.8e-3
    pcie_bandwidth: float = 55e9
    copies_per_adapter: int = 256
    scatter_copies: int = 64
    copy_s: float = 10e-6
    host_step_s: float = 2e-3
    plain_match_s: float = 20e-6
    prefix_match_s: float = 50e-6

    def load_per_tensor_s(self, adapter_bytes: int) -> float:
        """Stock's load of one adapter: many small copies, whichever is slower of launching and of the bus."""
        return max(adapter_bytes / self.pcie_bandwidth, self.copies_per_adapter * self.copy_s)

    def load_image_s(self, adapter_bytes: int) -> float:
        """Our load of one adapter: one copy of its packed image, then a scatter that reads and writes it once."""
        scatter = max(2 * adapter_bytes / (self.hbm_bandwidth * self.mbu), self.scatter_copies * self.copy_s)
        return adapter_bytes / self.pcie_bandwidth + scatter

    def step_seconds(self, work: Work, look_ups_s: float) -> float:
        """One step without loading: the GPU's time, or the scheduler's where that takes longer."""
        return max(self.forward_s(work), self.host_step_s + look_ups_s)

    def forward_s(self, work: Work) -> float:
        """One forward step without loading."""
        model = self.model
        flops = 2 * model.parameters * work.tokens + 4 * model.layers * model.hidden * work.attended
        flops += work.lora_flops / self.lora_efficiency
        traffic = model.parameters * model.item_bytes + work.context_tokens * model.slot_bytes + work.adapter_bytes
        launches = self.step_s + (self.lora_step_s if work.adapter_bytes else 0.0)
        return max(flops / (self.peak_flops * self.mfu), traffic / (self.hbm_bandwidth * self.mbu)) + launches


@dataclass(frozen=True)
class CpuCosts(Costs):
    """A TP rank of the servers that ``benchmark/scheduler/serve.py`` starts: a tiny model in float32, 2 ranks, 2 cores.

    Measured by ``research/calibrate.py`` on an AMD EPYC: a step is a sum of fixed parts, the client's and
    the HTTP server's time on the same cores among them. Copies are left at what they cost on an H100: next to nothing.

    step_s     of any step
    request_s  for each request in it
    adapter_s  for each distinct adapter in it
    token_s    for each token that goes through the linears
    """

    model: Model = Model(layers=4, hidden=256, heads=4, kv_heads=2, head_dim=32, intermediate=384, item_bytes=4)
    step_s: float = 16.7e-3
    request_s: float = 0.3e-3
    adapter_s: float = 0.7e-3
    token_s: float = 0.09e-3

    def step_seconds(self, work: Work, look_ups_s: float) -> float:
        return self.forward_s(work) + look_ups_s  # one core does both

    def forward_s(self, work: Work) -> float:
        parts = self.request_s * work.requests + self.adapter_s * work.adapters + self.token_s * work.tokens
        return self.step_s + parts


@dataclass
class Work:
    """What one step computes.

    requests        that take part
    adapters        distinct ones among them
    tokens          that go through the linears
    attended        sum over those tokens of the tokens each attends to
    context_tokens  whose KV is read
    adapter_bytes   weights of the distinct adapters in the batch
    lora_flops      sum over tokens of 2 x the parameters of its adapter
    """

    requests: int = 0
    adapters: int = 0
    tokens: int = 0
    attended: float = 0.0
    context_tokens: int = 0
    adapter_bytes: int = 0
    lora_flops: float = 0.0

    def extend(self, tokens: int, prefix: int, adapter_bytes: int, item_bytes: int = 2, base_tokens: int = 0) -> None:
        """Add a request that computes ``tokens`` behind ``prefix`` cached ones, the first of them without its adapter.

        base_tokens  how many, before an invocation
        """
        self.requests += 1
        self.tokens += tokens
        self.attended += tokens * (prefix + tokens / 2)
        self.context_tokens += prefix + tokens
        self.lora_flops += 2 * (tokens - base_tokens) * adapter_bytes / item_bytes
