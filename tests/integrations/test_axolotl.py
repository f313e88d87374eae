"""The plug-in for axolotl, in a stand-in for its plug-in API: its base class, and its trainer's factories."""

import importlib
import sys
import types

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed; `make test-integrations` installs it")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is in the dev extra")

from askew_cuda.wrappers import unwrap
from tests.integrations.tiny import InOrder, trainer


class Axolotls(InOrder):
    """axolotl calls a factory with the model and its arguments."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            factory, keywords = self.optimizer_cls_and_kwargs
            self.optimizer = factory()(self.model, self.args, **keywords)
        return self.optimizer


@pytest.fixture
def plugin(monkeypatch):
    """The module of the plug-in, beside a stand-in for axolotl."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    monkeypatch.delitem(sys.modules, "examples.axolotl_plugin", raising=False)
    yield importlib.import_module("examples.axolotl_plugin")
    sys.modules.pop("examples.axolotl_plugin", None)


def test_the_plug_in_trains_onto_the_levels(plugin, tmp_path):
    made = plugin.AskewPlugin()
    module, _, name = made.get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)(
        askew_weights="ternary/channel",
        askew_packed=str(tmp_path / "model.safetensors"),
        askew_keywords={"low_precision": "nearest", "verbose": False},
    )
    train = trainer(tmp_path, kind=Axolotls)
    made.post_trainer_create(arguments, train)
    train.train()
    optimizer = unwrap(train.optimizer)
    assert optimizer.param_groups[0]["pretrained"] is True
    for weight, codes, levels, scale in optimizer.quantized_parameters():
        assert torch.equal(weight, scale * levels[codes.long()])
    assert (tmp_path / "model.safetensors").exists()


def test_a_rule_for_each_part_and_wrong_types(plugin):
    rules = {"re:.*mlp.*": "ternary", "*": None}
    assert plugin.AskewArgs(askew_weights=rules).askew_weights == rules
    with pytest.raises(ValueError, match="askew_weights"):
        plugin.AskewArgs(askew_weights=3)
