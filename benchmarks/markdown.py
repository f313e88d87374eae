"""Markdown, as README and docs have it."""

from collections.abc import Iterable


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table: one line for the header, one for each row.

    Raises: ValueError: a row has more or fewer cells than the header.
    """
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"markdown_table: the row {line} has {len(line)} cells; {header} has {len(header)}")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
