"""Which weights are quantized, and how: rules to param groups, and the table that says so."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from .quantizer import Quantizer

Levels = str | Quantizer | Mapping[str, Any]
Spec = Levels | None
Choice = tuple[dict[str, Levels], dict[str, str]]  # each name's specification; why a weight has none


def _matches(rule: str, name: str) -> bool:
    """ "re:..." is a full match, "*" is everything, anything else is exact."""
    return bool(re.fullmatch(rule[3:], name)) if rule.startswith("re:") else rule in ("*", name)


def _is_norm(module: nn.Module) -> bool:
    return (
        isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase))
        or "norm" in type(module).__name__.lower()
    )


def _select(
    model: nn.Module, weights: dict[str, Tensor], spec: Levels, include: Iterable[str], exclude: Iterable[str]
) -> Choice:
    """One specification for a whole network: each name's specification, and why a weight has none."""
    owners: dict[Tensor, list[nn.Module]] = {}
    layers: list[Tensor] = []  # in the order of registration, a tied one in each of its places
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            owners.setdefault(tensor, []).append(module)
            if tensor.dim() >= 2 and not _is_norm(module):
                layers.append(tensor)
    chosen: dict[str, Levels] = {}
    why: dict[str, str] = {}
    for name, weight in weights.items():
        if any(_matches(rule, name) for rule in exclude):
            why[name] = "excluded"
        elif any(_matches(rule, name) for rule in include):
            chosen[name] = spec
        elif weight.dim() < 2:
            why[name] = f"{weight.dim()}-d"
        elif any(_is_norm(module) for module in owners[weight]):
            why[name] = "norm"
        elif any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in owners[weight]):
            why[name] = "embedding"
        elif weight is layers[0] or weight is layers[-1]:
            why[name] = "first layer" if weight is layers[0] else "last layer"
        else:
            chosen[name] = spec
    return chosen, why


def _by_rules(weights: dict[str, Tensor], rules: Mapping[str, Spec]) -> Choice:
    """A dictionary quantizes exactly what its rules say; the first rule that matches wins."""
    chosen: dict[str, Levels] = {}
    why: dict[str, str] = {}
    used: set[str] = set()
    for name, weight in weights.items():
        for rule, spec in rules.items():
            if not _matches(rule, name):
                continue
            if weight.dim() < 2 and rule != name and spec is not None:
                why[name] = (
                    # a pattern for a block means its matrices, not its biases
                    f"{weight.dim()}-d (name it to quantize it)"
                )
                continue
            used.add(rule)
            why.pop(name, None)
            if spec is None:
                why[name] = "by rule"
            else:
                chosen[name] = spec
            break
        else:
            why.setdefault(name, "no rule")
    for rule in rules:
        if rule not in used and rule != "*":
            raise ValueError(
                f"param_groups: the rule {rule!r} matches no weight that an earlier rule left; patterns are full matches and mean weights "
                f"of two or more dimensions, a plain name is exact. Names: {', '.join(weights)}"
            )
    return chosen, why


def _table(named: dict[str, Tensor], chosen: dict[str, Levels], why: dict[str, str]) -> str:
    """A line per parameter: name, shape, quantizer, number of levels or why there are none."""
    rows = [("weight", "shape", "quantizer", "levels")]
    for name, weight in named.items():
        summary, last = "-", why.get(name, "")
        if name in chosen:
            quantizer = Quantizer.parse(chosen[name])
            summary, last = quantizer.summary(), str(len(quantizer.codebook))
        rows.append((name, "x".join(map(str, weight.shape)), summary, last))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    quantized, total = sum(named[name].numel() for name in chosen), sum(weight.numel() for weight in named.values())
    return "\n".join(
        [*lines, f"{len(chosen)} of {len(named)} parameters quantized: {quantized:,} of {total:,} weights"]
    )


def param_groups(
    model: nn.Module,
    weights: Spec | Mapping[str, Spec],
    *,
    pretrained: bool | str = False,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    verbose: bool = True,
    **keywords: Any,
) -> list[dict[str, Any]]:
    """Param groups for AskewSGD or AskewAdamW: one for each way of quantizing, and one for the rest. Prints what it
    decided.

    Args:
        model: the network. Tied weights appear once; parameters that don't require a gradient are left out.
        weights: one specification ("binary", "ternary/channel", "2bit/group128", a Quantizer) for every weight of two
            or more dimensions except embeddings, norms, and the first and the last layer (in the order of
            registration). Or a dictionary
            from rules to specifications, tried in order: "re:..." matches the whole name, a plain name is exact, "*" is
            the rest; it quantizes exactly what it says, first and last layer included. Patterns mean weights of two or
            more dimensions: a bias must be named. None as a specification leaves weights as they are.
        pretrained: True where the network is trained already, "packed" where it was read from a packed file.
        include, exclude: with one specification: names or "re:..." patterns that are added to it, or taken out.
        verbose: print the table.
        keywords: go into every quantized group, such as anneal="interval". ``normalized`` says what is seen in the
            model, else.

    Returns:
        Groups with named parameters, quantized ones first.

    Raises: ValueError: nothing is left to quantize, a rule matches nothing, or a specification is wrong. TypeError:
        ``weights`` is neither.
    """
    named: dict[str, Tensor] = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    by_rules = isinstance(weights, Mapping) and "levels" not in weights
    if by_rules:
        if include or exclude:
            raise ValueError(
                "param_groups: include= and exclude= go with one specification; a dictionary of rules says it all itself"
            )
        chosen, why = _by_rules(named, cast(Mapping[str, Spec], weights))
    elif isinstance(weights, (str, Quantizer, Mapping)):
        include, exclude = ([rules] if isinstance(rules, str) else list(rules) for rules in (include, exclude))
        for rule in (*include, *exclude):
            if not any(_matches(rule, name) for name in named):
                raise ValueError(f"param_groups: the rule {rule!r} matches no parameter. Names: {', '.join(named)}")
        chosen, why = _select(model, named, weights, include, exclude)
    else:
        raise TypeError(
            f"param_groups: weights = {weights!r}; a specification such as 'ternary', a Quantizer, or a dictionary of rules"
        )
    if not chosen:
        raise ValueError(
            "param_groups: no weight is left to quantize; one specification leaves out embeddings, norms, the first and the last layer. "
            f"Give a dictionary, such as {{'*': 'ternary'}}, or include=. Names: {', '.join(named)}"
        )
    normalized = any(map(_is_norm, model.modules()))
    groups: dict[Quantizer, dict[str, Any]] = {}
    for name, spec in chosen.items():
        quantizer = Quantizer.parse(spec)
        quantizer.check(named[name], name)
        settings = {"quantizer": quantizer.plain(), "pretrained": pretrained, "normalized": normalized, **keywords}
        group = groups.setdefault(quantizer, {"params": [], **settings})
        group["params"].append((name, named[name]))
    rest = [(name, weight) for name, weight in named.items() if name not in chosen]
    if verbose:
        print(_table(named, chosen, why))
    return [*groups.values(), *([{"params": rest, "quantizer": None}] if rest else [])]
