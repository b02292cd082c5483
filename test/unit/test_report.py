"""The benchmarks' report: documents are exactly what the committed raw results give; how runs are read and shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmark.record import REPOSITORY, Recorder, Run, newest
from benchmark.report import DOCUMENTS, IMAGES, renamed, render, short_table, table
from benchmark.run import PARTS
from benchmark.sections import LORA_ADDS, SECTIONS, Brief, Column, Section, lora_adds

PART = "end_to_end_tp2"
TPOT = Column(header="TPOT, ms", figure="tpot")
HITS = Column(header="hits, %", figure="hits", digits=0, scale=100.0)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_are_what_the_raw_results_give(document):
    """make bench-report mends it."""
    text = (REPOSITORY / document).read_text()
    assert render(document, text) == text


def test_every_section_is_beside_its_raw_results():
    text = (REPOSITORY / "benchmark/results/README.md").read_text()
    assert [section.part for section in SECTIONS if f"<!-- begin {section.part} -->" not in text] == []


def test_every_picture_is_shown_and_none_is_left_over():
    shown = "".join((REPOSITORY / document).read_text() for document in DOCUMENTS)
    assert {path.name for path in (REPOSITORY / IMAGES).iterdir()} == set(re.findall(r"images/([\w.]+)", shown))


def test_a_brief_names_what_was_measured():
    for section in SECTIONS:
        run = newest(section.part)
        if section.brief and run:
            shown = set(renamed(section, section.brief, run))
            assert section.brief.rows is None or shown == set(section.brief.rows.values())
            assert {*section.brief.ours, *filter(None, [section.brief.baseline])} <= shown


def test_every_section_can_be_measured_by_the_command_it_names():
    assert {section.part for section in SECTIONS} == set(PARTS)


def record(folder: Path, values: dict[str, list[float]], finish: bool) -> None:
    recorder = Recorder(PART, 7, {"rounds": 2}, folder)
    for number in range(2):
        for variant, rounds in values.items():
            recorder.add("1 request", variant, number, {"itl_ms_p50": rounds[number]})
    if finish:
        recorder.finish()


def test_the_newest_finished_run_is_taken_and_a_broken_one_is_kept(tmp_path):
    record(tmp_path, {"base": [1.0, 3.0]}, finish=True)
    record(tmp_path, {"base": [50.0, 60.0]}, finish=False)
    run = newest(PART, tmp_path)
    assert run is not None
    assert run.figures == {"1 request": {"base": {"itl_ms_p50": [1.0, 3.0]}}}
    assert run.conditions["seed"] == 7
    assert {"command", "commit", "machine", "versions"} <= set(run.conditions)
    assert "60.0" in (tmp_path / f"{PART}.jsonl").read_text()
    assert newest("memory", tmp_path) is None


def test_table_shows_median_range_and_the_baseline():
    figures = {"base": {"tpot": [10.0, 20.0, 12.0]}, "ours": {"tpot": [15.0, 15.0, 15.0], "hits": [0.5, 0.25, 0.75]}}
    assert table((TPOT, HITS), figures, "base").splitlines() == [
        "|  | TPOT, ms | against base | hits, % |",
        "|---|---|---|---|",
        "| base | 12.0 (10.0 to 20.0) | +0 % |  |",
        "| ours | 15.0 | +25 % | 50 (25 to 75) |",
    ]


def test_a_run_without_the_baseline_compares_nothing():
    assert table((TPOT,), {"ours": {"tpot": [15.0]}}, "base").splitlines()[2] == "| ours | 15.0 |  |"


def test_a_brief_shows_its_rows_under_its_names_and_compares_nothing_without_a_baseline():
    brief = Brief(scenario="busy", rows={"b": "ours", "a": "theirs"}, columns=(HITS,))
    figures = {"idle": {}, "busy": {name: {"tpot": [1.0], "hits": [0.5]} for name in ("a", "b", "c")}}
    section = Section(part=PART, baseline="a", columns=(TPOT,), brief=brief)
    assert short_table(section, Run({}, figures), "").splitlines() == [
        "|  | hits, % |",
        "|---|---|",
        "| ours | 50 |",
        "| theirs | 50 |",
    ]


def test_render_replaces_what_stands_between_the_marks_and_nothing_else(tmp_path):
    record(tmp_path / "raw", {"base": [1.0, 3.0], "ours": [2.0, 2.0]}, finish=True)
    step = Column(header="ms", figure="itl_ms_p50")
    sections = [Section(part=PART, baseline="base", columns=(step,), folder="raw")]
    text = f"before\n<!-- begin {PART}-summary -->\nold\n<!-- end {PART}-summary -->\nafter\n"
    made = render("README.md", text, sections, tmp_path)
    assert made.startswith(f"before\n<!-- begin {PART}-summary -->\n1 request:")
    assert made.endswith(f"([raw](raw/{PART}.jsonl)).</sub>\n<!-- end {PART}-summary -->\nafter\n")
    assert "old" not in made
    assert render("README.md", made, sections, tmp_path) == made


def test_what_was_not_measured_is_told(tmp_path):
    text = f"<!-- begin {PART} -->\n<!-- end {PART} -->"
    assert "Not measured yet." in render("README.md", text, SECTIONS, tmp_path)


def test_what_lora_adds_is_set_against_the_same_server_round_by_round():
    steps = {"vLLM, no LoRA": [9.0, 9.0], "vLLM, base model": [10.0, 20.0], "vLLM, plain": [13.0, 21.0]}
    measured = {"Batch 8": {name: {"step_ms": values} for name, values in steps.items()}}
    assert lora_adds("step_ms", measured) == {LORA_ADDS: {"vLLM, plain": {"added, Batch 8": [3.0, 1.0]}}}


def test_a_server_that_is_not_named_has_the_base_model_that_is_not_named_either():
    steps = {"base model": [1.0], "4 plain": [3.0], "one by one, base model": [10.0], "one by one, 4 plain": [30.0]}
    measured = {"Batch 1": {name: {"itl": values} for name, values in steps.items()}}
    assert lora_adds("itl", measured) == {
        LORA_ADDS: {"4 plain": {"added, Batch 1": [2.0]}, "one by one, 4 plain": {"added, Batch 1": [20.0]}}
    }
