"""Which weights are quantized, and how: rules to param groups, and the table that says so, and why."""

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .checks import DTYPES
from .keywords import LAYERS
from .layers import Layout, Occurrence, Survey, is_norm, survey
from .quantizer import Quantizer
from .typed_keywords import GroupKeywords

if TYPE_CHECKING:
    from typing_extensions import Unpack

Levels = str | Quantizer | Mapping[str, Any]
Spec = Levels | None


class Choice(NamedTuple):
    """Each quantized weight's quantizer, and why each other one is left alone; by name."""

    chosen: dict[str, Quantizer]
    why: dict[str, str]


def _is_pattern(rule: str) -> bool:
    return rule == "*" or rule.startswith("re:")


def _matches(rule: str, name: str) -> bool:
    """ "re:..." is a full match, "*" is everything, anything else is exact.

    Raises: ValueError: the regular expression is none.
    """
    if not rule.startswith("re:"):
        return rule in ("*", name)
    try:
        return bool(re.fullmatch(rule[3:], name))
    except re.error as error:
        raise ValueError(
            f"param_groups: the rule {rule!r} is not a regular expression ({error}); after 're:' Python's re.fullmatch "
            "takes it: '.*' for anything, '\\.' for a dot"
        ) from error


def _obstacle(weight: Tensor, places: list[Occurrence]) -> str | None:
    """Why a parameter is not the weight of a layer; None where it is, or an embedding's."""
    if weight.dtype not in DTYPES:
        return str(weight.dtype).removeprefix("torch.")
    for place in places:
        if place.role == "unknown":
            return f"{weight.dim()}-d" if weight.dim() < 2 else f"{place.layer} is not known"
        if place.role == "other":
            return f"{weight.dim()}-d" if weight.dim() < 2 else f"not a weight of {place.layer}"
        if place.role not in ("weight", "embedding"):
            return place.role
    return None


def _reason(weight: Tensor, places: list[Occurrence], layers: int, quantizer: Quantizer) -> str | None:
    """Why one specification leaves a weight as it is; None where it does not."""
    obstacle = _obstacle(weight, places)
    if obstacle is not None:
        return obstacle
    if any(place.role == "embedding" for place in places):
        return "embedding"
    if any(place.order == 0 for place in places):
        return "first layer"
    if any(place.order == layers - 1 for place in places):
        return "last layer"
    if any(place.masked for place in places) and 0 not in quantizer.codebook.levels:
        return "pruned, and no level is 0"
    return None


def _select(
    weights: dict[str, Tensor], found: Survey, spec: Levels, include: Iterable[str], exclude: Iterable[str]
) -> Choice:
    """One specification for a whole network."""
    quantizer, chosen, why = Quantizer.parse(spec), dict[str, Quantizer](), dict[str, str]()
    unmet = {*include, *exclude}
    for name, weight in weights.items():
        places = found.places[weight]
        named = [rule for rule in include if _matches(rule, name)]
        taken = [rule for rule in named if not _is_pattern(rule) or _obstacle(weight, places) is None]
        out = [rule for rule in exclude if _matches(rule, name)]
        unmet -= {*taken, *out}
        reason = _reason(weight, places, found.layers, quantizer)
        if out:
            why[name] = "excluded"
        elif taken or reason is None:
            chosen[name] = quantizer
        else:
            why[name] = reason + " (name it to quantize it)" * bool(named)
    for rule in unmet:
        raise _unmatched(rule, "parameter", weights)
    return Choice(chosen, why)


def _by_rules(weights: dict[str, Tensor], found: Survey, rules: Mapping[str, Spec]) -> Choice:
    """A dictionary quantizes exactly what its rules say; the first rule that matches wins."""
    chosen: dict[str, Quantizer] = {}
    why: dict[str, str] = {}
    used: set[str] = set()
    parsed = {rule: None if spec is None else Quantizer.parse(spec) for rule, spec in rules.items()}
    for name, weight in weights.items():
        obstacle = _obstacle(weight, found.places[weight])
        for rule, quantizer in parsed.items():
            if not _matches(rule, name):
                continue
            if obstacle is not None and _is_pattern(rule) and quantizer is not None:
                why[name] = f"{obstacle} (name it to quantize it)"  # a pattern for a block means its weights
                continue
            used.add(rule)
            why.pop(name, None)
            if quantizer is None:
                why[name] = "by rule"
            else:
                chosen[name] = quantizer
            break
        else:
            why.setdefault(name, "no rule")
    for rule in rules:
        if rule not in used and rule != "*":
            raise _unmatched(rule, "weight that an earlier rule left", weights)
    return Choice(chosen, why)


def _unmatched(rule: str, what: str, weights: dict[str, Tensor]) -> ValueError:
    return ValueError(
        f"param_groups: the rule {rule!r} matches no {what}; patterns are full matches and mean weights of two or more "
        f"dimensions that belong to a layer that is known, a plain name is exact. Names: {', '.join(weights)}"
    )


def _check(name: str, weight: Tensor, quantizer: Quantizer, found: Survey, pretrained: bool | str) -> Layout | None:
    """The layout of a weight that is to be quantized.

    Raises: ValueError: it can't be done, or what is known does not suffice; the message says what to state.
    """
    places, layout = found.places[weight], found.layout(weight)
    zero = 0 in quantizer.codebook.levels
    for wrong, what in (
        (any(place.padding for place in places), "has a padding_idx, whose row has to stay zero"),
        (any(place.masked for place in places), "is pruned"),
    ):
        if wrong and not zero:
            raise ValueError(
                f"param_groups: {name} {what}, and no level of {quantizer.summary()!r} is 0; take levels with a 0 "
                f"among them, such as 'ternary', or leave it as it is: {{{name!r}: None}} before the other rules, or "
                "exclude="
            )
    by_shape = quantizer.granularity != "tensor" or (quantizer.scale == "auto" and not pretrained)
    if layout is None and weight.dim() >= 2 and by_shape:
        obstacle, layer = _obstacle(weight, places), places[0].layer
        raise ValueError(
            f"param_groups: {name} (shape {tuple(weight.shape)}) can't have {quantizer.summary()!r}, which goes by "
            f"output dimension and fan-in: {obstacle}. Where it is a weight, state them: askew_cuda.register_layer("
            f"{layer}, {name.rpartition('.')[2]!r}, channel_dim=..); or take a scale per tensor that does without, "
            "such as Quantizer(.., scale='mse')"
        )
    quantizer.check(weight, name, 0 if layout is None else layout.channel_dim)
    return layout


def _undecayed(model: nn.Module, named: dict[str, Tensor], found: Survey) -> set[str]:
    """Names of the parameters that trainers don't decay: of less than two dimensions, of norms, and those that the
    model, or a part of it, lists in no_weight_decay(), as timm's do.
    """
    listed: set[str] = set()
    for path, module in model.named_modules():
        lists = getattr(module, "no_weight_decay", None)
        if callable(lists):
            listed |= {f"{path}.{name}".removeprefix(".") for name in lists()}
    norms = {name for name, weight in named.items() if any(place.role == "norm" for place in found.places[weight])}
    return norms | (listed & set(named)) | {name for name, weight in named.items() if weight.dim() < 2}


def _has_trained_norms(model: nn.Module) -> bool:
    """Whether the gain of a normalisation layer varies from channel to channel, which no init makes it do."""
    gains = [module._parameters.get("weight") for module in model.modules() if is_norm(module)]
    known = [gain.detach().flatten() for gain in gains if gain is not None and gain.numel() and not gain.is_meta]
    return any(bool((gain != gain[0]).any()) for gain in known)


def _sharing(weight: Tensor, quantizer: Quantizer, layout: Layout | None) -> str:
    """Whether a scale covers outputs of several groups of a layer, although it is to be of one output or less."""
    if layout is None or layout.groups == 1 or quantizer.granularity == "tensor":
        return ""
    apart = quantizer.group_size is not None and weight.shape[0] // layout.groups % quantizer.group_size == 0
    return "" if apart else f", each scale shared by the {layout.groups} groups"


def _table(named: dict[str, Tensor], found: Survey, choice: Choice) -> str:
    """A line per parameter: name, shape, layer, quantizer, fan-in, number of levels or why there are none."""
    rows = [("weight", "shape", "layer", "quantizer", "fan-in", "levels")]
    for name, weight in named.items():
        quantizer, layout, frozen = choice.chosen.get(name), found.layout(weight), not weight.requires_grad
        last = choice.why.get(name, "") if quantizer is None else str(len(quantizer.codebook))
        last += "" if quantizer is None else _sharing(weight, quantizer, layout)
        last += ", frozen" * frozen
        fan = "" if quantizer is None or layout is None else str(layout.fan_in)
        shape, kind = "x".join(map(str, weight.shape)), found.places[weight][0].layer
        rows.append((name, shape, kind, "-" if quantizer is None else quantizer.summary(), fan, last))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    quantized, total = (sum(named[name].numel() for name in names) for names in (choice.chosen, named))
    lines.append(f"{len(choice.chosen)} of {len(named)} parameters quantized: {quantized:,} of {total:,} weights")
    if any(not named[name].requires_grad for name in choice.chosen):
        lines.append("frozen weights keep their values until they are stepped; quantize_frozen=True says otherwise")
    return "\n".join(lines)


def _prints() -> bool:
    """Whether this process speaks for all of a distributed run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def param_groups(
    model: nn.Module,
    weights: Spec | Mapping[str, Spec],
    *,
    pretrained: bool | str = False,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    no_decay: bool | Collection[str] = False,
    lr_inputs: int | None = None,
    names: bool = True,
    verbose: bool = True,
    **keywords: "Unpack[GroupKeywords]",
) -> list[dict[str, Any]]:
    """Param groups for AskewSGD or AskewAdamW: one for each way of quantizing, and one for the rest. Prints what it
    decided, on rank 0. Which layers are known: docs/layers.md, and :func:`~askew_cuda.register_layer`.

    Args:
        model: the network. Tied weights appear once. Frozen ones are in the groups, too, so that they train when they
            are unfrozen; those of them that are to be quantized keep their values until they are stepped
            (``quantize_frozen=True``: they don't).
        weights: one specification ("binary", "ternary/channel", "2bit/group128", a Quantizer) for the weights of all
            layers that are known except embeddings, routers, and the first and the last layer (in the order of
            registration, embeddings counted, a tied weight in each of its places). Or a dictionary from rules to
            specifications, tried in order: "re:..." matches the whole name, a plain name is exact, "*" is the rest; it
            quantizes exactly what it says, embeddings, first and last layer included. Patterns mean weights of layers
            that are known: anything else, such as a bias, must be named. None as a specification leaves weights as they
            are.
        pretrained: True where the network is trained already, "packed" where it was read from a packed file.
        include, exclude: with one specification: names or "re:..." patterns that are added to it, or taken out.
        no_decay: True splits off what trainers don't decay into groups with weight_decay 0: parameters of less than two
            dimensions, those of norms, and those that the model lists in no_weight_decay(). Or the names of those that
            are not decayed.
        lr_inputs: how many inputs a quantized matrix may have to take the whole ``lr``, which must then be given here,
            too; one of more takes lr * lr_inputs / inputs, in a group of its own, and a ``weight_decay`` that is given
            here times inputs / lr_inputs, so that it decays as fast as the others. For SGD without normalisation
            layers: in units of the distance between two levels, its steps grow with the inputs (docs/recipes.md). None:
            the same for all.
        names: False leaves the names of the parameters out, for wrappers that don't take any, such as
            ZeroRedundancyOptimizer; groups are then split where layers differ in their fan-in or their init.
        verbose: print the table.
        keywords: go into every quantized group, such as anneal="interval". ``normalized`` overrides what is found: that
            the network has normalisation layers, and is not pretrained, or the weight is not that of a last layer
            which no normalisation layer follows.

    Returns:
        Groups with named parameters, quantized ones first. Beside the quantizer they say what is known of their layers:
        ``channel_dim``, ``fan_in`` and ``init_bound`` (one number per weight), ``normalized`` and ``trained_norms``.

    Raises: ValueError: nothing is left to quantize, a rule matches nothing or is no regular expression, a specification
        or ``lr_inputs`` is wrong, or a weight does not suit it; the message says what to do. TypeError: ``weights`` is
        neither.
    """
    named: dict[str, Tensor] = {name: weight for name, weight in model.named_parameters()}
    found = survey(model)
    if given := set(LAYERS) & set(keywords):
        raise ValueError(f"param_groups: {', '.join(given)} is decided layer by layer; use askew_cuda.register_layer")
    choice = _decide(named, found, weights, include, exclude)
    kept = set[str]()
    if not isinstance(no_decay, bool):
        kept = set(no_decay)
        for name in sorted(kept - set(named)):
            raise ValueError(f"param_groups: no_decay names {name!r}, which the model does not have")
    elif no_decay:
        kept = _undecayed(model, named, found)
    settings = {"pretrained": pretrained, **keywords}
    groups = _quantized_groups(model, named, found, choice, kept, settings, _whole_rate(lr_inputs, settings))
    rest: dict[bool, list[tuple[str, Tensor]]] = {}
    for name, weight in named.items():
        if name not in choice.chosen and (weight.requires_grad or weight.dtype in DTYPES):
            rest.setdefault(name in kept, []).append((name, weight))
    if verbose and _prints():
        print(_table(named, found, choice))
    for free, params in sorted(rest.items()):
        groups.append({"params": params, "quantizer": None, **({"weight_decay": 0.0} if free else {})})
    return groups if names else [bare for group in groups for bare in _without_names(group)]


def _without_names(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group as groups of bare parameters, in which everything holds for all of them."""
    lists = {key: group[key] for key in ("fan_in", "init_bound") if isinstance(group.get(key), list)}
    alike: dict[tuple[Any, ...], dict[str, Any]] = {}
    for i, (_, weight) in enumerate(group["params"]):
        own = {key: values[i] for key, values in lists.items()}
        alike.setdefault(tuple(own.values()), {**group, **own, "params": []})["params"].append(weight)
    return list(alike.values())


def _decide(
    named: dict[str, Tensor],
    found: Survey,
    weights: Spec | Mapping[str, Spec],
    include: Iterable[str],
    exclude: Iterable[str],
) -> Choice:
    """What is quantized by one specification, or by rules. Raises as :func:`param_groups`."""
    if isinstance(weights, Mapping) and "levels" not in weights:
        if include or exclude:
            raise ValueError(
                "param_groups: include= and exclude= go with one specification; a dictionary of rules says it all "
                "itself"
            )
        choice = _by_rules(named, found, cast(Mapping[str, Spec], weights))
    elif isinstance(weights, (str, Quantizer, Mapping)):
        include, exclude = ([rules] if isinstance(rules, str) else list(rules) for rules in (include, exclude))
        choice = _select(named, found, weights, include, exclude)
    else:
        raise TypeError(
            f"param_groups: weights = {weights!r}; a specification such as 'ternary', a Quantizer, or a dictionary of "
            "rules"
        )
    if not choice.chosen:
        raise ValueError(
            "param_groups: no weight is left to quantize; one specification leaves out embeddings, routers, the first "
            "and the last layer, and what belongs to no layer that is known. Give a dictionary, such as "
            "{'*': 'ternary'}, or include=. Left alone: "
            + ", ".join(f"{name} ({reason})" for name, reason in choice.why.items())
        )
    return choice


def _whole_rate(lr_inputs: int | None, keywords: dict[str, Any]) -> float:
    """How many inputs a matrix has at most that takes the whole learning rate. Raises as :func:`param_groups`."""
    if lr_inputs is None:
        return math.inf
    if type(lr_inputs) is not int or lr_inputs < 1:
        raise ValueError(f"param_groups: lr_inputs = {lr_inputs!r}; a number of inputs, 1 or more, is needed")
    if "lr" not in keywords:
        raise ValueError(f"param_groups: lr_inputs = {lr_inputs} divides a learning rate; give lr= here, too")
    return lr_inputs


def _times(factor: float, number: Any) -> Any:
    """Their product; what is no number stays, and the optimizer refuses it by name."""
    is_number = isinstance(number, (int, float, Tensor)) and not isinstance(number, bool)
    return factor * number if is_number else number


def _free_ends(model: nn.Module, found: Survey) -> set[Tensor]:
    """The weight of the last layer, where no normalisation layer follows it: what the network says depends on its
    scale. Empty where one does.
    """
    modules = list(model.modules())
    last_norm = max(i for i, module in enumerate(modules) if is_norm(module))
    places: dict[Tensor, list[int]] = {}
    for i, module in enumerate(modules):
        for weight in module._parameters.values():
            if weight is not None:
                places.setdefault(weight, []).append(i)
    return {
        weight
        for weight, occurrences in found.places.items()
        if any(each.order == found.layers - 1 for each in occurrences) and min(places.get(weight, [0])) > last_norm
    }


def _quantized_groups(
    model: nn.Module,
    named: dict[str, Tensor],
    found: Survey,
    choice: Choice,
    undecayed: set[str],
    keywords: dict[str, Any],
    lr_inputs: float,
) -> list[dict[str, Any]]:
    """A group for each quantizer, output dimension and learning rate, for what is not decayed, and for the end of a
    network with normalisation layers.
    """
    normalized = any(map(is_norm, model.modules()))
    free_ends = _free_ends(model, found) if normalized and not keywords["pretrained"] else set()
    settings = {"trained_norms": not keywords["pretrained"] and _has_trained_norms(model), **keywords}
    groups: dict[object, dict[str, Any]] = {}
    for name, quantizer in choice.chosen.items():
        weight, free = named[name], name in undecayed
        layout = _check(name, weight, quantizer, found, keywords["pretrained"])
        channel_dim = 0 if layout is None else layout.channel_dim
        share = 1.0 if layout is None else min(1.0, lr_inputs / layout.fan_in)
        between_norms = bool(keywords.get("normalized", normalized and weight not in free_ends))
        group = groups.setdefault(
            (quantizer, quantizer.blocks, channel_dim, free, share, between_norms),
            {
                "normalized": between_norms,
                "params": [],
                "quantizer": quantizer.plain(),
                "channel_dim": channel_dim,
                "fan_in": [],
                "init_bound": [],
                **settings,
            },
        )
        if share < 1:
            for key, factor in (("lr", share), ("weight_decay", 1 / share)):
                if key in keywords:
                    group[key] = _times(factor, keywords[key])
        if free:
            group["weight_decay"] = 0.0
        group["params"].append((name, weight))
        known = None if weight.dim() < 2 else layout
        group["fan_in"].append(None if known is None else known.fan_in)
        group["init_bound"].append(None if known is None else known.init_bound)
    return list(groups.values())
