"""Documentation that can be wrong is executed: every Python block of the Markdown files, and every docstring
example.
"""

import doctest
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import askew_cuda
from docs.site import pictures

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
RUN_HERE = [page for page in PAGES if page.parent.name != "trainers"]  # theirs run in tests/integrations


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks or page.name != "README.md"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), namespace)


MODULES = [
    each.name for each in pkgutil.walk_packages(askew_cuda.__path__, "askew_cuda.") if not each.name.endswith("._C")
]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    if module.startswith("askew_cuda.triton."):
        pytest.importorskip("triton", reason="triton is not installed: `pip install triton`, or the dev extra")
    if module.startswith("askew_cuda.integrations.") or module == "askew_cuda.packed.pretrained":
        assert ">>> " not in importlib.util.find_spec(module).loader.get_source(module)  # its library may be absent
        return
    failed, _ = doctest.testmod(importlib.import_module(module))
    assert failed == 0


def test_links_between_files_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_public_name_has_a_docstring():
    for name in askew_cuda.__all__:
        assert getattr(askew_cuda, name).__doc__, name


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text() for page in ROOT.glob("docs/reference/*.md"))
    named = set(re.findall(r"^::: askew_cuda\.(\w+)$", pages, flags=re.MULTILINE))
    assert set(askew_cuda.__all__) <= named


def test_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


PICTURES = ROOT / "docs/pictures"


def test_every_picture_is_drawn_by_a_script_and_shown():
    shown = set(re.findall(r"!\[[^\]]+\]\([^)]*?([\w-]+\.(?:svg|png))\)", "".join(page.read_text() for page in PAGES)))
    assert {path.name for path in PICTURES.iterdir()} == {*(f"{name}.svg" for name in pictures.PICTURES), "digits.png"}
    assert {path.name for path in PICTURES.iterdir()} <= shown


@pytest.mark.parametrize("name", ["feasible-set", "two-annealings"])
def test_a_picture_takes_the_colour_of_the_text_around(name):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: `pip install matplotlib`, or the demo extra")
    for svg in (pictures.svg_of(name), (PICTURES / f"{name}.svg").read_text()):
        assert svg.count("currentColor") > 20
        assert "prefers-color-scheme:dark" in svg
        assert "#000000" not in svg
