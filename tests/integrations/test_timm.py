"""timm's factory: our names in it, with groups that know layers, and no others."""

import functools

import pytest
import torch

timm = pytest.importorskip("timm", reason="timm is not installed; it is in the dev extra")

from timm.optim import create_optimizer_v2, list_optimizers

import askew_cuda as askew
import askew_cuda.integrations.timm

assert askew_cuda.integrations.timm.askew_sgd


def network():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=4)


GROUPS = functools.partial(askew.param_groups, weights="ternary/channel", no_decay=True, verbose=False)


@pytest.mark.parametrize(
    ("name", "rule", "keywords"),
    [("askewsgd", askew.AskewSGD, {"momentum": 0.8}), ("askewadamw", askew.AskewAdamW, {"betas": (0.9, 0.95)})],
)
def test_the_factory_makes_what_our_constructor_makes(name, rule, keywords):
    assert name in list_optimizers("askew*")
    made = create_optimizer_v2(
        network(), name, lr=0.1, weight_decay=0.05, total_steps=20, param_group_fn=GROUPS, **keywords
    )
    mine = rule(GROUPS(network()), lr=0.1, weight_decay=0.05, total_steps=20, **keywords)
    assert type(made) is rule
    assert {group["weight_decay"] for group in made.param_groups} == {0.0, 0.05}
    for one, other in zip(made.param_groups, mine.param_groups, strict=True):
        assert one.keys() == other.keys()
        assert all(one[key] == other[key] for key in one if key != "params")


def test_it_trains():
    model = network()
    optimizer = create_optimizer_v2(model, "askewadamw", lr=0.03, total_steps=40, param_group_fn=GROUPS)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert optimizer.finalize().share_on_level == 1


@pytest.mark.parametrize("keywords", [{}, {"quantizer": "ternary"}, {"quantizer": "ternary", "param_group_fn": GROUPS}])
@pytest.mark.parametrize("name", ["askewsgd", "askewadamw"])
def test_groups_that_know_no_layers_are_refused(name, keywords):
    with pytest.raises(ValueError, match=r"param_group_fn=functools.partial\(askew_cuda.param_groups"):
        create_optimizer_v2(network(), name, lr=0.1, weight_decay=0.05, **keywords)
