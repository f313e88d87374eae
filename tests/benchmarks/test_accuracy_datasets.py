"""The data of the accuracy table: parts that don't overlap, splits of their seeds, and what is said where they are not
here."""

import gzip

import pytest
import torch

pytest.importorskip("psutil", reason="the benchmarks' extra is not installed: pip install '.[bench]'")
pytest.importorskip("sklearn", reason="the benchmarks' extra is not installed: pip install '.[bench]'")

from benchmarks.accuracy import datasets, tasks
from examples import glosses

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


@pytest.fixture(params=[datasets.FASHION_MNIST, datasets.MNIST], ids=lambda files: files.name)
def four_files(request, tmp_path, monkeypatch):
    """Either set in its own format, but of ten and five random images, in a folder that its variable names."""
    generator, written = torch.Generator().manual_seed(0), {}
    for part, count in (("train", 10), ("t10k", 5)):
        for kind, shape, header, top in (("images-idx3", (count, 784), 16, 256), ("labels-idx1", (count,), 8, 10)):
            values = torch.randint(top, shape, generator=generator, dtype=torch.uint8)
            content, packed = bytes(header) + bytes(values.flatten().tolist()), request.param is datasets.FASHION_MNIST
            name = f"{part}-{kind}-ubyte" + (".gz" if packed else "")
            (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
            written[part, kind] = values
    monkeypatch.setenv(request.param.variable, str(tmp_path))
    monkeypatch.setattr(datasets, "_read", datasets._read.__wrapped__)
    return request.param, written


def test_images_are_read_from_their_four_files(four_files, monkeypatch):
    files, written = four_files
    data = datasets.four_files(files, (1, 28, 28))((0, 1), False)
    assert data.train_x.shape == (2, 10, 1, 28, 28)
    assert data.held_x.shape == (2, 5, 1, 28, 28)
    assert torch.equal(data.held_y[1], written["t10k", "labels-idx1"].long())
    pixels = written["train", "images-idx3"].float()
    torch.testing.assert_close(data.train_x[1].flatten(1), (pixels - pixels.mean()) / pixels.std())
    tuning = datasets.four_files(files, (784,))((0,), True)
    assert tuning.train_x.shape == (1, 8, 784)
    assert torch.equal(tuning.held_y[0], written["train", "labels-idx1"][8:].long())
    monkeypatch.setenv(files.variable, "nowhere")
    with pytest.raises(datasets.Missing, match=rf"{files.name}: .*; {files.package}, .* {files.variable}$"):
        datasets.four_files(files, (784,))((0,), False)


WORDS = ("dog", "cat", "bird", "tree")


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """Definitions of a few words, 25 of each of four classes, in WordNet's format; and MiniLM's folder, with a
    tokenizer that knows these words.
    """
    tokenizers = pytest.importorskip("tokenizers", reason="the extra dev is not installed")
    for number, part in enumerate(("noun", "verb", "adj", "adv")):
        lines = [f"0000 {number:02} n | a {WORDS[(number + each) % 4]}, {each}" for each in range(25)]
        (tmp_path / f"data.{part}").write_text("\n".join(["  1 the licence", *lines]))
    vocabulary = {"[PAD]": 0, "?": 1, "a": 2} | {word: 3 + place for place, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setenv(glosses.WORDNET, str(tmp_path))
    monkeypatch.setattr(glosses, "folder", lambda: tmp_path)
    for read in ("_tokens", "_glosses"):
        monkeypatch.setattr(datasets, read, getattr(datasets, read).__wrapped__)


def test_definitions_that_train_choose_and_test_are_others(wordnet):
    tokens, classes = datasets._tokens(4)
    assert tokens[:2].tolist() == [[2, 3, 1, 1], [2, 4, 1, 1]]  # a dog, 0: cut or padded to four
    assert classes.tolist() == [each for each in range(4) for _ in range(25)]
    report, tune = (datasets.definitions(80, 5, 3)((1, 2), tuning) for tuning in (False, True))
    assert report.train_x.shape == (2, 80, 3)
    assert not torch.equal(report.train_y[0], report.train_y[1])
    assert torch.equal(report.held_y[0], report.held_y[1])
    parts = glosses.splits(100)
    assert torch.equal(report.held_y[0], classes[parts[2]])
    assert torch.equal(tune.held_y[0], classes[parts[1]])
    assert torch.equal(report.train_y, tune.train_y)
    whole = datasets.definitions(90, 5, 3)((7,), False)
    assert torch.equal(whole.train_y[0].bincount(), classes[parts[0]].bincount())  # each once


def test_a_dictionary_is_every_definition_once(wordnet):
    symbols = datasets._glosses()
    lines = "".join("\n" if each == 95 else chr(32 + each) for each in symbols.tolist()).split("\n")
    assert lines != glosses.glosses()[0]  # they are sorted by class
    assert sorted(lines) == sorted(glosses.glosses()[0])
    tune, report = (datasets.dictionary(8)((0,), tuning) for tuning in (True, False))
    assert torch.equal(torch.cat([tune.train, tune.held, report.held]), symbols)
