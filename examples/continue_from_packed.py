"""Goes on training from a packed file: a ternary digits model meets mirrored digits, and learns them.

Trains on scikit-learn's digits, saves codes and scales, and forgets everything else. Then the cameras change: all
images are mirrored. A fresh model is read from the file, an optimizer takes over levels and scales, and the ternary
weights leave their levels and find new ones. ``python -m examples.continue_from_packed``
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import askew_cuda as askew
from askew_cuda.packed import load_packed, save_packed
from examples.digits import Data, accuracy, digits, fit, mlp, nothing, steps

HIDDEN, SEED, LR = 64, 0, 0.3


def mirrored(data: Data) -> Data:
    """The same digits, left and right exchanged."""
    mirror = lambda x: x.reshape(-1, 8, 8).flip(2).reshape(-1, 64)  # noqa: E731
    return replace(data, train_x=mirror(data.train_x), test_x=mirror(data.test_x))


def train(model: torch.nn.Module, groups: list[dict], data: Data) -> askew.AskewSGD:
    """Trains until every quantized weight is on a level."""
    optimizer = askew.AskewSGD(groups, lr=LR, momentum=0.9)
    fit(model, data, optimizer, SEED, askew.Anneal(optimizer, total_steps=steps(data)), nothing)
    report = optimizer.finalize()
    if report.share_on_level < 1:
        raise AssertionError(f"only {report.share_on_level:.4%} of the weights had reached their levels")
    return optimizer


def all_codes(optimizer: askew.AskewSGD) -> list[Tensor]:
    """The codes of every quantized weight."""
    return [codes for _, codes, _, _ in optimizer.quantized_parameters()]


def main(folder: Path) -> tuple[float, float, float, int]:
    """Accuracy in per cent: on the digits, on mirrored ones before and after training on; and the number of codes that
    changed.
    """
    old, new = digits(SEED), mirrored(digits(SEED))
    torch.manual_seed(SEED)
    model = mlp(HIDDEN)
    optimizer = train(model, askew.param_groups(model, {"*": "ternary"}, verbose=False), old)
    save_packed(model, optimizer, folder / "digits.safetensors")
    first, weights = accuracy(model, old), sum(weight.numel() for weight in model.parameters())
    size = (folder / "digits.safetensors").stat().st_size
    print(f"digits           {first:5.1f} %   {size:,} bytes on disk, {4 * weights:,} in float32")

    again = mlp(HIDDEN)
    groups = load_packed(folder / "digits.safetensors", again)
    before = accuracy(again, new)
    print(f"mirrored digits  {before:5.1f} %   from the packed file, as it is")
    codes = all_codes(optimizer)
    optimizer = train(again, groups, new)
    after = accuracy(again, new)
    changed = sum(int((now != then).sum()) for now, then in zip(all_codes(optimizer), codes, strict=True))
    total = sum(then.numel() for then in codes)
    print(
        f"mirrored digits  {after:5.1f} %   trained on: {changed:,} of {total:,} codes changed, every weight on a level"
    )
    save_packed(again, optimizer, folder / "mirrored.safetensors")
    return first, before, after, changed


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
