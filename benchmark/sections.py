"""Which figures of the raw results are shown, under which names, beside which baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import scipy.stats

PERCENT = 100.0
MIB = 2.0**-20

Variants = Mapping[str, Mapping[str, Sequence[float]]]  # name -> figure -> a value for each round
Scenarios = Mapping[str, Variants]


def ratio(values: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over the rounds of one figure over another's; ``ValueError`` where the rounds are not the same."""
    return statistics.median(value / base for value, base in zip(values, baseline, strict=True))


@dataclass(frozen=True, kw_only=True)
class Column:
    """A figure of the raw results and how it is shown: ``scale`` times the value, ``digits`` behind the point."""

    header: str
    figure: str
    digits: int = 1
    scale: float = 1.0

    def text(self, values: Sequence[float]) -> str:
        """Median, and the range of the rounds where there is one."""
        points = (statistics.median(values), min(values), max(values))
        median, low, high = (f"{value * self.scale:.{self.digits}f}" for value in points)
        return median if low == high else f"{median} ({low} to {high})"


@dataclass(frozen=True, kw_only=True)
class Mean(Column):
    """A figure of rounds that are samples: its mean, and the 95 % confidence interval of that by Student's t."""

    def text(self, values: Sequence[float]) -> str:
        count, mean = len(values), statistics.mean(values)
        shown = f"{mean * self.scale:.{self.digits}f}"
        if count == 1 or min(values) == max(values):
            return shown
        half = scipy.stats.t.ppf(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count)
        return f"{shown} ± {half * self.scale:.{self.digits}f}"


@dataclass(frozen=True, kw_only=True)
class Brief:
    """What a reader in a hurry is shown of a section: one scenario, some rows under plain names, some columns.

    rows      variant -> the name it is shown under; None: all, under their own
    baseline  the shown name that the first column is compared with; None: nothing is compared
    ours      shown names that are this project, what others are compared with in a plot first
    plotted   columns that make the plot's panels, the lower the better; none: no plot
    """

    scenario: str
    columns: tuple[Column, ...]
    rows: Mapping[str, str] | None = None
    baseline: str | None = None
    ours: tuple[str, ...] = ()
    plotted: tuple[Column, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """The tables of one part: one for each scenario, in it a row for each variant.

    baseline  the variant that the first column is compared with
    brief     None: a short version has the first scenario as it is
    folder    of the raw results, in the repository
    derived   scenarios that are computed from those measured, and shown before them; None: there are none
    """

    part: str
    baseline: str
    columns: tuple[Column, ...]
    brief: Brief | None = None
    folder: str = "benchmark/results"
    derived: Callable[[Scenarios], Scenarios] | None = None

    def shown(self, measured: Scenarios) -> Scenarios:
        """What is computed from the scenarios of a run, then those."""
        return {**(self.derived(measured) if self.derived else {}), **measured}


LORA_ADDS = "What LoRA adds to a step"


def lora_adds(figure: str, measured: Scenarios) -> Scenarios:
    """Each variant's step, by ``figure`` in milliseconds, less that of the base model on its server, round by round.

    Of "SERVER, ADAPTERS" that is "SERVER, base model", or "base model" where there is no such variant.
    """
    made: dict[str, dict[str, Sequence[float]]] = {}
    for scenario, variants in measured.items():
        for name, figures in variants.items():
            base = variants.get(f"{name.partition(', ')[0]}, base model", variants.get("base model"))
            if base is not None and not name.endswith(("base model", "no LoRA")):
                steps = zip(figures[figure], base[figure], strict=True)
                made.setdefault(name, {})[f"added, {scenario}"] = [own - without for own, without in steps]
    return {LORA_ADDS: made}


EXCHANGED = (
    Column(header="all-gathers", figure="all_gathers", digits=0),
    Column(header="all-reduces", figure="all_reduces", digits=0),
    Column(header="bytes sent", figure="sent_bytes", digits=0),
)
COUNTS = (
    Column(header="adapter on a TP rank, MiB", figure="adapter_bytes", digits=2, scale=MIB),
    Column(header="read for a token, MiB", figure="read_bytes", digits=2, scale=MIB),
    *EXCHANGED,
    Column(header="MFLOP", figure="flops", digits=2, scale=1e-6),
    Column(header="parameters over plain", figure="parameters_over_plain", digits=2),
)
STEP = Column(header="ms per token", figure="itl_ms_p50")
FIRST_TOKEN = Column(header="TTFT P50, ms", figure="ttft_ms_p50", digits=0)
FIRST_TOKEN_TAIL = Column(header="TTFT P99, ms", figure="ttft_ms_p99", digits=0)
LATENCIES = (
    FIRST_TOKEN,
    FIRST_TOKEN_TAIL,
    Column(header="TPOT P50, ms", figure="tpot_ms_p50"),
    Column(header="tokens/s", figure="output_tokens_per_s", digits=0),
)
SLO = Column(header="SLO, %", figure="slo_attainment", digits=0, scale=PERCENT)
HITS = Column(header="KV hits, %", figure="kv_hit_rate", digits=0, scale=PERCENT)
CACHES = (
    HITS,
    Column(header="loads per 100 requests", figure="adapter_loads_per_request", digits=0, scale=PERCENT),
    Column(header="MiB copied", figure="copied_mib", digits=0),
    Column(header="failed", figure="failed_requests", digits=0),
)

PLAIN_ADAPTER = "plain, r = 16"
LOSSES = (
    Mean(header="held-out loss", figure="eval_loss", digits=3),
    Mean(header="over plain's", figure="loss_over_plain", digits=3),
    Column(header="learning rate", figure="learning_rate", digits=3),
    Column(header="parameters", figure="parameters", digits=0),
)

COUNTS_BRIEF = Brief(
    scenario="Llama-3.1-8B, TP 8",
    rows={
        "stock, r": "SGLang 0.5.21's LoRA",
        "stock-0.5.23, r": "SGLang 0.5.23's, every backend",
        "vllm, r": "vLLM's",
        "vllm-sharded, r": "vLLM's, fully sharded",
        "s-lora, r": "S-LoRA's sharding",
        "block-diagonal, matched": "**block-diagonal (ours)**",
    },
    columns=(
        Column(header="LoRA rank", figure="lora_rank", digits=0),
        Column(header="parameters over plain", figure="parameters_over_plain", digits=2),
        Column(header="MiB on each GPU", figure="adapter_bytes", scale=MIB),
        *EXCHANGED,
    ),
)
RANKS = (
    Column(header="held over share", figure="held_over_share", digits=2),
    Column(header="beside the largest rank", figure="beside_largest_over_share", digits=2),
    Column(header="padding, %", figure="padding", digits=1, scale=PERCENT),
    Column(header="read for a token, KiB per r", figure="read_bytes_per_rank", digits=0, scale=2.0**-10),
    Column(header="MFLOP per r", figure="flops_per_rank", digits=2, scale=1e-6),
    Column(header="bytes sent per r", figure="sent_bytes_per_rank", digits=0),
    Column(header="collectives", figure="collectives", digits=0),
)
RANKS_BRIEF = Brief(
    scenario="Qwen3-30B-A3B, TP 8",
    rows={
        "stock-0.5.23": "SGLang 0.5.23's LoRA, every backend",
        "vllm": "vLLM's",
        "vllm-sharded": "vLLM's, fully sharded",
        "plain": "plain (ours)",
        "block-diagonal": "**block-diagonal (ours)**",
    },
    columns=RANKS,
)
END_TO_END_BRIEF = Brief(
    scenario="Batch 1",
    rows={
        "base": "base model, no LoRA",
        "block-diagonal, matched": "block-diagonal (ours)",
        "stock LoRA": "SGLang's LoRA",
        "S-LoRA": "S-LoRA's sharding",
    },
    columns=(STEP, Column(header="TTFT, ms", figure="ttft_ms_p50")),
    baseline="block-diagonal (ours)",
    ours=("block-diagonal (ours)",),
    plotted=(STEP,),
)
MEMORY_BRIEF = Brief(
    scenario="64 adapters",
    rows={
        "stock slots": "SGLang: 8 padded slots",
        "static": "ours, static",
        "unified, cost-aware": "ours, unified (default)",
    },
    columns=(*LATENCIES, *CACHES[:2]),
    baseline="SGLang: 8 padded slots",
    ours=("ours, unified (default)", "ours, static"),
    plotted=(FIRST_TOKEN, FIRST_TOKEN_TAIL),
)
SCHEDULER_BRIEF = Brief(
    scenario="Zipf 1.0",
    rows={
        "fcfs": "fcfs (SGLang's default)",
        "lpm": "lpm (SGLang's)",
        "adapter-affinity": "adapter-affinity (ours, default)",
        "adapter-affinity:64:16": "ours, 64 steps, rounds of 16 chunks",
        "adapter-affinity:16:16": "ours, 16 steps, rounds of 16 chunks",
    },
    columns=(FIRST_TOKEN, FIRST_TOKEN_TAIL, SLO, LATENCIES[-1], HITS),
    ours=(
        "adapter-affinity (ours, default)",
        "ours, 64 steps, rounds of 16 chunks",
        "ours, 16 steps, rounds of 16 chunks",
    ),
    plotted=(FIRST_TOKEN, FIRST_TOKEN_TAIL),
)

VLLM_SLOTS = (
    *(f"vLLM, {slots} slots" for slots in (4, 8, 12)),
    *(f"vLLM fully sharded, {slots} slots" for slots in (8, 12)),
)
SCARCE_BRIEF = Brief(
    scenario="zipf:1.0, 3 sessions/s",
    rows={
        **{name: name for name in VLLM_SLOTS},
        "stock SGLang": "SGLang's LoRA, 4 slots",
        "ours, plain": "plain (ours)",
        "ours, block-diagonal": "block-diagonal (ours)",
    },
    columns=(FIRST_TOKEN, FIRST_TOKEN_TAIL, LATENCIES[2], LATENCIES[3], SLO),
    ours=("block-diagonal (ours)", "plain (ours)"),
    plotted=(FIRST_TOKEN_TAIL, LATENCIES[2]),
)

scarce = partial(Section, baseline="ours, plain", columns=(*LATENCIES, SLO, HITS))

ADDED = tuple(Column(header=f"batch {batch}, ms", figure=f"added, Batch {batch}") for batch in (1, 8, 32))

SECTIONS = (
    Section(
        part="activated",
        baseline="plain",
        columns=(
            Column(header="prompt tokens computed for five", figure="prefill_tokens", digits=0),
            Column(header="TTFT of the first, ms", figure="first_ttft_ms", digits=0),
            Column(header="TTFT of the others, ms", figure="later_ttft_ms", digits=0),
        ),
    ),
    Section(part="activated_base_cost", baseline="stock SGLang, no LoRA", columns=(STEP, FIRST_TOKEN)),
    Section(
        part="added_time",
        baseline="base model",
        columns=(STEP, FIRST_TOKEN, *ADDED),
        brief=Brief(scenario=LORA_ADDS, columns=ADDED),
        derived=partial(lora_adds, "itl_ms_p50"),
    ),
    Section(
        part="step_profile",
        baseline="stock SGLang",
        columns=(
            Column(header="ms a step", figure="step_ms"),
            Column(header="collectives", figure="collectives_ms"),
            Column(header="linears", figure="linears_ms"),
            Column(header="attention", figure="attention_ms"),
            Column(header="rest of the forward", figure="rest_of_forward_ms"),
            Column(header="scheduler", figure="scheduler_ms"),
        ),
    ),
    *(
        Section(
            part=f"peers_decode_tp{tp}",
            baseline="ours, plain",
            columns=(Column(header="ms a step", figure="step_ms"), *ADDED),
            brief=Brief(scenario=LORA_ADDS, columns=ADDED),
            derived=partial(lora_adds, "step_ms"),
        )
        for tp in (1, 2)
    ),
    scarce(part="peers_scarce_tp1"),
    scarce(part="peers_scarce_tp2", brief=SCARCE_BRIEF),
    scarce(part="peers_overload_tp2"),
    scarce(part="peers_many_tp2"),
    Section(part="memory", baseline="stock slots", columns=(*LATENCIES, *CACHES), brief=MEMORY_BRIEF),
    Section(
        part="scheduler",
        baseline="lpm",
        columns=(
            *LATENCIES,
            Column(header="worst adapter's TTFT P99, ms", figure="worst_adapter_ttft_ms_p99", digits=0),
            SLO,
            *CACHES,
        ),
        brief=SCHEDULER_BRIEF,
    ),
    Section(
        part="scheduler_host_time",
        baseline="quiet",
        columns=(
            Column(header="a step, ms", figure="step_ms", digits=2),
            Column(header="order, ms", figure="order_ms", digits=2),
            Column(header="admission, ms", figure="admission_ms", digits=2),
        ),
    ),
    Section(
        part="quality",
        baseline=PLAIN_ADAPTER,
        columns=(
            *LOSSES,
            *(Column(header=f"at {rate:g}", figure=f"loss_{rate:g}", digits=3) for rate in (2e-3, 4e-3, 8e-3, 16e-3)),
        ),
        brief=Brief(
            scenario="held-out loss",
            columns=LOSSES,
            baseline=PLAIN_ADAPTER,
        ),
    ),
    *(
        Section(
            part=f"end_to_end_tp{tp}",
            baseline="block-diagonal, matched",
            columns=END_TO_END_BRIEF.columns,
            brief=END_TO_END_BRIEF if tp == 2 else None,
        )
        for tp in (2, 4)
    ),
    *(Section(part=f"counts_tp{tp}", baseline="block-diagonal, matched", columns=COUNTS) for tp in (2, 4, 8)),
    Section(part="counts", baseline="block-diagonal, matched", columns=COUNTS, brief=COUNTS_BRIEF),
    Section(part="counts_ranks", baseline="block-diagonal", columns=RANKS, brief=RANKS_BRIEF),
)
