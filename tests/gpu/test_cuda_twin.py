"""test_cuda.py on a machine without a GPU: its tensors on the CPU; torch.cuda's streams and graphs are stubs.

What fails here for another reason than the missing device - a warning that is an error, a call that torch refuses, a
wrong expectation - fails on a GPU too. Tests whose subject is the device are named in NEEDS and left out; a capture
steps eagerly here, so that tests of replays end where the first one comes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import EXTENSION

ROOT = Path(__file__).parent.parent.parent
SKIP = """if not CUDA:
    pytest.skip("no GPU that torch can use, or an extension without CUDA kernels", allow_module_level=True)
"""
STUBS = """
from askew_cuda import optimizer, plan
from tests.cases import CAPABILITIES, COMPILED


class _Nothing:
    def __init__(self, *arguments, **keywords): pass
    def __enter__(self): return self
    def __exit__(self, *arguments): pass
    def wait_stream(self, other): pass


class _Graph(_Nothing):
    def replay(self): pytest.skip("graphs are not replayed here")


class _Capture(_Nothing):
    def __enter__(self): self.before, plan.is_captured = plan.is_captured, lambda weights: True
    def __exit__(self, *arguments): plan.is_captured = self.before


for _name, _stub in {
    "set_sync_debug_mode": lambda mode: None, "synchronize": lambda *a: None, "Stream": _Nothing,
    "stream": lambda s: _Nothing(), "current_stream": lambda *a: _Nothing(), "_sleep": lambda cycles: None,
    "CUDAGraph": _Graph, "graph": _Capture, "mem_get_info": lambda *a: (0, 0),
}.items():
    setattr(torch.cuda, _name, _stub)
torch.Tensor.cuda = lambda self, *a, **k: self
optimizer.QuantizedOptimizer._check_weights = lambda *a: None  # it refuses capturable=True on a CPU
CUDA = {"cuda": COMPILED[f"cpu-{CAPABILITIES[0]}"]}
"""
NEEDS = "one_launch or on_two_devices or device_side_overflow or auto_takes_the_gpu"
HERE = {
    'device="cuda"': 'device="cpu"',
    ', "cuda")': ', "cpu")',
    '("cuda", ': '("cpu", ',
    '("cpu", "cuda")': '("cpu", "cpu")',
    'operators("cuda")': 'operators("cpu")',
    '["cuda", "triton"]': '["cpu", "reference"]',
    'torch.device("cuda")': 'torch.device("cpu")',
}


def twin() -> str:
    """The text of test_cuda.py for the CPU."""
    text = (ROOT / "tests/gpu/test_cuda.py").read_text()
    assert SKIP in text, "tests/gpu/test_cuda.py begins otherwise: adapt SKIP"
    text = text.replace(SKIP, STUBS)
    for there, here in HERE.items():
        text = text.replace(there, here)
    return text


@pytest.mark.skipif(EXTENSION is None, reason="the compiled extension is not built")
def test_the_tests_of_the_device_pass_but_for_the_device(tmp_path):
    (tmp_path / "test_twin.py").write_text(twin())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-c",
        ROOT / "pyproject.toml",
    ]
    command += ["--rootdir", ROOT, "-k", f"not ({NEEDS})", tmp_path / "test_twin.py"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths})
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
