"""Writes the tables and plots of docs/benchmarks.md and README.md from the raw results. Measures nothing.

    python -m benchmark.report

A document keeps ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; what stands between them is replaced. To show
another part, record it with ``benchmark.record.Recorder``, add a ``Section`` here and its markers to the document.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.record import REPOSITORY, RESULTS, Run, newest

DOCUMENTS = ("docs/benchmarks.md", "docs/memory.md", "docs/scheduler.md", "README.md")
IMAGES = "docs/images"


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Section:
    """One part's tables, a table for each scenario and a row for each variant.

    ``baseline``: the variant that the first column is compared with; the plot shows that column too
    ``plotted``: whether there is a plot
    """

    part: str
    baseline: str
    columns: tuple[Column, ...]
    plotted: bool = True


PERCENT = 100.0
MIB = 2.0**-20
COUNTS = (
    Column("adapter on a TP rank, MiB", "adapter_bytes", 2, MIB),
    Column("all-gathers", "all_gathers", 0),
    Column("all-reduces", "all_reduces", 0),
    Column("bytes sent", "sent_bytes", 0),
    Column("MFLOP", "flops", 2, 1e-6),
    Column("parameters over plain", "parameters_over_plain", 2),
)
STEP = (Column("ms per token", "itl_ms_p50"), Column("TTFT, ms", "ttft_ms_p50"))
LATENCIES = (
    Column("TTFT P50, ms", "ttft_ms_p50", 0),
    Column("TTFT P99, ms", "ttft_ms_p99", 0),
    Column("TPOT P50, ms", "tpot_ms_p50"),
    Column("tokens/s", "output_tokens_per_s", 0),
)
CACHES = (
    Column("KV hits, %", "kv_hit_rate", 0, PERCENT),
    Column("loads per 100 requests", "adapter_loads_per_request", 0, PERCENT),
    Column("MiB copied", "copied_mib", 0),
    Column("failed", "failed_requests", 0),
)
SIMULATED_ORDER = (
    Column("TTFT P99, ms", "ttft_p99_ms", 0),
    Column("P50, ms", "ttft_p50_ms", 0),
    Column("worst adapter's P99, ms", "worst_adapter_ttft_p99_ms", 0),
    Column("median adapter's P99, ms", "median_adapter_ttft_p99_ms", 0),
    Column("tokens/s", "output_tokens_per_s", 0),
    Column("TTFT < 6 s, %", "slo_share", 0, PERCENT),
    Column("TTFT < 5 x idle, %", "slo_ratio_share", 0, PERCENT),
    Column("GB copied", "copied_gb", 0),
)
SECTIONS = (
    Section("memory", "stock slots", (*LATENCIES, *CACHES)),
    Section(
        "scheduler",
        "lpm",
        (
            *LATENCIES,
            Column("worst adapter's TTFT P99, ms", "worst_adapter_ttft_ms_p99", 0),
            Column("SLO, %", "slo_attainment", 0, PERCENT),
            *CACHES,
        ),
    ),
    Section(
        "quality",
        "plain, r = 16",
        (
            Column("held-out loss", "eval_loss", 3),
            Column("training loss", "train_loss", 3),
            Column("parameters", "parameters", 0),
        ),
    ),
    Section("end_to_end_tp2", "block-diagonal, matched", STEP),
    Section("end_to_end_tp4", "block-diagonal, matched", STEP),
    *(Section(f"counts_tp{tp}", "stock, r", COUNTS, plotted=False) for tp in (2, 4, 8)),
    Section("counts", "stock, r", COUNTS, plotted=False),
    Section(
        "cost_model",
        "base",
        (
            Column("step, ms", "step_ms", 2),
            Column("S-LoRA over it", "s_lora_over_it", 2),
            Column("stock over it", "stock_over_it", 2),
            Column("measured or reported", "reported", 2),
            Column("error, %", "error", 0, PERCENT),
            Column("parameters over plain", "parameters_over_plain", 2),
        ),
    ),
    Section("scheduler_predicted", "lpm", SIMULATED_ORDER, plotted=False),
    Section("scheduler_simulated", "lpm", SIMULATED_ORDER, plotted=False),
    Section(
        "memory_simulated",
        "stock, 8 slots",
        (
            Column("TTFT P50, ms", "ttft_p50_ms", 0),
            Column("P99, ms", "ttft_p99_ms", 0),
            Column("tokens/s", "output_tokens_per_s", 0),
            Column("adapter hits, %", "adapter_hit_share", 0, PERCENT),
            Column("prefix hits, %", "prefix_hit_share", 0, PERCENT),
            Column("invalid KV, %", "invalid_kv_share", 0, PERCENT),
            Column("GB copied", "copied_gb", 0),
        ),
        plotted=False,
    ),
)


def over(values: Sequence[float], baseline: Sequence[float]) -> str:
    """Against the baseline in percent, by ``ratio``: a machine's drift leaves that alone."""
    return f"{(ratio(values, baseline) - 1) * PERCENT:+z.0f} %"


def ratio(values: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over the rounds of one figure over another's; ``ValueError`` where the rounds are not the same."""
    return statistics.median(value / base for value, base in zip(values, baseline, strict=True))


def table(section: Section, variants: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """One scenario: a row for each variant, cells with median and range over the rounds.

    A run of some variants only may lack the baseline, and then compares nothing.
    """
    baseline = variants.get(section.baseline)
    columns = [column for column in section.columns if any(column.figure in figures for figures in variants.values())]
    first = columns[0]
    headers = ["", first.header, f"against {section.baseline}", *(column.header for column in columns[1:])]
    lines = ["| " + " | ".join(headers) + " |", "|---" * len(headers) + "|"]
    for variant, figures in variants.items():
        cells = [column.text(figures[column.figure]) if column.figure in figures else "" for column in columns]
        compared = over(figures[first.figure], baseline[first.figure]) if baseline else ""
        lines.append("| " + " | ".join([variant, cells[0], compared, *cells[1:]]) + " |")
    return "\n".join(lines)


def conditions(part: str, run: Run, root: str) -> str:
    """Everything a reader needs to judge and repeat the run. ``root``: way from the document to the repository."""
    facts, versions = run.conditions, run.conditions["versions"]
    settings = ". ".join(f"{name[0].upper()}{name[1:]}: {value}" for name, value in facts["settings"].items())
    pins = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{settings}. Median (min to max) over the rounds, compared round by round. "
        f"Seed {facts['seed']}, {facts['machine']}, {pins}; "
        f"commit {facts['commit']}, {facts['date']}: `{facts['command']}` "
        f"([raw]({root}benchmark/results/{part}.jsonl))."
    )


def details(section: Section, run: Run, root: str) -> str:
    """The part's block in docs/benchmarks.md: every scenario, its conditions and its plot."""
    blocks = [f"**{scenario}**\n\n{table(section, variants)}" for scenario, variants in run.figures.items()]
    plot = [f"![{section.part}]({root}{IMAGES}/{section.part}.svg)"] if section.plotted else []
    return "\n\n".join([*blocks, *plot, conditions(section.part, run, root)])


def summary(section: Section, run: Run, root: str) -> str:
    """The part's block elsewhere: the first scenario and its conditions."""
    scenario, variants = next(iter(run.figures.items()))
    return "\n\n".join([f"{scenario}:", table(section, variants), conditions(section.part, run, root)])


BLOCKS: dict[str, Callable[[Section, Run, str], str]] = {"": details, "-summary": summary}


def render(document: str, text: str, results: Path = RESULTS) -> str:
    """``text`` of ``document`` (its path in the repository) with every marked block made anew."""
    root = "../" * document.count("/")
    for section in SECTIONS:
        for suffix, block in BLOCKS.items():
            name = section.part + suffix
            marked = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
            if marked.search(text):
                run = newest(section.part, results)
                made = block(section, run, root) if run else f"Not measured yet: `make bench PARTS={section.part}`."
                text = marked.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def main() -> None:
    from benchmark.plots import plot

    for section in SECTIONS:
        if section.plotted and (run := newest(section.part)):
            plot(section, run, REPOSITORY / IMAGES)
    for document in DOCUMENTS:
        path = REPOSITORY / document
        path.write_text(render(document, path.read_text()))
        print(f"wrote {document}")


if __name__ == "__main__":
    main()
