"""torch.export, and ONNX by its exporter: finalized and packed models leave, and give our outputs elsewhere."""

import copy
import io

import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript", reason="onnxscript is not installed; `make test-integrations` installs it")
onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed; `make test-integrations` does it"
)

import askew_cuda as askew
from tests.integrations.tiny import Counting, language_model

BOOKS = ["binary", "ternary", "2bit", "4bit", "8bit", "nf4"]


class Net(nn.Module):
    """Embedding, convolution and linear layers; every sum is exact for whole inputs, so that runtimes must agree."""

    def __init__(self, book: str, granularity: str):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(64, 5)
        rules = {
            name: askew.Quantizer(book, scale=2.0, granularity=granularity)
            for name in ("embed.weight", "conv.weight", "head.weight")
        }
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randint(-8, 9, weight.shape))
        self.optimizer = [askew.AskewSGD(askew.param_groups(self, rules, verbose=False, pretrained=True))]
        self.optimizer[0].finalize()

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """(n,) to (n, 5)."""
        return self.head(self.conv(self.embed(index).reshape(-1, 1, 4, 4)).flatten(1))


INDEX = torch.tensor([0, 3, 10, 4])


def session(model, *inputs):
    """What onnxruntime makes of a model that the dynamo exporter wrote."""
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    return onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])


def outputs(model, *inputs) -> torch.Tensor:
    made = session(model, *inputs)
    given = {each.name: value.numpy() for each, value in zip(made.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(made.run(None, given)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("book", "granularity"), [*((book, "channel") for book in BOOKS), ("ternary", "tensor"), ("nf4", "tensor")]
)
@pytest.mark.parametrize("pack", [False, True], ids=["finalized", "packed"])
def test_onnxruntimes_outputs_are_ours(book, granularity, pack):
    torch.manual_seed(0)
    model = Net(book, granularity).eval()
    wanted = model(INDEX)
    if pack:
        askew.pack_modules(model, model.optimizer[0])
        assert torch.equal(model(INDEX), wanted)
    found = outputs(model, INDEX)
    if book == "nf4":
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    else:
        assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ternary", ["1.6bit", "2bit"])
@pytest.mark.parametrize("book", BOOKS)
def test_torch_export_gives_the_same_bits(book, ternary):
    torch.manual_seed(0)
    model = Net(book, "channel").eval()
    askew.pack_modules(model, model.optimizer[0], ternary=ternary)
    program = torch.export.export(model, (INDEX,))
    assert torch.equal(program.module()(INDEX), model(INDEX))
    stored = sum(each.numel() * each.element_size() for each in program.state_dict.values())
    floats = sum(each.numel() * 4 for each in Net(book, "channel").parameters())
    assert stored < floats / 2 if book != "8bit" else stored < floats


@pytest.mark.filterwarnings("ignore")
def test_a_packed_language_model():
    model = language_model(use_cache=False).eval()
    optimizer = askew.AskewAdamW(askew.param_groups(model, "2bit/channel", verbose=False, pretrained=True))

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, index):
            return self.model(index).logits

    askew.pack_modules(model, optimizer)
    index = Counting().rows[:2]
    torch.testing.assert_close(outputs(Logits(), index), model(index).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_index_that_is_none_is_an_error_there_too():
    torch.manual_seed(0)
    model = Net("4bit", "channel").eval()
    askew.pack_modules(model, model.optimizer[0])
    made = session(copy.deepcopy(model), INDEX)
    with pytest.raises(Exception, match=r"(?i)out of|indices|invalid"):
        made.run(None, {made.get_inputs()[0].name: (INDEX + 5).numpy()})
