"""askew-cuda doctor, askew-cuda inspect and askew-cuda export."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import askew_cuda as askew
from askew_cuda import backends, doctor
from askew_cuda.cli import main
from askew_cuda.packed.export import load_gguf


def test_doctor_names_what_is_here_and_why_the_rest_is_not(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in text
    assert "self-test: 64 of 64 cases equal the reference bit for bit" in text
    for backend in ("cuda", "triton"):
        expected = (
            "absent: " if backends.absent(backend, torch.device("cuda"), torch.float32) else "present; self-test: "
        )
        assert any(line.startswith(backend) and expected in line for line in text.splitlines())
    assert f"triton        {backends.triton_version() or 'not installed'}" in text


def test_doctor_finds_a_backend_that_differs(monkeypatch, capsys):
    def off_by_one_bit(weights, *lists, **settings):
        backends.reference.sgd_(weights, *lists, **settings)
        weights[0].view(torch.int32 if weights[0].dtype == torch.float32 else torch.uint8)[0] += 1

    fine = backends.operators
    broken = backends.Operators(off_by_one_bit, fine("cpu").adamw_)
    monkeypatch.setattr(backends, "operators", lambda backend: broken if backend == "cpu" else fine(backend))
    assert doctor.doctor() == 1
    text = capsys.readouterr().out
    assert "self-test: 32 of 64 cases" in text
    assert "DIFFERS: torch.float32 sgd nf4 interval" in text


def test_the_command_runs_and_explains_itself():
    run = subprocess.run([sys.executable, "-m", "askew_cuda", "--help"], capture_output=True, text=True, check=True)
    assert "doctor" in run.stdout
    with pytest.raises(SystemExit):
        main(["operate"])


def test_it_says_its_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"askew_cuda {askew.__version__}\n"


def test_doctor_as_plain_data(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["python"]
    assert found["backends"]["cpu"] == {"absent": None, "interpreted": False, "cases": 64, "differs": []}
    assert set(found["backends"]) == set(backends.BACKENDS) - {"reference"}


def packed(tmp_path) -> str:
    model = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(2, 4, bias=False)})
    with torch.no_grad():
        model["a"].weight.copy_(torch.tensor([[1.0, -1, 1, 1], [1, 1, 1, -1]]))
        model["b"].weight.copy_(torch.tensor([[0.5, 0.0], [-0.5, 0.0], [0.0, 0.0], [0.5, 0.5]]))
    rules = {"a.weight": askew.Quantizer("binary", scale=1.0), "b.weight": "ternary/channel"}
    optimizer = askew.AskewSGD(askew.param_groups(model, rules, pretrained=True, verbose=False), epsilon=0.0)
    optimizer.finalize()
    askew.save_packed(model, optimizer, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def test_inspect_shows_what_is_in_a_file(tmp_path, capsys):
    assert main(["inspect", packed(tmp_path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["a.weight"].split() == ["a.weight", "2x4", "binary", "2", "1", "1", "25%", "75%", "5"]
    assert "ternary/channel" in lines["b.weight"]
    assert "12% 50% 38%" in lines["b.weight"]
    assert lines["a.bias"].split() == ["a.bias", "2", "-", "float32", "8"]
    assert "2 quantized tensors, 16 weights" in lines["2"]


def test_inspect_as_plain_data(tmp_path, capsys):
    file = packed(tmp_path)
    assert main(["inspect", "--json", file]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantized"]["a.weight"] == {
        "shape": [2, 4],
        "dtype": "float32",
        "quantizer": "binary",
        "levels": [-1, 1],
        "bits": 1,
        "scale": [1, 1],
        "occupancy": [0.25, 0.75],
        "bytes": 5,
    }
    assert found["plain"] == {"a.bias": {"shape": [2], "dtype": "float32", "bytes": 8}}
    assert (found["tied"], found["weights"]) == ({}, 16)
    assert found["bits_per_weight"] == 8 * (5 + found["quantized"]["b.weight"]["bytes"]) / 16


def test_inspect_of_another_file_says_why(tmp_path, capsys):
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"not a packed file")
    assert main(["inspect", str(path)]) == 1
    assert "other.safetensors" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err


def blocks(tmp_path) -> str:
    """A packed file of rows of 64."""
    model = nn.ModuleDict({"a": nn.Linear(64, 2), "b": nn.Linear(64, 4, bias=False)})
    rules = {"a.weight": askew.Quantizer("int4", scale=0.125), "b.weight": askew.Quantizer("ternary", scale=0.25)}
    groups = askew.param_groups(model, rules, pretrained=True, verbose=False)
    askew.save_packed(model, askew.AskewSGD(groups, lr=0.1), tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def test_export_writes_what_it_says(tmp_path, capsys):
    file, out = blocks(tmp_path), tmp_path / "out"
    assert main(["export", file, "--to", "gguf", "--out", f"{out}.gguf"]) == 0
    assert capsys.readouterr().out.splitlines() == ["a.weight  Q4_0", "b.weight  Q2_0", f"written: {out}.gguf"]
    other = nn.ModuleDict({"a": nn.Linear(64, 2), "b": nn.Linear(64, 4, bias=False)})
    load_gguf(f"{out}.gguf", other)
    assert set(other["b"].weight.unique().tolist()) <= {-0.25, 0.0, 0.25}
    for to in ("compressed-tensors", "mlx"):
        assert main(["export", file, "--to", to, "--out", str(out / to)]) == 0
        assert (out / to / "config.json").exists()
        assert (out / to / "model.safetensors").exists()
    assert "a.weight  4" in capsys.readouterr().out


def test_export_that_can_not_be_says_why(tmp_path, capsys):
    file, out = blocks(tmp_path), str(tmp_path / "out")
    for arguments, said in (
        (["--to", "gguf", "--type", "TQ2_0"], "blocks of 256 don't fit"),
        (["--to", "mlx", "--type", "Q4_0"], "--type goes with --to gguf"),
        (["--to", "onnx"], "needs --template"),
        (["--to", "gguf", "--template", str(tmp_path / "none")], "none"),
    ):
        assert main(["export", file, "--out", out, *arguments]) == 1
        assert f"askew-cuda export: {said}"[:18] in (found := capsys.readouterr().err)
        assert said in found
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["export", file, "--to", "i2_s", "--out", out])
