"""What a release writes into a checkout, and that the version stands in one place."""

import importlib.util
import re
import shutil
from pathlib import Path

import askew_cuda

ROOT = Path(__file__).parent.parent.parent
ADDRESS = "https://example.org/them/askew_cuda"
_spec = importlib.util.spec_from_file_location("release_links", ROOT / ".github/release_links.py")
release_links = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(release_links)


def test_links_become_absolute():
    given = '[a](docs/a.md#x) [b](https://b.org) [c](#d) ![e](docs/e.png) <img src="docs/f.svg">'
    assert release_links.absolute(given, ADDRESS, "v1") == (
        f"[a]({ADDRESS}/blob/v1/docs/a.md#x) [b](https://b.org) [c](#d) ![e]({ADDRESS}/raw/v1/docs/e.png) "
        f'<img src="{ADDRESS}/raw/v1/docs/f.svg">'
    )


def test_a_release_knows_its_addresses(tmp_path):
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    release_links.main(tmp_path, ADDRESS, "v9.9.9")
    targets = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', (tmp_path / "README.md").read_text())
    links = [one or other for one, other in targets]
    assert f"{ADDRESS}/blob/v9.9.9/CONTRIBUTING.md" in links
    assert all(link.startswith(("https://", "#")) for link in links)
    settings = (tmp_path / "pyproject.toml").read_text()
    urls = settings.split("[project.urls]")[1].split("\n\n")[0]
    assert f'Issues = "{ADDRESS}/issues"' in urls
    assert "proceedings.mlr.press" in urls


def test_the_version_stands_in_one_place():
    (first,) = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[:1]
    assert first == askew_cuda.__version__
    assert "version" not in re.findall(r"^(\w+):", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert not re.search(r'^version\s*=\s*"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
