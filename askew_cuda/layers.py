"""What is known of layers: which of their parameters are weights, which dimension is the output, and what fan-in means.

A parameter is judged by the layer that owns it, never by its name or its shape alone. What no layer here knows is not
taken for a weight; :func:`register_layer` teaches the rest in a line.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from .quantizer import ChannelDim, output_dims


class Layout(NamedTuple):
    """How a weight lies in memory: its output dimension, or those of expert and output; and how many weights are summed
    up into one output.

    init_bound: where the layer draws its fresh weights from another interval than +-1 / sqrt(fan_in), the end of it.
    groups: how many outputs, one of each group of the layer, share an index of the output dimension.
    """

    channel_dim: int | tuple[int, ...]
    fan_in: int
    init_bound: float | None = None
    groups: int = 1


class Occurrence(NamedTuple):
    """Where a parameter stands in a network; a tied one has several.

    layer: class of the module that owns it. role: "weight", "embedding", "norm", "router", "other" (a bias, say, of a
    layer that is known), "unknown", or what the layer makes its weight of: "weight_norm", "parametrized by ..".
    order: the number of its layer among those with weights and the embeddings, from 0; None: it is of none.
    layout: of weights, embeddings and routers. masked: pruned, so that a mask is multiplied to it. padding: a row
    of it is to stay zero.
    """

    layer: str
    role: str
    order: int | None = None
    layout: Layout | None = None
    masked: bool = False
    padding: bool = False


class Survey(NamedTuple):
    """Every parameter of a network with its places, and how many layers there are."""

    places: dict[Tensor, list[Occurrence]]
    layers: int

    def layout(self, weight: Tensor) -> Layout | None:
        """That of its first place in a known layer."""
        return next((place.layout for place in self.places[weight] if place.layout is not None), None)


Weights = list[str]  # names of the parameters that are weights of one layer
Describe = Callable[[nn.Module, Tensor], Layout]


class Kind(NamedTuple):
    """A class of layers: the layers that a module is (an LSTM is one for each level), and the layout of a weight."""

    levels: Callable[[nn.Module], list[Weights]]
    describe: Describe
    role: str = "weight"


def _output_first(module: nn.Module, weight: Tensor) -> Layout:
    """(out, in), (out, in / groups, ..): Linear, Conv; and the rows of an embedding."""
    return Layout(0, math.prod(weight.shape[1:]))


def _recurrent(module: nn.Module, weight: Tensor) -> Layout:
    """(gates hidden, in): RNN, LSTM, GRU and their cells, whose weights all start within +-1 / sqrt(hidden)."""
    assert isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    return Layout(0, weight.shape[1], 1 / math.sqrt(max(module.hidden_size, 1)))


def _attention(module: nn.Module, weight: Tensor) -> Layout:
    """(out, in): MultiheadAttention, whose projections of queries, keys and values start as Xavier's uniform init."""
    return Layout(0, weight.shape[1], math.sqrt(6 / sum(weight.shape)))


def _bilinear(module: nn.Module, weight: Tensor) -> Layout:
    """(out, in1, in2): Bilinear, which sums up over both inputs, but starts within +-1 / sqrt(in1)."""
    return Layout(0, weight.shape[1] * weight.shape[2], 1 / math.sqrt(weight.shape[1]))


def _input_first(module: nn.Module, weight: Tensor) -> Layout:
    """(in, out): Conv1D of transformers."""
    return Layout(1, weight.shape[0])


def _transposed(module: nn.Module, weight: Tensor) -> Layout:
    """(in, out / groups, ..): ConvTranspose. Each output sees every stride-th weight of the field.

    Where there are as many groups as inputs, each input has outputs of its own; in between, the outputs number k of all
    groups have one index.
    """
    assert isinstance(module, nn.modules.conv._ConvTransposeNd)
    field = math.prod(max(size / step, 1) for size, step in zip(module.kernel_size, module.stride, strict=True))
    fan_in = round(module.in_channels // module.groups * field)
    if module.groups == module.in_channels > 1:
        return Layout(0 if weight.shape[1] == 1 else (0, 1), fan_in)
    return Layout(1, fan_in, groups=module.groups)


def _experts(transposed: bool) -> Describe:
    """(experts, out, in), or (experts, in, out): each expert is a matrix of its own."""
    inputs = 1 if transposed else 2
    return lambda module, weight: Layout((0, 3 - inputs), weight.shape[inputs])


def _one(*names: str) -> Callable[[nn.Module], list[Weights]]:
    return lambda module: [list(names)]


def _levels(module: nn.Module) -> list[Weights]:
    """A layer for each level of an RNN, LSTM or GRU, both directions."""
    assert isinstance(module, nn.RNNBase)
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [
        [f"weight_{part}_l{level}{direction}" for direction in directions for part in ("ih", "hh", "hr")]
        for level in range(module.num_layers)
    ]


_KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: Kind(_one("weight"), _output_first),
    nn.modules.conv._ConvNd: Kind(_one("weight"), _output_first),
    nn.modules.conv._ConvTransposeNd: Kind(_one("weight"), _transposed),
    nn.Bilinear: Kind(_one("weight"), _bilinear),
    nn.RNNBase: Kind(_levels, _recurrent),
    nn.RNNCellBase: Kind(_one("weight_ih", "weight_hh"), _recurrent),
    nn.MultiheadAttention: Kind(_one("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), _attention),
    nn.Embedding: Kind(_one("weight"), _output_first, "embedding"),
    nn.EmbeddingBag: Kind(_one("weight"), _output_first, "embedding"),
}
_STACKS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
# Known without importing them: (package, class).
_BY_NAME: dict[tuple[str, str], Kind] = {
    ("transformers", "Conv1D"): Kind(_one("weight"), _input_first),
    ("transformers", "Llama4TextExperts"): Kind(_one(*_STACKS), _experts(transposed=True)),
    ("transformers", "JetMoeParallelExperts"): Kind(_one("weight"), _experts(transposed=False)),
    # convolutions that standardise their weights when they are called, so that these would not be on levels
    **{
        each: Kind(_one("weight"), _output_first, "standardised in forward()")
        for each in (
            ("timm", "StdConv2d"),
            ("timm", "StdConv2dSame"),
            ("timm", "ScaledStdConv2d"),
            ("timm", "ScaledStdConv2dSame"),
            ("transformers", "WeightStandardizedConv2d"),
        )
    },
}
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase)


def register_layer(
    kind: type[nn.Module],
    weights: str | Sequence[str] = "weight",
    *,
    channel_dim: ChannelDim = 0,
    fan_in: Callable[[nn.Module, Tensor], int] | None = None,
    embedding: bool = False,
) -> None:
    """Makes a class of layers, and its subclasses, known to :func:`~askew_cuda.param_groups`.

    Args:
        kind: the class.
        weights: the name of its weight, or the names of its weights, which count as one layer.
        channel_dim: the output dimension: 0 for (out, in, ..), 1 for (in, out); for stacked experts those of expert and
            output, such as (0, 2) for (experts, in, out).
        fan_in: from module and weight to how many weights are summed up into one output, at least 1; None: all that
            lie at one index of the output.
        embedding: whether it looks rows up: then it is quantized only where a rule says so.

    Raises: TypeError: ``kind`` is not a class of modules, or ``weights`` are not names.

    >>> import torch
    >>> class Mixer(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.mix = nn.Parameter(torch.randn(8, 4))
    >>> register_layer(Mixer, "mix", channel_dim=1)
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"register_layer: kind = {kind!r}; a class of torch.nn.Module is needed")
    names = [weights] if isinstance(weights, str) else weights
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"register_layer: weights = {weights!r}; the name of a parameter, or several, is needed")

    def describe(module: nn.Module, weight: Tensor) -> Layout:
        kept = output_dims(channel_dim, weight.dim(), f"{' or '.join(names)} of {kind.__name__}")
        inputs = [size for dim, size in enumerate(weight.shape) if dim not in kept]
        fan = math.prod(inputs) if fan_in is None else fan_in(module, weight)
        return Layout(kept[0] if len(kept) == 1 else kept, fan)

    _KINDS[kind] = Kind(_one(*names), describe, "embedding" if embedding else "weight")


def _kind(module: nn.Module) -> Kind | None:
    """What is known of a module's class; the nearest of its ancestors says it. Experts may say it themselves."""
    for base in type(module).__mro__:
        if base in _KINDS:
            return _KINDS[base]
        named = _BY_NAME.get((base.__module__.split(".")[0], base.__name__))
        if named is not None:
            return named
    transposed = getattr(module, "is_transposed", None)  # as transformers' experts state it
    if isinstance(transposed, bool) and any(_is_stack(module._parameters.get(name)) for name in _STACKS):
        return Kind(_one(*_STACKS), _experts(transposed))
    return None


def _is_stack(weight: Tensor | None) -> bool:
    return weight is not None and weight.dim() == 3


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: of a class that is known, or whose name ends in Norm and that owns a
    vector and no submodules.
    """
    if isinstance(module, _NORMS):
        return True
    if not re.search(r"Norm(\d+d?)?$", type(module).__name__) or next(module.children(), None) is not None:
        return False
    own = [tensor for kept in (module._parameters, module._buffers) for tensor in kept.values() if tensor is not None]
    return any(tensor.dim() == 1 for tensor in own)


def _routers(model: nn.Module) -> set[nn.Module]:
    """The modules that choose among experts: of a class that is called so and what it is made of, or a Linear beside
    the experts with one output for each of them, or a single one.
    """
    found: set[nn.Module] = set()
    for module in model.modules():
        if re.search(r"(Router|TopK[Gg]at\w+|Mo[eE]Gate)$", type(module).__name__):
            found.update(module.modules())
        experts = module._modules.get("experts")
        if experts is not None:
            count = _experts_of(experts)
            beside = [each for each in module.children() if isinstance(each, nn.Linear)]
            found.update(each for each in beside if each.out_features in (1, count))
    return found


def _experts_of(experts: nn.Module) -> int:
    """How many experts a module holds: stacked in its parameters, or as its children."""
    stacks = [weight for weight in experts.parameters() if _is_stack(weight)]
    return stacks[0].shape[0] if stacks else len(list(experts.children()))


def survey(model: nn.Module) -> Survey:
    """Where every parameter of a network stands, in the order of registration.

    Raises: ValueError: a parameter has no shape yet, as those of lazy layers.
    """
    places: dict[Tensor, list[Occurrence]] = {}
    routers, orders, count = _routers(model), dict[nn.Module, int](), 0
    for path, module in model.named_modules(remove_duplicate=False):  # a layer that stands twice is two
        own = {name: weight for name, weight in module._parameters.items() if weight is not None}
        for name, weight in own.items():
            if isinstance(weight, UninitializedParameter):
                raise ValueError(f"{path}.{name} has no shape yet; call the model once, then ask for its weights")
        kind, found = _kind(module), dict[str, Occurrence]()
        if kind is not None and module in routers:
            kind = kind._replace(role="router")
        for names in [] if kind is None else kind.levels(module):
            assert kind is not None
            level = dict(_level(module, kind, names, count))
            parametrized = [each for name in names if (each := _parametrization(module, name)) is not None]
            orders.update(dict.fromkeys(parametrized, count))
            if (level or parametrized) and kind.role != "router":
                count += 1
            found.update(level)
        other = _other(module, kind, module in routers, orders.get(module))
        for name, weight in own.items():
            places.setdefault(weight, []).append(found.get(name, other))
    return Survey(places, count)


def _parametrization(module: nn.Module, name: str) -> nn.Module | None:
    """What stands for a parameter that was parametrized, by torch.nn.utils.parametrize."""
    lists = module._modules.get("parametrizations")
    return None if lists is None else lists._modules.get(name)


def _level(module: nn.Module, kind: Kind, names: Weights, order: int) -> Iterator[tuple[str, Occurrence]]:
    """The weights of one layer, under their own names or those that pruning and older parametrizations give them."""
    layer = type(module).__name__
    for name in names:
        own, weight = module._parameters, module._parameters.get(name)
        original, masked = own.get(f"{name}_orig"), f"{name}_mask" in module._buffers
        number = None if kind.role == "router" else order
        if weight is not None:
            padding = getattr(module, "padding_idx", None) is not None
            yield name, Occurrence(layer, kind.role, number, kind.describe(module, weight), padding=padding)
        elif original is not None and masked:
            yield f"{name}_orig", Occurrence(layer, kind.role, number, kind.describe(module, original), masked=True)
        elif original is not None:
            yield f"{name}_orig", Occurrence(layer, "parametrized by spectral_norm", order)
        elif f"{name}_g" in own and f"{name}_v" in own:
            for part in ("g", "v"):
                yield f"{name}_{part}", Occurrence(layer, "weight_norm", order)


def _other(module: nn.Module, kind: Kind | None, router: bool, order: int | None) -> Occurrence:
    """Where parameters stand that are no weights of a known layer."""
    layer = type(module).__name__
    if isinstance(module, ParametrizationList):
        kinds = [type(each).__name__.lstrip("_") for each in module]
        role = "weight_norm" if kinds == ["WeightNorm"] else f"parametrized by {', '.join(kinds)}"
        return Occurrence(layer, role, order)
    if is_norm(module):
        return Occurrence(layer, "norm")
    if router:
        return Occurrence(layer, "router")
    return Occurrence(layer, "unknown" if kind is None else "other")
