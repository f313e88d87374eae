"""Packed files: a model with codes and scales in place of its quantized weights, in one safetensors file that training
can go on from.

A quantized weight ``name`` is stored as ``name.codes`` (bytes, see :mod:`askew_cuda.packed.bits`) and ``name.scale``;
everything else in the model's state_dict as it is. ``name`` itself is there, too, without elements: who takes the file
for one of plain weights, such as transformers' from_pretrained, finds that it does not fit, instead of finding nothing
and leaving the weight random. The manifest, JSON in the header's metadata, says how to read it::

    {"version": 2,
     "quantized": {name: {"shape": [..], "dtype": "float32", "layout": "row-major", "quantizer": "ternary/channel",
                          "channel_dim": 0, "levels": [-1, 0, 1], "bits": 1.6}},
     "tied": {another name of a tensor: the name that it is stored under},
     "sha256": {stored tensor: of its bytes}}

and has a checksum of its own, so that a flipped bit is found wherever it is. ``channel_dim`` is the output dimension
that scales per channel and per group belong to, or a list of them; version 1, which is read, too, has none: it is 0.
"""

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import reference
from ..checks import DTYPES
from ..distributed import by_first_rank, is_sharded, local, place_beside, whole, zero_around
from ..look import codes as nearest_codes
from ..look import non_finite, packed_codes
from ..quantizer import Quantizer
from ..wrappers import unwrap
from .bits import PACKINGS, fault, pack, packed_size, restore, restore_, unpack, width
from .safetensors import TensorReader, TensorWriter, replacing

VERSION = 2
_VERSIONS = (1, 2)  # that are read
LAYOUT = "row-major"  # logical order of the dimensions, whatever the memory format
_MARK = torch.uint8, (0,)  # what lies in the file under the very name of a quantized weight
_MANIFEST, _CHECKSUM = "askew_cuda", "askew_cuda.sha256"  # keys of the metadata
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Packed(NamedTuple):
    """A quantized weight as the manifest describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    quantizer: Quantizer
    channel_dim: int | tuple[int, ...]
    bits: float


class Quantized(NamedTuple):
    """How a weight is quantized, and the dimension that its scales belong to."""

    quantizer: Quantizer
    channel_dim: int | tuple[int, ...]


def save_packed(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: str | os.PathLike[str], *, ternary: str = "1.6bit"
) -> None:
    """Writes the model as it is after ``optimizer.finalize()``: packed codes and scales, and everything else of its
    state_dict.

    Weights that are off their levels are saved snapped; those that are frozen and were never stepped as they are,
    unless their group says quantize_frozen. Nothing is mutated. The file appears at once and whole, or not at all: an
    old one stays until then, whatever happens. Written tensor by tensor; tied tensors once. Where weights are sharded
    (DTensors), all ranks must call this: they are gathered tensor by tensor, and the first rank writes.

    Args:
        model: on any devices, in any memory format.
        optimizer: an AskewSGD or AskewAdamW with quantized weights of this model, or a wrapper of it.
        path: of the safetensors file; its folder exists.
        ternary: codes of three levels at "1.6bit", five to a byte, or at "2bit", which is simpler to read elsewhere.

    Raises: ValueError: a quantized weight is NaN or not in the model, a scale is unfit, or the state_dict holds what a
        file can't. TypeError: the optimizer is not one of ours. OSError: the file can't be written.
    """
    state, tied = model_state(model, "save_packed")
    known = {weight: name for name, weight in state.items()}
    by_weight = quantized_weights(optimizer, "save_packed")
    for weight in by_weight:
        if weight not in known:
            raise ValueError(
                f"save_packed: a quantized weight of shape {tuple(weight.shape)} is not in the model; "
                "give the model that the optimizer trains"
            )
    described, tensors = {}, {}
    for name, weight in state.items():
        if weight not in by_weight:
            tensors[name] = weight.dtype, tuple(weight.shape)
            continue
        quantizer, channel_dim = by_weight[weight]
        bits = width(len(quantizer.codebook), ternary)
        described[name] = _describe(Packed(tuple(weight.shape), weight.dtype, quantizer, channel_dim, bits))
        tensors[name] = _MARK
        tensors[f"{name}.codes"] = torch.uint8, (packed_size(weight.numel(), bits),)
        tensors[f"{name}.scale"] = reference.arithmetic(weight.dtype), quantizer.scale_shape(weight, channel_dim)
    if len(tensors) != len(state) + 2 * len(by_weight):
        raise ValueError(
            "save_packed: the model has a tensor NAME.codes or NAME.scale beside a quantized weight NAME; rename it"
        )

    def metadata(digests: dict[str, str]) -> dict[str, str]:
        manifest = {"version": VERSION, "quantized": described, "tied": tied, "sha256": digests}
        text = json.dumps(manifest, separators=(",", ":"))
        return {"format": "pt", _MANIFEST: text, _CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}

    def wholes() -> Iterator[tuple[str, Tensor, Tensor | None]]:
        for name, weight in state.items():
            if weight not in by_weight:
                yield name, whole(weight), None
        for _, weight, scale, _, _ in cast(Any, unwrap(optimizer))._quantized_weights():
            yield known[weight], whole(weight), whole(scale)

    def write(pieces: Iterator[tuple[str, Tensor, Tensor | None]]) -> None:
        with replacing(path) as file:
            writer = TensorWriter(file, tensors, metadata)
            for name, weight, scale in pieces:
                if scale is None:
                    writer.write(name, weight)
                    continue
                _, packed = _packed_weight(name, weight, scale, by_weight[state[name]], ternary)
                writer.write(name, torch.empty(_MARK[1], dtype=_MARK[0]))
                writer.write(f"{name}.codes", packed)
                writer.write(f"{name}.scale", scale)
            writer.finish()

    by_first_rank(state.values(), wholes(), write)


def load_packed(path: str | os.PathLike[str], model: nn.Module) -> list[dict[str, Any]]:
    """Reads a packed file into a model, every quantized weight bitwise ``scale * level``, and returns what goes on
    training it.

    The file is checked as a whole - header, manifest, checksums, codes, scales, names, shapes and dtypes against the
    model - before anything in the model changes. Then its parameters and buffers are overwritten in place, one by one.
    The file is in memory as a whole meanwhile. Nothing is unpickled.

    Args:
        path: of a file that :func:`save_packed` wrote.
        model: of the architecture and dtypes that were saved, on any devices, in any memory format. Mutated.

    Returns: Param groups for a fresh AskewSGD or AskewAdamW, with named parameters: the quantized weights, one group
        per quantizer and output dimension, with ``scales``, the very tensors of the file, ``pretrained="packed"`` and
        ``quantize_frozen``, since they are on their levels, frozen or not; then all others.

    Raises: ValueError: the file is truncated, damaged, foreign, of another version, or does not fit the model; the
        message names file, tensor and what was expected, and the model is unchanged. OSError: it can't be read.
    """
    with open(path, "rb") as file:
        reader = TensorReader(file, path)
        manifest = read_manifest(reader)
        quantized = {name: read_packed(reader, name, raw) for name, raw in manifest["quantized"].items()}
        sources = _match(reader, manifest, quantized, model)
        state = model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            _fits(reader, name, tensor, sources[name], quantized)
        held = _all_verified(reader, manifest["sha256"], quantized)
    targets: dict[str, dict[Tensor, None]] = {}
    for name, source in sources.items():
        targets.setdefault(source, {})[state[name]] = None
    with torch.no_grad():
        for source, tensors in targets.items():
            for tensor in tensors:
                _overwrite(tensor, held, source, quantized)
    return _groups(held, model, sources, quantized)


class Trained(NamedTuple):
    """A quantized tensor of a packed file."""

    quantizer: Quantizer
    channel_dim: int | tuple[int, ...]
    dtype: torch.dtype  # of the weights that were trained
    codes: Tensor  # (...), uint8
    scale: Tensor  # as quantizer.scale_shape says, of the arithmetic type

    def weight(self) -> Tensor:
        """(...), the weights themselves, to the last bit."""
        return restore(self.codes, self.scale, self.quantizer.codebook.levels, self.dtype)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Trained | Tensor], dict[str, str]]:
    """All that is in a packed file, without a model, checked as :func:`load_packed` does: tensors by name, and from
    other names of a tensor to that one. On the CPU.

    Raises: ValueError: the file is damaged, foreign or of another version. OSError: it can't be read.
    """
    with open(path, "rb") as file:
        reader = TensorReader(file, path)
        manifest = read_manifest(reader)
        quantized = {name: read_packed(reader, name, raw) for name, raw in manifest["quantized"].items()}
        stored = _stored(reader, manifest, quantized)
        for name, packed in quantized.items():
            if packed_size(math.prod(packed.shape), packed.bits) != reader.entries[f"{name}.codes"].numel:
                raise reader.error(
                    f"{name!r} has shape {packed.shape}, but {reader.entries[f'{name}.codes'].numel} bytes of codes"
                )
            _fits(reader, name, torch.empty(packed.shape, dtype=packed.dtype, device="meta"), name, quantized)
        held = _all_verified(reader, manifest["sha256"], quantized)
    found: dict[str, Trained | Tensor] = {}
    found.update((name, held[name]) for name in reader.entries if name in stored)
    for name, packed in quantized.items():
        codes = unpack(held[f"{name}.codes"], packed.bits, math.prod(packed.shape)).reshape(packed.shape)
        quantizer, dims = packed.quantizer, packed.channel_dim
        found[name] = Trained(quantizer, dims, packed.dtype, codes, held[f"{name}.scale"])
    return found, manifest["tied"]


# What saving shares with packed layers


def model_state(model: nn.Module, caller: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the model's state_dict, each under its first name, and from its other names to that one.

    Raises:
        ValueError: an entry is not one of the model's parameters and buffers, in whose place it could be loaded again.
    """
    named = model.state_dict(keep_vars=True)  # first: fully_shard then takes back what it had gathered
    own = {*model.parameters(), *model.buffers()}
    first: dict[Tensor, str] = {}
    tied: dict[str, str] = {}
    for name, value in named.items():
        if not isinstance(value, Tensor) or value not in own or value.layout != torch.strided or value.is_meta:
            raise ValueError(
                f"{caller}: {name} of the model's state_dict is {type(value).__name__}; packed files hold dense "
                "parameters and buffers of the model that have memory (not meta), and no extra state"
            )
        if first.setdefault(value, name) != name:
            tied[name] = first[value]
    return {name: value for value, name in first.items()}, tied


def quantized_weights(optimizer: torch.optim.Optimizer, caller: str) -> dict[Tensor, Quantized]:
    """Every quantized weight and how; without those that are frozen and were never stepped, which keep their values.

    Raises:
        TypeError: not an optimizer of ours. ValueError: it quantizes nothing, or has a share of the weights only.
    """
    optimizer = unwrap(optimizer)
    if not hasattr(optimizer, "quantized_parameters"):
        raise TypeError(
            f"{caller}: optimizer = {type(optimizer).__name__}; the AskewSGD or AskewAdamW that trained the model is "
            "needed"
        )
    if zero_around(optimizer) is not None:
        raise ValueError(
            f"{caller}: in a ZeroRedundancyOptimizer each rank has the scales of its own weights alone. After "
            "zero.consolidate_state_dict(), on its rank, give a plain optimizer of the same param groups, with "
            "load_state_dict(zero.state_dict())"
        )
    found = {}
    for _, weight, _, _, group in cast(Any, optimizer)._quantized_weights(scales=False):
        dims = group["channel_dim"]
        found[weight] = Quantized(Quantizer.parse(group["quantizer"]), dims if isinstance(dims, int) else tuple(dims))
    if not found:
        raise ValueError(
            f"{caller}: the optimizer quantizes no weight; give groups from askew_cuda.param_groups, or quantizer="
        )
    return found


def packed_weights(
    optimizer: torch.optim.Optimizer, by_weight: dict[Tensor, Quantized], names: dict[Tensor, str], ternary: str
) -> Iterator[tuple[Tensor, float, Tensor, Tensor]]:
    """(weight, bits, packed codes, scale) of every quantized weight, one at a time; the codes as :func:`pack` makes
    them. Nothing is mutated.

    Raises:
        ValueError: a weight is NaN, or a scale is not of the shape, dtype and range that its quantizer sets.
    """
    for _, weight, scale, _, _ in cast(Any, unwrap(optimizer))._quantized_weights():
        yield weight, *_packed_weight(names[weight], weight, scale, by_weight[weight], ternary), scale


def _packed_weight(name: str, weight: Tensor, scale: Tensor, how: Quantized, ternary: str) -> tuple[float, Tensor]:
    """(bits, packed codes) of a weight. Raises as :func:`packed_weights`."""
    quantizer, channel_dim = how
    if non_finite(weight) and weight.isnan().any():
        raise ValueError(
            f"{name} holds {int(weight.isnan().sum())} NaN weights; they have no level: repair them before packing"
        )
    wanted = reference.arithmetic(weight.dtype), quantizer.scale_shape(weight, channel_dim)
    if (scale.dtype, tuple(scale.shape)) != wanted or not _in_range(scale):
        raise ValueError(
            f"the scale of {name} is {scale.dtype} of shape {tuple(scale.shape)}, the least {_least(scale)}; "
            f"{wanted[0]} of shape {wanted[1]}, positive and finite, is needed: it is set at the first step, leave "
            "it alone"
        )
    bits = width(len(quantizer.codebook), ternary)
    return bits, _packed(weight, scale, quantizer.codebook.levels, bits)


def _packed(weight: Tensor, scale: Tensor, levels: tuple[float, ...], bits: float) -> Tensor:
    """The weight's codes as bytes."""
    if weight.dtype.itemsize != 2:
        packed = packed_codes(weight, scale, levels, *PACKINGS[bits])
        if packed is not None:
            return packed
    return pack(_settled(nearest_codes(weight, scale, levels), scale, levels, weight.dtype), bits)


def _settled(codes: Tensor, scale: Tensor, levels: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Codes that the restored weights have again, so that loading and saving changes no byte. In 16 bits the outermost
    of many levels may be rounded to a number that is closer to its neighbour, which is rounded to the same number: then
    the neighbour's code is taken.
    """
    if dtype.itemsize != 2:
        return codes
    snapped = restore(codes, scale, levels, dtype)
    again = nearest_codes(snapped, scale, levels)
    return torch.where(restore(again, scale, levels, dtype) == snapped, again, codes)


def _in_range(scale: Tensor) -> bool:
    """Whether scales are positive, finite, and have a reciprocal: the range that optimizers accept."""
    info = torch.finfo(scale.dtype)
    return bool(((scale >= info.tiny) & (scale <= info.max)).all())


def _least(scale: Tensor) -> float:
    return float(scale.min()) if scale.numel() else 1.0


# The manifest


def _describe(packed: Packed) -> dict[str, object]:
    quantizer = replace(packed.quantizer, scale="auto")  # the rule has done its work: the scales are stored
    return {
        "shape": list(packed.shape),
        "dtype": str(packed.dtype).removeprefix("torch."),
        "layout": LAYOUT,
        "quantizer": quantizer.plain(),
        "channel_dim": packed.channel_dim if isinstance(packed.channel_dim, int) else list(packed.channel_dim),
        "levels": list(quantizer.codebook.levels),
        "bits": packed.bits,
    }


def read_manifest(reader: TensorReader) -> dict[str, Any]:
    """The manifest, its version, checksum and outer form checked."""
    text = reader.metadata.get(_MANIFEST)
    if text is None:
        raise reader.error(
            "it is a safetensors file without a manifest of askew_cuda; a file from save_packed is needed"
        )
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise reader.error(f"its manifest is not JSON ({error}); the file is damaged") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if type(version) is not int or version not in _VERSIONS:
        raise reader.error(
            f"its manifest has version {reprlib.repr(version)}; version {' or '.join(map(str, _VERSIONS))} is needed: "
            "take the askew_cuda that wrote it"
        )
    if reader.metadata.get(_CHECKSUM) != hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest():
        raise reader.error("its manifest does not have the checksum that the header says; the file is damaged")
    if set(manifest) != {"version", "quantized", "tied", "sha256"} or not all(
        isinstance(manifest[key], dict) for key in ("quantized", "tied", "sha256")
    ):
        raise reader.error(f"its manifest has {sorted(manifest)}; version, quantized, tied and sha256 are needed")
    if version == 1:
        for raw in manifest["quantized"].values():
            if isinstance(raw, dict):
                raw.setdefault("channel_dim", 0)
    return manifest


def read_packed(reader: TensorReader, name: str, raw: object) -> Packed:
    """An entry of the manifest, found to say nothing impossible; whether it fits file and model is still to be seen."""
    keys = {"shape", "dtype", "layout", "quantizer", "channel_dim", "levels", "bits"}
    if not isinstance(raw, dict) or set(raw) != keys:
        raise reader.error(f"{name!r} is described by {reprlib.repr(raw)}; {', '.join(sorted(keys))} are needed")
    try:
        quantizer = Quantizer.parse(raw["quantizer"])
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise reader.error(f"{name!r} has quantizer {reprlib.repr(raw['quantizer'])}: {error}") from error
    bits, shape, dims = raw["bits"], raw["shape"], raw["channel_dim"]
    for wrong, key, wanted in (
        (quantizer.scale != "auto", "quantizer", "one without a scale, which is stored beside the codes,"),
        (
            raw["levels"] != list(quantizer.codebook.levels),
            "levels",
            f"{list(quantizer.codebook.levels)}, as its quantizer says,",
        ),
        (not isinstance(raw["dtype"], str) or raw["dtype"] not in _DTYPES, "dtype", f"one of {', '.join(_DTYPES)}"),
        (raw["layout"] != LAYOUT, "layout", repr(LAYOUT)),
        (
            type(bits) not in (int, float) or bits not in PACKINGS or PACKINGS[bits].base < len(quantizer.codebook),
            "bits",
            f"1, 1.6, 2, 4 or 8, enough for {len(quantizer.codebook)} levels,",
        ),
        (
            not isinstance(shape, list) or not all(type(each) is int and each >= 0 for each in shape),
            "shape",
            "a list of sizes",
        ),
        (
            type(dims) is not int and not (isinstance(dims, list) and all(type(each) is int for each in dims)),
            "channel_dim",
            "a dimension, or a list of them,",
        ),
    ):
        if wrong:
            raise reader.error(f"{name!r} has {key} = {reprlib.repr(raw[key])}; {wanted} is needed")
    return Packed(tuple(shape), _DTYPES[raw["dtype"]], quantizer, dims if isinstance(dims, int) else tuple(dims), bits)


# File against model


def _match(
    reader: TensorReader, manifest: dict[str, Any], quantized: dict[str, Packed], model: nn.Module
) -> dict[str, str]:
    """From each name in the model to the name that its tensor is stored under."""
    stored = _stored(reader, manifest, quantized)
    own, tied = model_state(model, "load_packed")
    _same(reader, {*own, *tied}, stored | set(manifest["tied"]), "names in the file that the model also has")
    sources = {name: manifest["tied"].get(name, name) for name in (*own, *tied)}
    for name, first in tied.items():
        if sources[name] != sources[first]:
            raise reader.error(
                f"{name!r} and {first!r} are two tensors in the file, but one in the model; untie them before loading"
            )
    return sources


def _stored(reader: TensorReader, manifest: dict[str, Any], quantized: dict[str, Packed]) -> set[str]:
    """The names of all tensors in the file, once they fit each other."""
    parts = {f"{name}.{part}" for name in quantized for part in ("codes", "scale")}
    _same(reader, parts, parts & set(reader.entries), "tensors in the file")
    _same(reader, set(reader.entries), set(manifest["sha256"]), "checksums")
    for name in quantized.keys() & reader.entries.keys():  # version 1 has no marks
        if reader.entries[name][:2] != _MARK:
            raise reader.error(f"{name!r} is there twice, quantized and as {reader.entries[name].dtype}")
    stored = (set(reader.entries) - parts) | set(quantized)
    for name, first in manifest["tied"].items():
        if not isinstance(first, str) or first not in stored or name in stored:
            raise reader.error(
                f"{name!r} is tied to {reprlib.repr(first)}; the name of a tensor in the file, which it is not itself, "
                "is needed"
            )
    return stored


def _same(reader: TensorReader, wanted: set[str], found: set[str], what: str) -> None:
    if wanted != found:
        missing, unexpected = ([*map(repr, sorted(names)[:5])] for names in (wanted - found, found - wanted))
        raise reader.error(
            f"{what}: missing {', '.join(missing) or 'none'}; unexpected {', '.join(unexpected) or 'none'}"
        )


def _fits(reader: TensorReader, name: str, tensor: Tensor, source: str, quantized: dict[str, Packed]) -> None:
    """A tensor of the model against what the file has for it."""
    packed = quantized.get(source)
    shape, dtype = packed[:2] if packed else (reader.entries[source].shape, reader.entries[source].dtype)
    if tuple(tensor.shape) != shape:
        raise reader.error(f"{name!r} has shape {shape}; {tuple(tensor.shape)}, as in the model, is needed")
    if tensor.dtype != dtype:
        raise reader.error(
            f"{name!r} is {dtype}; {tensor.dtype}, as in the model, is needed; model.to({dtype}) before loading"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise reader.error(
            f"{name!r} is expanded in the model: several of its elements share memory; make it contiguous to load it"
        )
    if packed is None:
        return
    try:
        packed.quantizer.check(tensor, name, packed.channel_dim)
    except ValueError as error:
        raise reader.error(str(error)) from error
    wanted = {
        f"{source}.codes": (torch.uint8, (packed_size(tensor.numel(), packed.bits),)),
        f"{source}.scale": (reference.arithmetic(dtype), packed.quantizer.scale_shape(tensor, packed.channel_dim)),
    }
    for part, (dtype, shape) in wanted.items():
        entry = reader.entries[part]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise reader.error(f"{part!r} is {entry.dtype} of shape {entry.shape}; {dtype} of shape {shape} is needed")


def _all_verified(reader: TensorReader, digests: dict[str, object], quantized: dict[str, Packed]) -> dict[str, Tensor]:
    """Every stored tensor, checked. By as many threads as torch has: checksums take longest."""
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        jobs = [threads.submit(_verified, reader, stored, digests[stored], quantized) for stored in reader.entries]
        try:
            return {stored: job.result() for stored, job in zip(reader.entries, jobs, strict=True)}
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _verified(reader: TensorReader, stored: str, digest: object, quantized: dict[str, Packed]) -> Tensor:
    """One stored tensor, checksum, codes and scale checked."""
    values, found = reader.read(stored)
    if found != digest:
        raise reader.error(
            f"{stored!r} has SHA-256 {found}; {reprlib.repr(digest)}, as the manifest says, is needed: the file is "
            "damaged"
        )
    name, _, part = stored.rpartition(".")
    packed = quantized.get(name)
    wrong = None
    if packed is not None and part == "scale" and not _in_range(values):
        wrong = f" holds a scale that is not positive, finite and normal (the least is {_least(values)})"
    elif packed is not None and part == "codes":
        wrong = fault(values, packed.bits, math.prod(packed.shape), len(packed.quantizer.codebook))
        wrong = wrong and f": {wrong}"
    if wrong is not None:
        raise reader.error(f"{stored!r}{wrong}")
    return values


def _overwrite(tensor: Tensor, held: dict[str, Tensor], source: str, quantized: dict[str, Packed]) -> None:
    """Overwrites a tensor of the model by what the file holds under a name; of a DTensor what lies here of it."""
    packed = quantized.get(source)
    if is_sharded(tensor):
        value = torch.empty(tensor.shape, dtype=tensor.dtype)
        _overwrite(value, held, source, quantized)
        local(tensor).copy_(local(place_beside(value, tensor)))
    elif packed is None:
        tensor.copy_(held[source])
    else:
        levels = packed.quantizer.codebook.levels
        restore_(tensor, held[f"{source}.codes"], packed.bits, held[f"{source}.scale"], levels)


def _groups(
    held: dict[str, Tensor], model: nn.Module, sources: dict[str, str], quantized: dict[str, Packed]
) -> list[dict[str, Any]]:
    """Quantized weights by quantizer and output dimension, then the rest."""
    groups: dict[object, dict[str, Any]] = {}
    rest: list[tuple[str, Tensor]] = []
    for name, weight in model.named_parameters():  # tied ones once
        source = sources.get(name)
        if source in quantized:  # frozen ones, too: they have to be known when the model is packed again
            quantizer, dims = quantized[source].quantizer, quantized[source].channel_dim
            settings = {"quantizer": quantizer.plain(), "channel_dim": dims}
            kinds = {"pretrained": "packed", "quantize_frozen": True}
            group = groups.setdefault((quantizer, dims), {"params": [], **settings, "scales": [], **kinds})
            group["params"].append((name, weight))
            group["scales"].append(held[f"{source}.scale"])
        elif weight.requires_grad or weight.dtype in DTYPES:
            rest.append((name, weight))
    return [*groups.values(), *([{"params": rest, "quantizer": None}] if rest else [])]
