"""examples/llama_ternary.py, as torchrun runs it: left off and started again it ends as the run that was not, and its
packed file is read where nothing is sharded."""

import math

import torch

import askew_cuda as askew
from examples import llama_ternary
from tests.distributed.processes import world

SMALL = ["--steps", "40", "--every", "20", "--batch", "2", "--width", "32", "--layers", "1"]


def run(*arguments: str) -> tuple:
    return llama_ternary.main([*SMALL, *arguments])


def held_out() -> torch.Tensor:
    return llama_ternary.pieces(llama_ternary.text()[1], 64, 0)


def test_it_trains_leaves_off_goes_on_and_writes_one_file(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    both = world(2)
    ends = both(run, "--folder", str(straight))
    (before, halfway, report), _ = both(run, "--folder", str(broken), "--stop", "10")
    assert report is None
    assert [path.name for path in broken.iterdir()] == ["step-000010"]
    again = both(run, "--folder", str(broken))
    assert again == ends
    assert again[0] == again[1]
    _, after, report = again[0]
    assert after < halfway < before
    assert report.share_on_level == 1.0
    assert report.never_stepped == ()
    files = [(folder / "model.safetensors").read_bytes() for folder in (straight, broken)]
    assert files[0] == files[1]
    model = llama_ternary.Llama(32, 1)
    askew.load_packed(straight / "model.safetensors", model)
    tokens = torch.cat(both(held_out))
    assert len(tokens) == 64
    assert tokens.max() < 256
    with torch.no_grad():
        assert math.isclose(float(model(tokens)) / math.log(2), after, rel_tol=1e-5)
