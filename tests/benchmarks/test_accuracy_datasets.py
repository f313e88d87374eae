"""The data of the accuracy table: parts that don't overlap, splits of their seeds, and what is said where they are not
here."""

import gzip

import pytest
import torch

pytest.importorskip("psutil", reason="the benchmarks' extra is not installed: pip install '.[bench]'")
pytest.importorskip("sklearn", reason="the benchmarks' extra is not installed: pip install '.[bench]'")

from benchmarks.accuracy import datasets, tasks

TABLES = {"letters": (datasets.letters, 20_000, 8000, 16, 26), "dna": (datasets.dna, 3186, 2400, 180, 3)}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_split_anew_for_each_seed(name):
    sample, rows, train, features, classes = TABLES[name]
    data = sample((0, 1), False)
    assert data.train_x.shape == (2, train, features)
    assert data.held_x.shape == (2, rows - train, features)
    assert data.train_y.unique().tolist() == list(range(classes))
    assert data.train_x.mean(1).abs().max() < 1e-5  # standardised by the training rows
    assert not torch.equal(data.train_y[0], data.train_y[1])
    together = [torch.cat(each).bincount() for each in zip(data.train_y, data.held_y, strict=True)]
    assert torch.equal(*together)  # every row is in one of the two parts
    tuning = sample((1,), True)
    assert torch.equal(torch.cat((tuning.train_x, tuning.held_x), 1)[0], data.train_x[1])
    assert tuning.held_x.shape[1] == train // 5


@pytest.mark.parametrize("name", TABLES)
def test_weights_are_decayed_once_in_a_training(name):
    """lr * weight_decay * steps is 1."""
    task = tasks.TASKS[name]
    assert task.ours.lr * task.ours.weight_decay * task.sample((0,), False).steps(task.length, task.batch) == 1


@pytest.fixture
def four_files(tmp_path, monkeypatch):
    """Fashion-MNIST in its own format, but of ten and five random images, in a folder that the variable names."""
    generator, written = torch.Generator().manual_seed(0), {}
    for part, count in (("train", 10), ("t10k", 5)):
        for kind, shape, header, top in (("images-idx3", (count, 784), 16, 256), ("labels-idx1", (count,), 8, 10)):
            values = torch.randint(top, shape, generator=generator, dtype=torch.uint8)
            content = bytes(header) + bytes(values.flatten().tolist())
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
            written[part, kind] = values
    monkeypatch.setenv(datasets.FASHION_MNIST, str(tmp_path))
    monkeypatch.setattr(datasets, "_fashion_mnist_images", datasets._fashion_mnist_images.__wrapped__)
    return tmp_path, written


def test_fashion_mnist_is_read_from_its_files(four_files):
    folder, written = four_files
    data = datasets.fashion_mnist((1, 28, 28))((0, 1), False)
    assert data.train_x.shape == (2, 10, 1, 28, 28)
    assert data.held_x.shape == (2, 5, 1, 28, 28)
    assert torch.equal(data.held_y[1], written["t10k", "labels-idx1"].long())
    pixels = written["train", "images-idx3"].float()
    torch.testing.assert_close(data.train_x[1].flatten(1), (pixels - pixels.mean()) / pixels.std())
    tuning = datasets.fashion_mnist((784,))((0,), True)
    assert tuning.train_x.shape == (1, 8, 784)
    assert torch.equal(tuning.held_y[0], written["train", "labels-idx1"][8:].long())
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(datasets.Missing, match=r"dataset-fashion-mnist, .* FASHION_MNIST"):
        datasets.fashion_mnist((784,))((0,), False)
