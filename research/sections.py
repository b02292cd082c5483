"""Which figures of the simulators and of the cost model are shown, and beside which baseline."""

from __future__ import annotations

from benchmark.sections import PERCENT, Column, Section

RESULTS = "research/results"
ORDER = (
    Column(header="TTFT P99, ms", figure="ttft_p99_ms", digits=0),
    Column(header="P50, ms", figure="ttft_p50_ms", digits=0),
    Column(header="worst adapter's P99, ms", figure="worst_adapter_ttft_p99_ms", digits=0),
    Column(header="median adapter's P99, ms", figure="median_adapter_ttft_p99_ms", digits=0),
    Column(header="tokens/s", figure="output_tokens_per_s", digits=0),
    Column(header="TTFT < 6 s, %", figure="slo_share", digits=0, scale=PERCENT),
    Column(header="TTFT < 5 x idle, %", figure="slo_ratio_share", digits=0, scale=PERCENT),
    Column(header="GB copied", figure="copied_gb", digits=0),
)
GOODPUT = (
    Column(header="within 2 s and 100 ms, %", figure="goodput_share", digits=0, scale=PERCENT),
    Column(header="within 0.5 s and 30 ms, %", figure="goodput_interactive_share", digits=0, scale=PERCENT),
    Column(header="TTFT P50, ms", figure="ttft_p50_ms", digits=0),
    Column(header="P99, ms", figure="ttft_p99_ms", digits=0),
    Column(header="worst adapter's P99, ms", figure="worst_adapter_ttft_p99_ms", digits=0),
    Column(header="tokens/s", figure="output_tokens_per_s", digits=0),
)
OVERALL = (
    Column(header="within 2 s and 100 ms, mean %", figure="mean_goodput_share", digits=0, scale=PERCENT),
    Column(header="2 s, 100 ms: among the best, %", figure="goodput_share_close", digits=0, scale=PERCENT),
    Column(header="at worst, % of the best", figure="goodput_share_least", digits=0, scale=PERCENT),
    Column(header="within 0.5 s and 30 ms, mean %", figure="mean_goodput_interactive_share", digits=0, scale=PERCENT),
    Column(header="0.5 s, 30 ms: among the best, %", figure="goodput_interactive_share_close", digits=0, scale=PERCENT),
    Column(header="at worst, % of the best", figure="goodput_interactive_share_least", digits=0, scale=PERCENT),
    Column(header="P99 TTFT, mean ms", figure="mean_ttft_p99_ms", digits=0),
    Column(header="P99 TTFT over fcfs's, at worst", figure="worst_over_fcfs", digits=1),
    Column(header="worst adapter's P99 over lpm's, at worst", figure="adapter_over_lpm", digits=1),
)
SECTIONS = (
    Section(
        part="cost_model",
        baseline="base",
        columns=(
            Column(header="step, ms", figure="step_ms", digits=2),
            Column(header="S-LoRA over it", figure="s_lora_over_it", digits=2),
            Column(header="stock over it", figure="stock_over_it", digits=2),
            Column(header="measured or reported", figure="reported", digits=2),
            Column(header="error, %", figure="error", digits=0, scale=PERCENT),
            Column(header="parameters over plain", figure="parameters_over_plain", digits=2),
        ),
        folder=RESULTS,
    ),
    Section(
        part="cost_model_calibrated",
        baseline="",
        columns=(
            Column(header="predicted", figure="predicted", digits=2),
            Column(header="reported", figure="reported", digits=2),
            Column(header="error, %", figure="error", digits=0, scale=PERCENT),
            Column(header="worst held-out error, %", figure="held_out", digits=0, scale=PERCENT),
            Column(header="of a fit to all four, %", figure="closest", digits=0, scale=PERCENT),
            Column(header="host, ms", figure="host_ms"),
            Column(header="collective, us", figure="collective_us", digits=0),
            Column(header="MiB of an adapter, us", figure="per_mib_us", digits=0),
        ),
        folder=RESULTS,
    ),
    Section(
        part="activated_simulated",
        baseline="plain",
        columns=(
            Column(header="TTFT P50, ms", figure="ttft_p50_ms", digits=0),
            Column(header="P99, ms", figure="ttft_p99_ms", digits=0),
            Column(header="tokens/s", figure="output_tokens_per_s", digits=0),
            Column(header="prefix hits, %", figure="prefix_hit_share", digits=0, scale=PERCENT),
        ),
        folder=RESULTS,
    ),
    *(
        Section(part=f"goodput_{load}", baseline="", columns=(*OVERALL, *GOODPUT), folder=RESULTS)
        for load in ("near", "beyond")
    ),
    Section(part="scheduler_predicted", baseline="lpm", columns=ORDER, folder=RESULTS),
    Section(part="scheduler_simulated", baseline="lpm", columns=ORDER, folder=RESULTS),
    Section(
        part="memory_simulated",
        baseline="stock, 8 slots",
        columns=(
            Column(header="TTFT P50, ms", figure="ttft_p50_ms", digits=0),
            Column(header="P99, ms", figure="ttft_p99_ms", digits=0),
            Column(header="tokens/s", figure="output_tokens_per_s", digits=0),
            Column(header="adapter hits, %", figure="adapter_hit_share", digits=0, scale=PERCENT),
            Column(header="prefix hits, %", figure="prefix_hit_share", digits=0, scale=PERCENT),
            Column(header="invalid KV, %", figure="invalid_kv_share", digits=0, scale=PERCENT),
            Column(header="GB copied", figure="copied_gb", digits=0),
        ),
        folder=RESULTS,
    ),
)
