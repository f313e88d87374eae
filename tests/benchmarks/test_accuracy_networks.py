"""Stacked networks of the accuracy table are the plain ones, and every method trains them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("psutil", reason="the benchmarks' extra is not installed: pip install '.[bench]'")
pytest.importorskip("sklearn", reason="the benchmarks' extra is not installed: pip install '.[bench]'")

import askew_cuda as askew
from benchmarks.accuracy import loop, networks, stacked, tasks
from benchmarks.accuracy.methods.latent import Grid
from benchmarks.accuracy.methods.method import Base
from benchmarks.accuracy.methods.ours import Ours, are_normalized
from benchmarks.accuracy.methods.registry import METHODS
from examples import glosses
from tests.benchmarks.small_tasks import CLOSE
from tests.cases import EXTENSION
from tests.layers.architectures import package

SHAPE = {"symbols": 11, "context": 6, "width": 8, "layers": 2, "heads": 2}
NETWORKS = {
    "mlp with BatchNorm": (lambda: networks.mlp_batchnorm(5), lambda: torch.randn(7, 64), 10),
    "cnn": (lambda: networks.cnn(3), lambda: torch.randn(4, 1, 28, 28), 10),
    "cnn without norms": (lambda: networks.cnn(3, norms=False), lambda: torch.randn(4, 1, 28, 28), 10),
    "transformer": (lambda: networks.Transformer(**SHAPE, gpt2=True), lambda: torch.randint(11, (3, 6)), 11),
    "transformer, default init": (
        lambda: networks.Transformer(**SHAPE, gpt2=False),
        lambda: torch.randint(11, (3, 6)),
        11,
    ),
    "encoder": (lambda: networks.Encoder(11, 6, 8, 2, 2, 16, 5), lambda: ended(torch.randint(1, 11, (3, 6))), 5),
}


def ended(tokens):
    """Texts of one, two, three tokens and so on."""
    return tokens * (torch.arange(tokens.shape[1]) <= torch.arange(len(tokens)).unsqueeze(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stack_is_its_plain_networks(name):
    """Forward, backward and running statistics, in training and in evaluation."""
    make, draw, classes = NETWORKS[name]
    torch.manual_seed(0)
    plain = [make() for _ in range(3)]
    stack = stacked.stack(plain)
    for training in (True, False):
        stack.train(training)
        x = torch.stack([draw() for _ in plain])
        y = stack(x)
        target = torch.randint(classes, y.shape[:-1])
        for parameter in stack.parameters():
            parameter.grad = None
        (functional.cross_entropy(y.flatten(0, -2), target.flatten()) * len(plain)).backward()
        for index, network in enumerate(plain):
            network.train(training)
            network.zero_grad()
            single = network(x[index])
            functional.cross_entropy(single.flatten(0, -2), target[index].flatten()).backward()
            torch.testing.assert_close(y[index], single, **CLOSE)
            for key, parameter in network.named_parameters():
                torch.testing.assert_close(stack.get_parameter(key).grad[index], parameter.grad, **CLOSE)
            for key, value in network.named_buffers():
                if value.dim():  # BatchNorm counts its batches, too
                    torch.testing.assert_close(stack.get_buffer(key)[index], value, **CLOSE)


def test_the_encoder_is_minilm(monkeypatch, tmp_path):
    """A small BERT of transformers, its file, and the same network here; texts of several lengths."""
    pytest.importorskip("transformers", reason="the extra dev is not installed")
    from safetensors.torch import save_file

    transformers = package("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=6,
    )  # fmt: skip
    theirs = glosses.Classifier(transformers.BertModel(config), classes=5).eval()
    for parameter in theirs.parameters():  # biases and norms, too, are not what they are at first
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    save_file(theirs.encoder.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(glosses, "folder", lambda: tmp_path)
    monkeypatch.setattr(networks, "_minilm_weights", networks._minilm_weights.__wrapped__)
    monkeypatch.setattr(networks, "SHAPE_OF_MINILM", (11, 6, 8, 2, 2, 16))
    ours = networks.minilm(5)
    ours.head.load_state_dict(theirs.head.state_dict())
    tokens = ended(torch.randint(1, 11, (5, 6)))
    torch.testing.assert_close(ours(tokens), theirs(tokens, (tokens != 0).long()), **CLOSE)
    assert ended(torch.ones(2, 3)).tolist() == [[1, 0, 0], [1, 1, 0]]
    matrices = stacked.quantizable(stacked.stack([ours]), tasks.TASKS["minilm"].quantized)
    assert len(matrices) == 2 * 6  # of each layer: four of attention, two of the feed-forward network


@pytest.mark.parametrize("name", ["digits-bn", "cnn", "fashion-cnn", "lm-gpt2"])
def test_the_end_of_a_network_is_where_param_groups_sees_it(name):
    plain = tasks.TASKS[name].plain(0)
    groups = askew.param_groups(plain, {"*": "binary"}, verbose=False)
    found = {at for group in groups if group["quantizer"] and not group["normalized"] for at, _ in group["params"]}
    network = stacked.stack([plain])
    end = {f"{at}.weight" for at, layer in network.named_modules() if layer is stacked.free_end(network)}
    assert found == end
    assert len(end) == 1


def test_networks_count_as_normalized_with_their_gains_trained_too():
    def normalized(name):
        network = stacked.stack([tasks.TASKS[name].plain(seed) for seed in (0, 1)])
        weights = {layer.weight for layer in stacked.quantizable(network)}
        rest = [parameter for parameter in network.parameters() if parameter not in weights]
        with torch.no_grad():
            for parameter in rest:
                parameter.add_(0.1)
        return are_normalized(rest)

    assert [name for name in ("digits-16", "digits-bn", "cnn", "mnist-cnn", "lm-gpt2") if normalized(name)] == [
        "digits-bn",
        "cnn",
        "lm-gpt2",
    ]


def test_a_layer_that_cant_be_stacked_is_refused():
    for layer in (nn.Bilinear(2, 2, 2), nn.MaxPool2d(2)):
        with pytest.raises(TypeError, match="add it to KINDS"):
            stacked.stack([nn.Sequential(layer)])


@pytest.mark.parametrize("gpt2", [True, False])
def test_inits(gpt2):
    torch.manual_seed(0)
    block = networks.Transformer(**(SHAPE | {"width": 64}), gpt2=gpt2).blocks[0]
    deviations = [layer.weight.std().item() for layer in (block.attention, block.up, block.project, block.down)]
    wanted = [0.02, 0.02, 0.01, 0.01] if gpt2 else [1 / (3 * width) ** 0.5 for width in (64, 64, 64, 256)]
    assert deviations == pytest.approx(wanted, rel=0.05)


def test_networks_are_those_of_their_seeds():
    network = loop.network_of(tasks.TASKS["digits-16"], (3, 5))
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    assert torch.equal(network[2].weight[1], plain[2].weight)
    assert [each.weight.shape[1:] for each in stacked.quantizable(network)] == [(16, 64), (16, 16), (10, 16)]


TRAINED = [(method, width) for method in METHODS for width in method.widths]


@pytest.mark.filterwarnings("ignore:finalize")  # three steps don't bring weights to their levels
@pytest.mark.parametrize(("method", "width"), TRAINED, ids=lambda each: getattr(each, "name", each))
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_method_makes_three_steps_and_ends_on_its_levels(method, width, granularity):
    if isinstance(method, Ours) and EXTENSION is None:
        pytest.skip("the compiled extension is not built")
    torch.manual_seed(0)
    network = stacked.stack([networks.cnn(2) for _ in range(2)])
    layers = stacked.quantizable(network)
    quantized = [layer.weight for layer in layers]
    rest = [parameter for parameter in network.parameters() if all(parameter is not each for each in quantized)]
    settings = {"total_steps": 3, "pretrained": False, "granularity": granularity}
    run = method.begin(quantized, rest, Base("sgd", 0.01), width, method.knobs[0], **settings)
    for layer in layers:
        layer.run = run
    for _ in range(3):
        run.optimizer.zero_grad()
        network(torch.randn(2, 5, 1, 28, 28)).square().mean((1, 2)).sum().backward()
        run.optimizer.step()
        run.stepped()
    run.finish()
    for weight in quantized:
        seen = run.weight(weight).detach()
        rows = seen.flatten(0, 1) if granularity == "channel" else seen
        for row in rows:
            values = row.unique()
            assert values.isfinite().all()
            assert len(values) <= len(Grid(width))
