"""What type checkers and editors read of the keywords is what holds when a script runs."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import askew_cuda as askew
from askew_cuda import optimizers
from askew_cuda.keywords import CONSTRAINT, LAYERS
from askew_cuda.typed_keywords import GroupKeywords, Keywords, TorchKeywords

RULES = (askew.AskewSGD, askew.AskewAdamW)


def test_both_lists_are_the_same():
    assert set(Keywords.__optional_keys__) == set(CONSTRAINT)
    signatures = [inspect.signature(rule.__init__).parameters for rule in RULES]
    torchs = {name for parameters in signatures for name in parameters} - {"self", "params", "constraint"}
    assert set(TorchKeywords.__optional_keys__) == torchs
    decided = {"quantizer", "pretrained", *LAYERS}
    assert set(GroupKeywords.__optional_keys__) == (set(CONSTRAINT) - decided) | torchs


def test_every_keyword_is_explained():
    for name in CONSTRAINT:
        assert re.search(rf"(?<![\w`]){name}(, \w+)*:|``{name}`` ", Keywords.__doc__), name


def test_docstrings_are_there_for_those_who_do_not_run_them():
    tree = ast.parse(Path(optimizers.__file__).read_text())
    written = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    for rule in RULES:
        assert "Keywords" in written[rule.__name__]
        for name in CONSTRAINT:
            assert name in rule.__doc__, name


@pytest.mark.parametrize("rule", RULES)
def test_a_wrong_keyword_is_named(rule):
    with pytest.raises(TypeError, match=f"{rule.__name__}: unknown keywords total_step; beyond"):
        rule([], total_step=3)
