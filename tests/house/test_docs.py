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

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
RUN_HERE = [page for page in PAGES if page.parent.name != "trainers"]  # theirs run in tests/integrations


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.name)
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
