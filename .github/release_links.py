"""Writes the repository's address, which only a release knows, into the checkout that is about to be built.

python .github/release_links.py https://example.org/owner/askew_cuda v0.2.0

README's links become absolute, since an index shows it without the files beside it, and pyproject.toml gets the
project's addresses.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RELATIVE = re.compile(r'(\]\(|src="|srcset="|href=")(?![a-z]+:|#)([^)"#\s]+)')
PICTURES = (".png", ".svg")


def absolute(markdown: str, address: str, tag: str) -> str:
    """The text with every link to a file of the repository as it is at the tag."""

    def replace(found: re.Match[str]) -> str:
        kind = "raw" if found[2].endswith(PICTURES) else "blob"
        return f"{found[1]}{address}/{kind}/{tag}/{found[2]}"

    return RELATIVE.sub(replace, markdown)


def with_addresses(pyproject: str, address: str, tag: str) -> str:
    """The settings with the project's addresses beside the paper's."""
    lines = {
        "Repository": address,
        "Documentation": f"{address}/tree/{tag}/docs",
        "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    added = "".join(f'{name} = "{each}"\n' for name, each in lines.items())
    return re.sub(r"^(\[project\.urls\].*\n)", lambda found: found[1] + added, pyproject, flags=re.MULTILINE)


def main(root: Path, address: str, tag: str) -> None:
    for name, change in (("README.md", absolute), ("pyproject.toml", with_addresses)):
        (root / name).write_text(change((root / name).read_text(), address, tag))


if __name__ == "__main__":
    main(ROOT, *sys.argv[1:])
