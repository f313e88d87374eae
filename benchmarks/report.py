"""Writes every table and plot of README and docs from the committed results.    python -m benchmarks.report

A table stands between <!-- figure: NAME --> and <!-- end -->; a test (tests/benchmarks/test_figures.py) holds it to the
results.
"""

import re
from pathlib import Path

from benchmarks import front_page, showcase
from benchmarks.accuracy import score_tables, targets
from benchmarks.plots import PLOTS, digest, svg_of
from benchmarks.speed import roofline, timing_tables

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"(<!-- figure: ([\w-]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
EVERY_FIGURE = {
    **front_page.FIGURES,
    **showcase.FIGURES,
    **timing_tables.FIGURES,
    **score_tables.FIGURES,
    "accuracy-targets": targets.targets_table,
    "roofline": roofline.roofline_table,
    "roofline-gpu": lambda: roofline.roofline_table("cuda"),
    "explanations": roofline.explanations,
    "bottlenecks": roofline.bottlenecks_table,
}


def regenerated(text: str) -> str:
    """The page with every figure as the results give it."""

    def replace(found: re.Match[str]) -> str:
        name = found[2]
        if name not in EVERY_FIGURE:
            raise ValueError(f"report: no figure is named {name!r}; there are {', '.join(EVERY_FIGURE)}")
        return found[1] + EVERY_FIGURE[name]() + "\n" + found[3]

    return BLOCK.sub(replace, text)


def main() -> None:
    for page in PAGES:
        page.write_text(regenerated(page.read_text()))
    for path, series in PLOTS.items():
        data = series()
        if not (ROOT / path).exists() or digest(data) not in (ROOT / path).read_text():
            (ROOT / path).write_text(svg_of(data))
    print("written:", *(page.relative_to(ROOT) for page in PAGES), *PLOTS)
    if roofline.UNEXPLAINED in (ROOT / "docs/roofline.md").read_text():
        print(f"docs/roofline.md: a gap is {roofline.UNEXPLAINED!r}; say why in benchmarks/speed/roofline.py, why()")


if __name__ == "__main__":
    main()
