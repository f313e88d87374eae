"""A type checker finds a wrong keyword in a user's script."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """\
from torch import nn

import askew_cuda as askew

model = nn.Linear(4, 4)
groups = askew.param_groups(model, {"*": "ternary"}, hold=0.5, lr=0.1)
good = askew.AskewSGD(groups, lr=0.1, momentum=0.9, total_steps=100, scale_lr=None, shape=lambda z: 1 - z)
first, second = askew.paper("binary")
also = askew.AskewAdamW(model.parameters(), lr=2.0, pretrained=True, **first, **second)
kept = {"quantizer": "ternary", "hold": 0.5}
askew.monitor(good, every=None).picture().savefig("watch.png")
askew.AskewSGD(groups, total_step=100)  # wrong
askew.AskewAdamW(groups, anneal="captured")  # wrong
askew.param_groups(model, "ternary", recovry=1.0)  # wrong
askew.AskewSGD(groups, betas=(0.9, 0.99))  # wrong
askew.AskewSGD(groups, hold="0.5")  # wrong
"""


def test_mypy_finds_wrong_keywords_and_no_others(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", ROOT / ".mypy_cache", tmp_path / "script.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT), "PATH": ""},
        check=False,
    )
    found = {int(line) for line in re.findall(r"script\.py:(\d+): error", run.stdout)}
    wrong = {number for number, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")}
    assert found == wrong, run.stdout + run.stderr
