"""Checkpoints of a training are exported as the packed file of the same moment is; what is none is refused."""

import pickle

import pytest
import torch
from torch import nn

import askew_cuda as askew
from askew_cuda.cli import main
from askew_cuda.packed.export import packed_checkpoint
from askew_cuda.packed.safetensors import TensorWriter

RULES = {"0.weight": "gguf:q4_0", "2.weight": "gguf:q8_0", "*": None}


def trained(rule=askew.AskewSGD, steps=30, **keywords):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    optimizer = rule(askew.param_groups(model, RULES, verbose=False), lr=0.05, total_steps=30, **keywords)
    x, y = torch.randn(16, 64), torch.randn(16, 8)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model, optimizer


def packed_bytes(path) -> bytes:
    with packed_checkpoint(path) as packed, open(packed, "rb") as file:
        return file.read()


@pytest.mark.parametrize("rule", [askew.AskewSGD, askew.AskewAdamW])
def test_a_checkpoint_is_the_packed_file_of_its_moment(rule, tmp_path):
    model, optimizer = trained(rule)
    askew.save_packed(model, optimizer, tmp_path / "packed")
    states = model.state_dict(), optimizer.state_dict()
    torch.save({"model": states[0], "optimizer": states[1], "step": 30}, tmp_path / "a.pt")
    prefixed = {f"_orig_mod.module.{name}": value for name, value in states[0].items()}
    torch.save({"state_dict": prefixed, "optimizer_states": [states[1]], "epoch": 1}, tmp_path / "lightning.ckpt")
    (tmp_path / "checkpoint-30").mkdir()
    torch.save(states[1], tmp_path / "checkpoint-30" / "optimizer.pt")
    with open(tmp_path / "checkpoint-30" / "model.safetensors", "wb") as file:
        described = {name: (value.dtype, tuple(value.shape)) for name, value in states[0].items()}
        writer = TensorWriter(file, described, lambda digests: {})
        for name, value in states[0].items():
            writer.write(name, value)
        writer.finish()
    wanted = (tmp_path / "packed").read_bytes()
    for path in ("packed", "a.pt", "checkpoint-30"):
        assert packed_bytes(tmp_path / path) == wanted
    with packed_checkpoint(tmp_path / "lightning.ckpt") as packed:
        loaded = nn.ModuleDict({"_orig_mod": nn.ModuleDict({"module": trained(steps=0)[0]})})
        askew.load_packed(packed, loaded)
        optimizer.finalize()
        assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


@pytest.mark.filterwarnings("ignore:finalize")
def test_the_command_takes_it(tmp_path, capsys):
    model, optimizer = trained()
    askew.save_packed(model, optimizer, tmp_path / "packed")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    for source in ("packed", "a.pt"):
        assert main(["export", str(tmp_path / source), "--to", "gguf", "--out", str(tmp_path / f"{source}.gguf")]) == 0
        assert "0.weight  Q4_0" in capsys.readouterr().out
    assert (tmp_path / "packed.gguf").read_bytes() == (tmp_path / "a.pt.gguf").read_bytes()


def test_a_checkpoint_in_mid_annealing_says_so(tmp_path):
    model, optimizer = trained(steps=20)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="finalize"), packed_checkpoint(tmp_path / "a.pt"):
        pass


class Other:
    def __reduce__(self):
        return print, ("unpickled",)


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    model, optimizer = trained()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    bare = askew.AskewSGD(model.parameters(), lr=0.1, quantizer="ternary", pretrained=True)
    float_only = torch.optim.SGD(model.parameters(), lr=0.1)
    other = {name.replace("0.", "7."): value for name, value in states["model"].items()}
    groups = [{**group, "quantizer": {"levels": 3}} for group in states["optimizer"]["param_groups"]]
    odd = {index: {**kept, "scale": torch.ones(3)} for index, kept in states["optimizer"]["state"].items()}
    for saved, match in (
        (
            states["model"],
            r"state_dict of a model is needed .* there is none among|an AskewSGD or AskewAdamW is needed",
        ),
        ({**states, "ema": states["model"]}, r"the one state_dict of a model .* there is model, ema"),
        (
            {"model": states["model"]},
            r"an AskewSGD or AskewAdamW is needed beside the other; there is none among model",
        ),
        ([1, 2], r"there is none among list"),
        ({**states, "optimizer": bare.state_dict()}, r"param groups have no names"),
        ({**states, "optimizer": float_only.state_dict()}, r"no weight in the optimizer's state has a scale"),
        ({**states, "model": other}, r"0\.weight, which the optimizer quantizes, is not in the model"),
        ({**states, "optimizer": {**states["optimizer"], "param_groups": groups}}, r"a\.pt: .*levels"),
        ({**states, "optimizer": {**states["optimizer"], "state": odd}}, r"a\.pt: .*scale.* has shape"),
        ({**states, "optimizer": {**states["optimizer"], "param_groups": [{"quantizer": "ternary"}]}}, r"no names"),
        ({**states, "more": Other()}, r"torch\.load reads no tensors and plain values from it"),
    ):
        torch.save(saved, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=match), packed_checkpoint(tmp_path / "a.pt"):
            pass
    assert "unpickled" not in capsys.readouterr().out
    raw = (tmp_path / "a.pt").read_bytes()
    for size in (4, 100, len(raw) // 2, len(raw) - 30):
        (tmp_path / "cut").write_bytes(raw[:size])
        with pytest.raises(ValueError, match="cut: "), packed_checkpoint(tmp_path / "cut"):
            pass
    (tmp_path / "plain").write_bytes(pickle.dumps(Other()))
    assert main(["export", str(tmp_path / "plain"), "--to", "gguf", "--out", str(tmp_path / "x")]) == 1
    assert "unpickled" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError), packed_checkpoint(tmp_path / "nowhere"):
        pass
