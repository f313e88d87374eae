"""The files of the accuracy table's cells: a line each, and nothing is lost whoever dies or writes at the same time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.accuracy import store

ROOT = Path(__file__).parents[2]
WRITER = """
import os, sys
from pathlib import Path
from benchmarks.accuracy import store
folder, method, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if method == "killed":
    os.fsync = lambda descriptor: os._exit(9)
for score in range(count):
    name = {"task": "cnn", "start": "scratch", "width": "binary", "method": f"{method} {score}"}
    store.put(folder, name | {"scores": [score] * 1000})
"""


def cell(task: str, width: str, method: str, **more: object) -> store.Cell:
    return {"task": task, "start": "scratch", "width": width, "method": method, **more}


def writer(folder: Path, method: str, count: int) -> subprocess.Popen:
    """A process of its own that writes so many cells, one after the other."""
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), method, str(count)], cwd=ROOT)


def test_a_file_per_task_and_a_line_per_cell_in_order(tmp_path):
    written = [cell("cnn", "ternary", "STE"), cell("cnn", "binary", "STE"), cell("digits-16", "binary", "PARQ")]
    for each in written:
        store.put(tmp_path / "new", each)
    assert sorted(each.name for each in (tmp_path / "new").iterdir()) == ["cnn.jsonl", "digits-16.jsonl"]
    lines = (tmp_path / "new" / "cnn.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [written[1], written[0]]
    assert store.read(tmp_path / "new") == {store.key_of(each): each for each in written}


def test_a_cell_that_changes_changes_its_line_alone(tmp_path):
    for width in ("ternary", "binary", "2bit"):
        store.put(tmp_path, cell("cnn", width, "STE", tried=[{"setting": 0.1}], scores=[1 / 3, float("nan")]))
    before = store.path(tmp_path, "cnn").read_text().splitlines()
    store.put(tmp_path, cell("cnn", "binary", "STE", tried=[{"setting": 0.1}, {"setting": 0.3}], scores=[2 / 3]))
    after = store.path(tmp_path, "cnn").read_text().splitlines()
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert store.find(tmp_path, ("cnn", "scratch", "binary", "STE"))["scores"] == [2 / 3]
    store.remove(tmp_path, ("cnn", "scratch", "binary", "STE"))
    assert store.path(tmp_path, "cnn").read_text().splitlines() == [before[0], before[2]]
    store.remove(tmp_path, ("cnn", "scratch", "4bit", "STE"))
    assert len(store.read(tmp_path)) == 2


def test_what_was_never_written_is_not_there(tmp_path):
    assert store.read(tmp_path / "nowhere") == {}
    assert store.find(tmp_path, ("cnn", "scratch", "binary", "STE")) is None


def test_a_writer_that_dies_leaves_what_was_there(tmp_path):
    """It is killed when it has written its copy, before this takes the file's place, and while it holds the lock."""
    store.put(tmp_path, cell("cnn", "binary", "STE", scores=[1.0]))
    before = store.path(tmp_path, "cnn").read_bytes()
    assert writer(tmp_path, "killed", 1).wait() == 9
    assert store.path(tmp_path, "cnn").read_bytes() == before
    assert len(store.read(tmp_path)) == 1
    store.put(tmp_path, cell("cnn", "binary", "PARQ", scores=[2.0]))
    assert [key[3] for key in store.read(tmp_path)] == ["PARQ", "STE"]
    assert [each.name for each in tmp_path.iterdir()] == ["cnn.jsonl"]


def test_a_writer_that_cannot_finish_leaves_what_was_there(tmp_path):
    store.put(tmp_path, cell("cnn", "binary", "STE"))
    before = store.path(tmp_path, "cnn").read_bytes()
    with pytest.raises(TypeError):
        store.put(tmp_path, cell("cnn", "binary", "PARQ", scores=object()))
    assert store.path(tmp_path, "cnn").read_bytes() == before


def test_two_workers_keep_each_others_cells(tmp_path):
    count = 60
    workers = [writer(tmp_path, name, count) for name in ("one", "two")]
    assert [worker.wait() for worker in workers] == [0, 0]
    found = store.read(tmp_path)
    assert {key[3] for key in found} == {f"{name} {score}" for name in ("one", "two") for score in range(count)}
    assert all(each["scores"] == [int(each["method"].split()[1])] * 1000 for each in found.values())
