"""Every figure of README and docs is what the committed results give."""

import re

import pytest

pytest.importorskip("scipy", reason="the benchmarks' extra is not installed: pip install '.[bench]'")
pytest.importorskip("psutil", reason="the benchmarks' extra is not installed: pip install '.[bench]'")
pytest.importorskip("sklearn", reason="the benchmarks' extra is not installed: pip install '.[bench]'")

from benchmarks import report
from benchmarks.markdown import markdown_table
from benchmarks.speed import roofline

ROOT = report.ROOT
# What a measured number looks like: decimals, or a unit of time, rate, memory or ratio. Settings of an experiment are
# not among them.
MEASURED = re.compile(r"\d+\.\d+|\d+ ?(?:%|ms\b|us\b|µs\b|ns\b|[MGT]B/s|bytes\b|x\b)")
SETTING = re.compile(r"\b(?:lr|momentum|epsilon) \d+(?:\.\d+)?")


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_tables_are_what_the_results_give(page):
    text = page.read_text()
    assert report.regenerated(text) == text, "run `make figures`"


@pytest.mark.parametrize("path", report.PLOTS)
def test_plots_show_what_the_results_give(path):
    assert report.digest(report.PLOTS[path]()) in (ROOT / path).read_text(), "run `make figures`"


def test_a_row_that_does_not_fit_its_header_is_refused():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    for row in (["1"], ["1", "2", "3"]):
        with pytest.raises(ValueError, match="has 2"):
            markdown_table(["a", "b"], [row])


def test_every_figure_stands_somewhere():
    shown = {name for page in report.PAGES for _, name, _ in report.BLOCK.findall(page.read_text())}
    assert shown == set(report.EVERY_FIGURE)


def stray(text: str) -> list[str]:
    """Numbers that look measured in the section "Why" of a page, outside of what is generated."""
    section = re.split(r"^## ", text.split("\n## Why\n")[1], flags=re.MULTILINE)[0]
    return MEASURED.findall(SETTING.sub("", report.BLOCK.sub("", section)))


def test_no_measured_number_stands_outside_of_what_is_generated():
    text = (ROOT / "README.md").read_text()
    assert stray(text) == []
    planted = text.replace("\n## Why\n", "\n## Why\n\nOur step takes 12 ms, or 1.06 of torch's.\n")
    assert stray(planted) == ["12 ms", "1.06"]


def test_every_gap_of_the_roofline_is_explained():
    assert roofline.UNEXPLAINED not in (ROOT / "docs/roofline.md").read_text()
