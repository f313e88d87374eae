"""What the site has beside the pages of docs/, by MkDocs' hooks.

Files that lie elsewhere in the repository become pages, links to them lead there, and drawings stand within the page,
in its colours.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent.parent
# Page of the site -> file of the repository.
ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"} | {
    f"examples/{path.stem}.md": f"examples/{path.name}" for path in sorted(ROOT.glob("examples/[a-z]*.py"))
}
PAGE_OF = {path: page for page, path in ELSEWHERE.items()}
LINK = re.compile(r"(?<!!)\[([^\]\[]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
DRAWING = re.compile(r'<p>\s*<img alt="([^"]*)" src="(?:\.\./)*pictures/([\w-]+\.svg)"[^>]*>\s*</p>')


def on_files(files, config):
    for page, path in ELSEWHERE.items():
        text = (ROOT / path).read_text()
        files.append(File.generated(config, page, content=text if path.endswith(".md") else example(path, text)))
    return files


def example(path: str, text: str) -> str:
    """The page of a script: its docstring, and the rest as it is."""
    _, about, code = text.split('"""', 2)
    run = (
        f"    python -m {path.removesuffix('.py').replace('/', '.')}\n\n" if 'if __name__ == "__main__"' in code else ""
    )
    return f"# {Path(path).stem}\n\n{about.strip()}\n\n{run}```python\n{code.strip()}\n```\n"


def on_page_markdown(markdown, page, config, files):
    """Links by where files lie in the repository -> links by where their pages are."""
    here = page.file.src_uri
    source = ELSEWHERE.get(here, f"docs/{here}")

    def replace(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = PAGE_OF.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if there is not None:
            return f"[{text}]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{anchor})"
        if not (ROOT / path).exists():
            return found[0]  # which MkDocs finds out
        repository = os.environ.get("REPOSITORY")
        return f"[{text}]({repository}/blob/main/{path})" if repository else text

    return LINK.sub(replace, markdown)


def on_page_content(html, page, config, files):
    def replace(found: re.Match[str]) -> str:
        svg = (ROOT / "docs/pictures" / found[2]).read_text()
        return f'<figure role="img" aria-label="{found[1]}">{svg[svg.index("<svg") :]}</figure>'

    return DRAWING.sub(replace, html)
