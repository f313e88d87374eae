"""The pages of docs/trainers: every Python block runs, in order."""

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parent.parent.parent / "docs" / "trainers").glob("*.md"))
# What a page needs beside the library that its name says.
NEEDED = {"axolotl": (), "onnx": ("onnxscript", "onnxruntime"), "transformers": ("transformers", "accelerate")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    for library in NEEDED.get(page.stem, (page.stem,)):
        pytest.importorskip(library, reason=f"{library} is not installed; `make test-integrations` installs it")
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks or page.stem == "axolotl"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), namespace)
