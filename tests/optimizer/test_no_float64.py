"""A device without float64, as Apple's GPUs are, played by the CPU: everything that is done with weights there."""

from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import askew_cuda as askew

MPS = torch.device("mps")
MAKERS = (torch.tensor, torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.as_tensor)
READERS = (Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.item, Tensor.tolist, Tensor.__repr__)
OF_THE_OBJECT = (Tensor.__hash__, Tensor.requires_grad_)  # about the tensor itself, not about its values


class There(Tensor):
    """A tensor that says it is on that device; ``here`` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor):
        if here.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{here.dtype} on a device that has none")
        there = Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), dtype=here.dtype, device=MPS)
        there.here = here
        return there

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return answered(func, args, kwargs or {})


def bare(value):
    return value.here if isinstance(value, There) else value


def answered(func, args, kwargs):
    """What a function of tensors there gives: computed here, and said to be there."""
    given = {id(bare(each)): each for each in args if isinstance(each, Tensor)}  # what is changed in place
    result = func(*tree_map(bare, args), **tree_map(bare, kwargs))

    def put(each):
        return given[id(each)] if id(each) in given else There(each) if isinstance(each, Tensor) else each

    return tree_map(put, result)


class Emulated(TorchFunctionMode):
    """Makes tensors on that device, moves them to it and from it, and computes with them there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in OF_THE_OBJECT or getattr(func, "__name__", "") in ("__get__", "__set__"):
            return func(*args, **kwargs)
        there = any(isinstance(each, There) for each in tree_leaves((args, kwargs)))
        if func in READERS or func is Tensor.cpu:
            return func(*map(bare, args), **kwargs)
        if func in MAKERS and not there:
            wanted = torch.device(kwargs.get("device") or "cpu")
            return There(func(*args, **{**kwargs, "device": "cpu"})) if wanted == MPS else func(*args, **kwargs)
        if func is Tensor.to:
            wanted = [each for each in (*args[1:], kwargs.pop("device", None)) if isinstance(each, torch.device | str)]
            rest = [each for each in args[1:] if not isinstance(each, torch.device | str)]
            moved = bare(args[0]).to(*rest, **kwargs)
            there = torch.device(wanted[0]) == MPS if wanted else there
            return (
                args[0]
                if moved is bare(args[0]) and isinstance(args[0], There) and there
                else There(moved)
                if there
                else moved
            )
        return answered(func, args, kwargs) if there else func(*args, **kwargs)


def test_the_device_refuses_float64():
    with Emulated():
        there = There(torch.ones(2))
        assert there.device == MPS
        assert there.cpu().double().tolist() == [1, 1]
        for wrong in (lambda: there.double(), lambda: torch.zeros((), dtype=torch.float64, device=MPS)):
            with pytest.raises(TypeError, match="float64"):
                wrong()


OPTIMIZERS = {
    "sgd": (askew.AskewSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "adamw": (askew.AskewAdamW, {"lr": 0.02, "amsgrad": True}),
    "alpha": (askew.AskewSGD, {"lr": 0.1, "alpha": 2.0, "anneal": "interval"}),
}
QUANTIZERS = ["ternary", "4bit/group2", "8bit/channel", "nf4", askew.Quantizer("2bit", scale=0.3)]
QUANTIZERS += [askew.Quantizer("4bit", scale=rule) for rule in ("absmean", "absmax", "sawb", "mse")]


def train(there: bool, rule: str, quantizer, dtype: torch.dtype, pretrained: bool) -> list:
    """What comes of a training, of looking at it, and of its end; on the CPU."""
    generator = torch.Generator().manual_seed(0)
    place = There if there else lambda here: here
    weights = [nn.Parameter(place(torch.randn(4, 8, generator=generator).to(dtype))) for _ in range(2)]
    ours, keywords = OPTIMIZERS[rule]
    more = {"low_precision": "remainder", "state_dtype": torch.float32} if dtype.itemsize == 2 else {}
    optimizer = ours(
        [{"params": [("a", weights[0])], "quantizer": quantizer}, {"params": [("b", weights[1])]}],
        total_steps=6, outputs=["codes", "snapped"] if dtype.itemsize == 2 else [], quantizer="ternary",
        pretrained=pretrained, backend="reference", **keywords, **more,
    )  # fmt: skip
    optimizer.prepare()
    watch = askew.monitor(optimizer, every=2)
    for _ in range(4):
        for weight in weights:
            weight.grad = place(torch.randn(4, 8, generator=generator).to(dtype))
        optimizer.step()
    with optimizer.quantized():
        pass
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(weight.device.type == ("mps" if there else "cpu") for weight in weights)
    assert all(optimizer.state[weight]["scale"].device == weight.device for weight in weights)
    report = optimizer.finalize()
    kept = [value for weight in weights for key, value in optimizer.state[weight].items()]
    seen = [asdict(sample) for _, found in watch.history for sample in found.values()]
    return numbers([asdict(report), seen, [bare(each.detach()).tolist() for each in [*weights, *kept]]])


def numbers(value) -> list[float]:
    """All numbers in a nested value, in order."""
    if isinstance(value, (list, tuple, dict)):
        return [x for each in (value.values() if isinstance(value, dict) else value) for x in numbers(each)]
    return [float(value)] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.filterwarnings(
    "ignore:finalize", "ignore:.*clipping to the outermost levels", "ignore:.*slow pure PyTorch"
)
def test_a_training_is_what_it_is_on_the_cpu(rule, dtype, pretrained):
    for quantizer in QUANTIZERS:
        wanted = train(False, rule, quantizer, dtype, pretrained)
        with Emulated():
            found = train(True, rule, quantizer, dtype, pretrained)
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)  # roots are rounded there as the device does it
        assert len(found) > 100
