"""Writes the tables and plots of the documents from the raw results. Measures nothing.

    python -m benchmark.report

A document keeps ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; what stands between them is replaced. NAME is a part
(all its tables), ``PART-summary`` (a short table and its conditions) or ``PART-table`` (that table alone). To show
another part, record it with ``benchmark.record.Recorder`` and add a ``Section`` (``benchmark/sections.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmark.record import REPOSITORY, Run, newest
from benchmark.sections import PERCENT, SECTIONS, Brief, Column, Mean, Section, Variants, ratio

DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/training.md", "benchmark/results/README.md")
IMAGES = "docs/images"


def over(values: Sequence[float], baseline: Sequence[float]) -> str:
    """Against the baseline in percent, by ``ratio``: a machine's drift leaves that alone."""
    return f"{(ratio(values, baseline) - 1) * PERCENT:+z.0f} %"


def table(columns: Sequence[Column], variants: Variants, baseline: str | None) -> str:
    """One scenario: a row for each variant, cells with median and range over the rounds.

    ``baseline``: the variant that the first column is compared with, None for none. A run of some variants only may
    lack it, and then compares nothing.
    """
    columns = [column for column in columns if any(column.figure in figures for figures in variants.values())]
    first, compared = columns[0], variants.get(baseline) if baseline else None
    against = [f"against {baseline}"] if baseline else []
    headers = ["", first.header, *against, *(column.header for column in columns[1:])]
    lines = ["| " + " | ".join(headers) + " |", "|---" * len(headers) + "|"]
    for variant, figures in variants.items():
        cells = [column.text(figures[column.figure]) if column.figure in figures else "" for column in columns]
        if baseline:
            cells.insert(1, over(figures[first.figure], compared[first.figure]) if compared else "")
        lines.append("| " + " | ".join([variant, *cells]) + " |")
    return "\n".join(lines)


def conditions(section: Section, run: Run, root: str) -> str:
    """Everything a reader needs to judge and repeat the run. ``root``: way from the document to the repository."""
    facts, versions = run.conditions, run.conditions["versions"]
    settings = ". ".join(f"{name[0].upper()}{name[1:]}: {value}" for name, value in facts["settings"].items())
    pins = ", ".join(f"{name} {version}" for name, version in versions.items())
    sampled = any(isinstance(column, Mean) for column in section.columns)
    spread = "Mean ± its 95 % confidence interval" if sampled else "Median (min to max)"
    return (
        f"{settings}. {spread} over the rounds, compared round by round. "
        f"Seed {facts['seed']}, {facts['machine']}, {pins}; "
        f"commit {facts['commit']}, {facts['date']}: `{facts['command']}` "
        f"([raw]({root}{section.folder}/{section.part}.jsonl))."
    )


def details(section: Section, run: Run, root: str) -> str:
    """Every scenario of the part, and its conditions; only measured ones are compared with the baseline."""
    blocks = [
        f"**{scenario}**\n\n{table(section.columns, variants, section.baseline if scenario in run.figures else None)}"
        for scenario, variants in section.shown(run.figures).items()
    ]
    return "\n\n".join([*blocks, conditions(section, run, root)])


def renamed(section: Section, brief: Brief, run: Run) -> Variants:
    """Shown name -> figures of the rows of ``brief``, the section's, that the run has."""
    variants = section.shown(run.figures)[brief.scenario]
    if brief.rows is None:
        return variants
    return {name: variants[variant] for variant, name in brief.rows.items() if variant in variants}


def short_table(section: Section, run: Run, root: str) -> str:
    """The brief's table, or the first scenario's where there is no brief."""
    if section.brief:
        return table(section.brief.columns, renamed(section, section.brief, run), section.brief.baseline)
    return table(section.columns, next(iter(run.figures.values())), section.baseline)


def summary(section: Section, run: Run, root: str) -> str:
    """The short table, its plot and its conditions."""
    scenario = section.brief.scenario if section.brief else next(iter(run.figures))
    plotted = section.brief is not None and section.brief.plotted
    plot = [f"![{section.part}]({root}{IMAGES}/{section.part}.svg)"] if plotted else []
    return "\n\n".join(
        [f"{scenario}:", short_table(section, run, root), *plot, f"<sub>{conditions(section, run, root)}</sub>"]
    )


def print_brief(part: str) -> None:
    """The short table of the newest run of ``part``, which has one."""
    (section,) = (section for section in SECTIONS if section.part == part)
    run = newest(part)
    assert run is not None
    print(short_table(section, run, ""))


BLOCKS: dict[str, Callable[[Section, Run, str], str]] = {"": details, "-summary": summary, "-table": short_table}


def render(document: str, text: str, sections: Sequence[Section] = SECTIONS, repository: Path = REPOSITORY) -> str:
    """``text`` of ``document`` (its path in the repository) with every marked block made anew."""
    root = "../" * document.count("/")
    for section in sections:
        for suffix, block in BLOCKS.items():
            name = section.part + suffix
            marked = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
            if marked.search(text):
                run = newest(section.part, repository / section.folder)
                made = block(section, run, root) if run else "Not measured yet."
                text = marked.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def write(documents: Sequence[str], sections: Sequence[Section]) -> None:
    """Make the marked blocks of ``documents`` anew."""
    for document in documents:
        path = REPOSITORY / document
        path.write_text(render(document, path.read_text(), sections))
        print(f"wrote {document}")


def main() -> None:
    from benchmark import picture, plots

    for section in SECTIONS:
        if section.brief and section.brief.plotted and (run := newest(section.part)):
            plots.plot(section.part, section.brief, renamed(section, section.brief, run), REPOSITORY / IMAGES)
    picture.draw(REPOSITORY / IMAGES)
    write(DOCUMENTS, SECTIONS)


if __name__ == "__main__":
    main()
