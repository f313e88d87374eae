"""Docstrings as they are written for help() and for editors -> Markdown, before mkdocstrings reads them."""

import re

import griffe

import askew_cuda

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")
DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", flags=re.MULTILINE)
KEYWORD = re.compile(r"^(?!https?:)([a-z_]+(?:, [a-z_]+)*): (?=\S)", flags=re.MULTILINE)
SECTION = re.compile(r"^( *)(Raises|Returns): (\S.*(?:\n\1    .*)*)$", flags=re.MULTILINE)
ERROR = r"[A-Z]\w*Error(?:, \w+)*: "
NEXT = re.compile(rf"(?<=\.) (?={ERROR})")
PAGES = {name: f"askew_cuda.{name}" for name in askew_cuda.__all__} | {"Keywords": "askew_cuda.typed_keywords.Keywords"}


def _role(found: re.Match[str]) -> str:
    name = found[1].removeprefix("askew_cuda.")
    last = name.rsplit(".", 1)[-1]
    return f"[`{last}`][{PAGES[last]}]" if last in PAGES else f"`{name}`"


def _doctest(found: re.Match[str]) -> str:
    indent = found[1]
    return f"{indent}```pycon\n{found[0]}\n{indent}```"


def _section(found: re.Match[str]) -> str:
    """What stands behind the title of a section -> lines below it, one for each kind of error."""
    indent, title, text = found[1], found[2], re.sub(r"\s+", " ", found[3])
    items = NEXT.split(text) if title == "Raises" else [text]
    if title == "Raises" and not all(re.match(ERROR, item) for item in items):
        return found[0]
    return "\n".join([f"{indent}{title}:", *(f"{indent}    {item}" for item in items)])


class Markdown(griffe.Extension):
    """Roles become links, examples code, sections sections; the keywords of Keywords a list."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is None:
            return
        text = SECTION.sub(_section, DOCTEST.sub(_doctest, ROLE.sub(_role, obj.docstring.value)))
        if obj.name == "Keywords":
            text = KEYWORD.sub(r"\n- **\1**: ", text)
        obj.docstring.value = text
