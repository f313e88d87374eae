"""askew-cuda doctor and askew-cuda inspect."""

import subprocess
import sys

import pytest
import torch

from askew_cuda import doctor, ops
from askew_cuda.cli import main


def test_doctor_names_what_is_here_and_why_the_rest_is_not(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in text
    assert "self-test: 64 of 64 cases equal the reference bit for bit" in text
    for backend in ("cuda", "triton"):
        assert any(line.startswith(backend) and "absent: " in line for line in text.splitlines())


def test_doctor_finds_a_backend_that_differs(monkeypatch, capsys):
    def off_by_one_bit(weights, *lists, **settings):
        ops.reference.sgd_(weights, *lists, **settings)
        weights[0].view(torch.int32 if weights[0].dtype == torch.float32 else torch.uint8)[0] += 1

    fine = ops.operators
    broken = ops.Operators(off_by_one_bit, fine("cpu").adamw_)
    monkeypatch.setattr(ops, "operators", lambda backend: broken if backend == "cpu" else fine(backend))
    assert doctor.doctor() == 1
    text = capsys.readouterr().out
    assert "self-test: 32 of 64 cases" in text
    assert "DIFFERS: torch.float32 sgd nf4 interval" in text


def test_the_command_runs_and_explains_itself():
    run = subprocess.run([sys.executable, "-m", "askew_cuda.cli", "--help"], capture_output=True, text=True, check=True)
    assert "doctor" in run.stdout
    with pytest.raises(SystemExit):
        main(["operate"])
