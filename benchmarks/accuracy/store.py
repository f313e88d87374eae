"""The cells of the accuracy table on disk: one file per task, one cell per line of JSON, sorted.

A writer works on a copy of the file and puts it in the file's place, so that a reader, and whoever comes after a writer
that was killed, finds all lines of before or all of after. Writers wait for each other: none loses another's cell.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Key = tuple[str, str, str, str]  # task, start, width, method
Cell = dict[str, Any]


def key_of(cell: Cell) -> Key:
    """What names a cell."""
    return cell["task"], cell["start"], cell["width"], cell["method"]


def path(folder: Path, task: str) -> Path:
    """The file of a task."""
    return folder / f"{task}.jsonl"


def read(folder: Path) -> dict[Key, Cell]:
    """All cells that are there."""
    cells = (json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines())
    return {key_of(cell): cell for cell in cells}


def find(folder: Path, key: Key) -> Cell | None:
    """One cell, None where it is not there."""
    line = _lines(path(folder, key[0])).get(key)
    return None if line is None else json.loads(line)


def put(folder: Path, cell: Cell) -> None:
    """Writes one cell, in the place of one with the same key. All other lines stay as they are."""
    line = json.dumps(cell, default=dataclasses.asdict)
    _change(folder, cell["task"], lambda lines: lines | {key_of(cell): line})


def remove(folder: Path, key: Key) -> None:
    """Removes one cell, where it is there."""
    _change(folder, key[0], lambda lines: {other: line for other, line in lines.items() if other != key})


def as_read(data: Any) -> Any:
    """What comes back when this is written and read."""
    return json.loads(json.dumps(data, default=dataclasses.asdict))


def _lines(file: Path) -> dict[Key, str]:
    return {key_of(json.loads(line)): line for line in file.read_text().splitlines()} if file.exists() else {}


def _change(folder: Path, task: str, change: Callable[[dict[Key, str]], dict[Key, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        file = path(folder, task)
        lines = change(_lines(file))
        unfinished = file.with_suffix(".unfinished")
        with unfinished.open("w") as stream:
            stream.writelines(lines[key] + "\n" for key in sorted(lines))
            stream.flush()
            os.fsync(stream.fileno())  # a new name must not reach the disk before its content
        unfinished.replace(file)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the lock of the folder; the system gives it back when a process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
