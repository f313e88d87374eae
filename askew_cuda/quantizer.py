"""Codebooks, quantizers and their names."""

import functools
import itertools
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_NAMED = {
    "binary": (-1, 1),
    "ternary": (-1, 0, 1),
    **{f"{bits}bit": tuple(k - (2**bits - 1) / 2 for k in range(2**bits)) for bits in range(2, 9)},
    **{f"int{bits}": tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1))) for bits in range(2, 9)},
    "authors_4bit": tuple(range(-8, 9)),
    "nf4": _NF4,
    "fp4": (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "pow2": (-1, -0.5, -0.25, -0.125, 0, 0.125, 0.25, 0.5, 1),
}
_ALIASES = {"1bit": "binary"}
# What block types of GGUF files hold: levels, weights that share a scale. The levels of q2_k stand for 2bit's.
_FORMATS: dict[str, tuple[str | tuple[float, ...], int]] = {
    "gguf:q1_0": ("binary", 128),
    "gguf:tq1_0": ("ternary", 256),
    "gguf:tq2_0": ("ternary", 256),
    "gguf:q2_0": ((-1, 0, 1, 2), 64),
    "gguf:q2_k": ("2bit", 256),
    "gguf:q4_0": ("int4", 32),
    "gguf:q4_1": ("4bit", 32),
    "gguf:q8_0": ("int8", 32),
}
_LARGEST_LEVEL = torch.finfo(torch.float32).max / 2  # so that sums and differences of two levels fit, too
SCALE_RULES = ("auto", "absmean", "absmax", "sawb", "mse")
GRANULARITIES = ("tensor", "channel", "group")
ChannelDim = int | Sequence[int]  # the dimension of a weight that its outputs are counted in, or several


@dataclass(frozen=True)
class Codebook:
    """The levels that a quantized weight may take, before scale.

    Args:
        levels: 2 to 256 strictly increasing finite numbers, level units; each is rounded to float32.

    Raises: TypeError: not a sequence of numbers. ValueError: too few or too many, unsorted, equal (once rounded) or not
        finite.

    >>> Codebook([-2, 0, 1]).levels
    (-2.0, 0.0, 1.0)
    >>> Codebook.uniform(2) == Codebook.named("2bit") == Codebook([-1.5, -0.5, 0.5, 1.5])
    True
    """

    levels: tuple[float, ...]

    def __init__(self, levels: Sequence[float]):
        given = levels.tolist() if isinstance(levels, Tensor) else levels
        if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
            raise TypeError(
                f"Codebook: levels = {levels!r}; a list of numbers is needed (a name goes to Codebook.named)"
            )
        if not 2 <= len(given) <= 256:
            raise ValueError(f"Codebook: {len(given)} levels; 2 to 256 are needed")
        for index, level in enumerate(given):
            if isinstance(level, bool) or not isinstance(level, numbers.Real):
                raise TypeError(f"Codebook: levels[{index}] = {level!r}; a number is needed")
            if not abs(level) <= _LARGEST_LEVEL:
                raise ValueError(
                    f"Codebook: levels[{index}] = {level}; levels are finite and at most {_LARGEST_LEVEL:.3g} in size"
                )
        exact = torch.tensor([float(level) for level in given], dtype=torch.float64, device="cpu")
        rounded = exact.float().tolist()
        for index, (lower, upper) in enumerate(itertools.pairwise(rounded)):
            if not lower < upper:
                raise ValueError(
                    f"Codebook: levels[{index}] = {given[index]} is not below levels[{index + 1}] = {given[index + 1]} "
                    "in float32; sort them, and leave each in once"
                )
        object.__setattr__(self, "levels", tuple(rounded))

    @classmethod
    def uniform(cls, bits: int) -> "Codebook":
        """2^bits half-integers, symmetric, without zero; 1 <= bits <= 8, and 1 bit is (-1, 1)."""
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ValueError(f"Codebook.uniform: bits = {bits!r}; a whole number from 1 to 8 is needed")
        return cls.named(f"{bits}bit")

    @classmethod
    def named(cls, name: str) -> "Codebook":
        """A codebook by its name: binary (1bit), ternary, 2bit .. 8bit, int2 .. int8, authors_4bit, nf4, fp4, pow2."""
        levels = _NAMED.get(_ALIASES.get(name, name))
        if levels is None:
            raise ValueError(
                f"codebook = {name!r} is not known; take one of {', '.join([*_NAMED, *_ALIASES])}, or Codebook(levels)"
            )
        return cls(levels)

    @property
    def name(self) -> str | None:
        """Its canonical name; None for one's own levels."""
        return _names().get(self.levels)

    @property
    def bits(self) -> int:
        """Bits that a code takes."""
        return (len(self.levels) - 1).bit_length()

    @property
    def rms(self) -> float:
        """Root of the mean square of the levels."""
        return math.sqrt(math.fsum(level * level for level in self.levels) / len(self.levels))

    @property
    def mean_abs(self) -> float:
        """Mean size of the levels."""
        return math.fsum(map(abs, self.levels)) / len(self.levels)

    @property
    def max_abs(self) -> float:
        """Size of the largest level."""
        return max(-self.levels[0], self.levels[-1])

    def __len__(self) -> int:
        return len(self.levels)


@functools.cache
def _names() -> dict[tuple[float, ...], str]:
    return {Codebook(levels).levels: name for name, levels in _NAMED.items()}


@dataclass(frozen=True, init=False)
class Quantizer:
    """How a weight is quantized: its levels, how their scale is found, and how many weights share one.

    Args:
        codebook: a Codebook, a name, or a list of levels.
        scale: "auto", "absmean", "absmax", "sawb", "mse", a positive number, or a tensor of the shape that the
            granularity asks for, dimensions of size 1 left out or not; weight units per level unit. A tensor is kept as
            nested tuples, so that quantizers can be compared.
        granularity: one scale per "tensor", "channel" (output of the layer) or "group". Below two dimensions always per
            tensor.
        group_size: consecutive weights along the input dimension that share a scale, with "group" only; it must divide
            that dimension. Weights whose first dimension is the output have rows: all of their other dimensions,
            flattened.

    Raises:
        ValueError, TypeError: an argument is not one of these.

    >>> Quantizer.parse("2bit/group128") == Quantizer("2bit", granularity="group", group_size=128)
    True
    >>> Quantizer("1bit", granularity="channel").plain()
    'binary/channel'
    """

    codebook: Codebook
    scale: str | float | tuple[Any, ...]
    granularity: str
    group_size: int | None
    blocks: str | None = field(default=None, init=False, compare=False)  # the format that names it, as "gguf:q4_0"

    def __init__(
        self,
        codebook: Codebook | str | Sequence[float],
        scale: str | float | Tensor | Sequence[Any] = "auto",
        granularity: str = "tensor",
        group_size: int | None = None,
    ):
        if not isinstance(codebook, Codebook):
            codebook = Codebook.named(codebook) if isinstance(codebook, str) else Codebook(codebook)
        given = {
            "codebook": codebook,
            "scale": _checked_scale(scale),
            "granularity": granularity,
            "group_size": group_size,
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        size = group_size
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"Quantizer: granularity = {self.granularity!r}; take one of {', '.join(GRANULARITIES)}")
        if self.granularity != "group":
            if size is not None:
                raise ValueError(
                    f"Quantizer: group_size = {size!r} with granularity = {self.granularity!r}; it goes with 'group' "
                    "only"
                )
        elif isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"Quantizer: group_size = {size!r}; granularity 'group' needs a whole number of weights, at least 1"
            )

    @classmethod
    def parse(cls, spec: "str | Quantizer | Mapping[str, Any]") -> "Quantizer":
        """From a name with an optional suffix ("ternary/channel", "2bit/group128"), the name of a format's blocks
        ("gguf:q4_0"), the plain form, or a Quantizer as it is.
        """
        if isinstance(spec, Quantizer):
            return spec
        if isinstance(spec, Mapping):
            unknown = set(spec) - {"levels", "scale", "granularity", "group_size"}
            if unknown or "levels" not in spec:
                raise ValueError(
                    f"quantizer = {dict(spec)!r}; the plain form has levels, and may have scale, granularity, "
                    "group_size"
                )
            rest = {key: value for key, value in spec.items() if key != "levels"}
            return cls(Codebook(spec["levels"]), **rest)
        if not isinstance(spec, str):
            raise TypeError(
                f"quantizer = {spec!r}; a name such as 'ternary' or '2bit/group128', or an askew_cuda.Quantizer, is "
                "needed"
            )
        return _parse_name(spec)

    def plain(self) -> str | dict[str, Any]:
        """What a param group and a checkpoint hold: the canonical name where there is one, else numbers, strings and
        lists.
        """
        if self.blocks is not None:
            return self.blocks
        if self.scale == "auto" and self.codebook.name is not None:
            suffix = {"tensor": "", "channel": "/channel", "group": f"/group{self.group_size}"}[self.granularity]
            return self.codebook.name + suffix
        scale = _nested(self.scale, list)
        return {
            "levels": list(self.codebook.levels),
            "scale": scale,
            "granularity": self.granularity,
            "group_size": self.group_size,
        }

    def summary(self) -> str:
        """In one line: its name where it has one, else how many levels, and how the scale is found."""
        plain = self.plain()
        if isinstance(plain, str):
            return plain
        scale = "given, one by one" if isinstance(self.scale, tuple) else self.scale
        per = f"group of {self.group_size}" if self.granularity == "group" else self.granularity
        return f"{self.codebook.name or f'{len(self.codebook)} levels'}, scale per {per}: {scale}"

    def check(self, weight: Tensor, name: str, channel_dim: ChannelDim = 0) -> None:
        """Raises ValueError where the channel dimension is none of the weight's, the group size does not divide its
        input dimension, or a given scale has another shape.
        """
        if self.granularity != "tensor" and weight.dim() >= 2:
            kept = output_dims(channel_dim, weight.dim(), name)
            if self.group_size is not None and weight.numel():
                length, what = _input_length(weight, kept)
                if length % self.group_size:
                    raise ValueError(
                        f"group_size = {self.group_size} does not divide {what} of {name}, which has {length} weights "
                        f"(shape {tuple(weight.shape)}); take a divisor of {length}, or granularity 'channel'"
                    )
        if isinstance(self.scale, tuple):
            given, wanted = tuple(torch.tensor(self.scale, device="cpu").shape), self.scale_shape(weight, channel_dim)
            if given not in (wanted, tuple(size for size in wanted if size != 1)):
                raise ValueError(
                    f"scale has shape {given}, but {name} of shape {tuple(weight.shape)} needs {wanted}, or one number"
                )

    def scale_shape(self, weight: Tensor, channel_dim: ChannelDim = 0) -> tuple[int, ...]:
        """The shape of the weight's scale: the weight's, with 1 in the dimensions that a scale covers.

        () per tensor, and below two dimensions always. Per channel the size of the output dimension and 1 elsewhere:
        (out, 1, ..), or (1, out) for weights of shape (in, out). Per group the input dimension is divided by the group
        size: (in / size, out); where the output comes first, the row of all other dimensions: (out, row / size).

        Args:
            weight: (...).
            channel_dim: the output dimension; for stacked experts those of expert and output, such as (0, 2).
        """
        if self.granularity == "tensor" or weight.dim() < 2:
            return ()
        kept = output_dims(channel_dim, weight.dim(), "the weight")
        if self.granularity == "channel":
            return tuple(size if dim in kept else 1 for dim, size in enumerate(weight.shape))
        length, _ = _input_length(weight, kept)
        groups = length // (self.group_size or 1)
        if kept == (0,):
            return (weight.shape[0], groups)
        along = _input_dim(kept, weight.dim())
        return tuple(groups if dim == along else size for dim, size in enumerate(weight.shape))


def codebook_of(spec: "str | Quantizer | Mapping[str, Any]") -> Codebook:
    """The codebook of anything that :meth:`Quantizer.parse` takes. A plain form's scales, which may be many, are not
    looked at.

    >>> len(codebook_of({"levels": [-1, 0, 1], "scale": [0.5] * 1000}))
    3
    """
    return _codebook(tuple(spec["levels"])) if isinstance(spec, Mapping) else Quantizer.parse(spec).codebook


@functools.lru_cache(maxsize=64)
def _codebook(levels: tuple[float, ...]) -> Codebook:
    return Codebook(levels)


def output_dims(channel_dim: ChannelDim, dims: int, name: str) -> tuple[int, ...]:
    """The dimensions of which each index has scales of its own, ascending; negative ones count from the last.

    Raises: ValueError: one is not among the weight's dimensions, is given twice, or none is left to share a scale.
    """
    given = (channel_dim,) if isinstance(channel_dim, int) else tuple(channel_dim)
    kept = tuple(sorted({dim % dims for dim in given if -dims <= dim < dims}))
    if len(kept) != len(given) or not 0 < len(kept) < dims:
        raise ValueError(
            f"channel_dim = {channel_dim!r} of {name}, which has {dims} dimensions; the output dimension is needed, "
            "or, for stacked experts, those of expert and output: fewer than the weight has"
        )
    return kept


def _input_dim(kept: tuple[int, ...], dims: int) -> int:
    """The dimension that groups run along: the first that is not an output's."""
    return next(dim for dim in range(dims) if dim not in kept)


def _input_length(weight: Tensor, kept: tuple[int, ...]) -> tuple[int, str]:
    """How many weights there are along the input dimension, and what it is called in messages."""
    if kept == (0,):
        return math.prod(weight.shape[1:]), "a row"
    along = _input_dim(kept, weight.dim())
    return weight.shape[along], f"dimension {along}"


def _checked_scale(scale: Any) -> str | float | tuple[Any, ...]:
    """The name of a rule, a float, or nested tuples of floats."""
    wanted = f"take one of {', '.join(SCALE_RULES)}, a positive number, or a tensor of positive numbers"
    if isinstance(scale, str):
        if scale not in SCALE_RULES:
            raise ValueError(f"Quantizer: scale = {scale!r}; {wanted}")
        return scale
    try:
        if scale is None or isinstance(scale, bool):
            raise TypeError
        values = torch.as_tensor(scale, dtype=torch.float64, device="cpu")
    except (
        TypeError,
        ValueError,
        RuntimeError,
        OverflowError,
    ) as error:  # all that torch raises for what is not numbers
        raise TypeError(f"Quantizer: scale = {scale!r}; {wanted}") from error
    if not ((values > 0) & values.isfinite()).all():
        raise ValueError(f"Quantizer: scale = {scale!r} is not positive and finite; {wanted}")
    checked: float | tuple[Any, ...] = _nested(values.tolist(), tuple)
    return checked


def _nested(value: Any, kind: type) -> Any:
    """Nested sequences of numbers as nested tuples, or lists; anything else as it is."""
    return kind(_nested(each, kind) for each in value) if isinstance(value, (list, tuple)) else value


@functools.cache
def _parse_name(spec: str) -> Quantizer:
    if spec in _FORMATS:
        levels, size = _FORMATS[spec]
        named = Quantizer(levels, granularity="group", group_size=size)
        object.__setattr__(named, "blocks", spec)
        return named
    name, slash, suffix = spec.partition("/")
    codebook, group = Codebook.named(name), re.fullmatch("group([0-9]+)", suffix)
    if group:
        return Quantizer(codebook, granularity="group", group_size=int(group[1]))
    if slash and suffix not in ("tensor", "channel"):
        raise ValueError(
            f"quantizer = {spec!r}; the suffix is /tensor, /channel or /group and a size, such as {name}/group128"
        )
    return Quantizer(codebook, granularity=suffix or "tensor")
