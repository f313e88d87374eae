"""Checkpoints: which saved weight is which of ours, and what its state and its group become here."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import hints, reference, scales
from .distributed import local, place_beside
from .keywords import CONSTRAINT, EXECUTION, LAYERS, SCHEDULE, Group, check_keywords, counter_dtype
from .quantizer import Quantizer
from .schedule import count_at, epsilon_at


def adopt(saved: dict[str, Any], groups: list[Group]) -> tuple[defaultdict[Tensor, Any], list[Group]]:
    """State and param groups that an optimizer with these groups takes over from a state_dict of ours or of torch's.

    Weights are matched by name where both sides have names, else by position; by name, frozen weights may be missing
    there, as other optimizers leave them out. Nothing is mutated, and nothing is shared: all tensors are copies, on the
    devices of the weights and in their memory order.

    Raises: ValueError, TypeError: the weights don't match, a state has another shape than its weight, the state_dict is
        of another rule, or its count of steps is none.
    """
    theirs = saved["param_groups"]
    named = all("param_names" in group for group in (*groups, *theirs))
    sources = _by_name(theirs, groups) if named else _by_position(theirs, groups)
    adopted = [_group(theirs, source, mine) for source, mine in zip(sources, groups, strict=True)]
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for source, group in zip(sources, adopted, strict=True):
        for which, (origin, index) in enumerate(source):
            name = group["param_names"][which] if "param_names" in group else f"params[{which}]"
            weight, kept = group["params"][which], saved["state"].get(index) or {}
            if "scale" not in kept and origin >= 0:
                kept = {**kept, **_told(theirs[origin], group, weight, name)}
            if kept:
                state[weight] = _state(kept, weight, group, name)
    _count(saved, sources, adopted)
    ours = {index for source in sources for _, index in source}
    state.update(
        {key: copy.deepcopy(value) for key, value in saved["state"].items() if key not in ours}
    )  # not of a weight
    return state, adopted


# What a group keeps, whatever is loaded.
_OWN = ("params", "param_names", *EXECUTION, *LAYERS, *SCHEDULE)
# For each weight of a group: which saved group it is in, and its id there; none for frozen ones that were not saved.
Source = list[tuple[int, Any]]
_NOWHERE = (-1, None)


def _by_name(theirs: list[Group], groups: list[Group]) -> list[Source]:
    where = {
        name: (i, index)
        for i, group in enumerate(theirs)
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }
    weights = {
        name: weight for group in groups for name, weight in zip(group["param_names"], group["params"], strict=True)
    }
    names = {name for name, weight in weights.items() if weight.requires_grad or name in where}
    if names != set(where):
        bare, wanted = {bare_name(name): found for name, found in where.items()}, {bare_name(name) for name in names}
        if len(bare) == len(where) and len(wanted) == len(names) and wanted == set(bare):
            return [[bare[bare_name(name)] for name in group["param_names"]] for group in groups]
        raise ValueError(
            f"load_state_dict: {_listed(names - set(where), 'not in the checkpoint')}"
            f"{_listed(set(where) - names, 'only there')}both must have the same weights; a hook of "
            "register_load_state_dict_pre_hook can rename them"
        )
    return [[where.get(name, _NOWHERE) for name in group["param_names"]] for group in groups]


def bare_name(name: str) -> str:
    """A weight's name without what DDP, torch.compile and activation checkpoints put before it, or into it."""
    wrappers = ("module", "_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _listed(names: Iterable[str], what: str) -> str:
    found = sorted(names)
    return f"{', '.join(found[:3])}{' ..' * (len(found) > 3)} ({len(found)} in all) {what}; " if found else ""


def _by_position(theirs: list[Group], groups: list[Group]) -> list[Source]:
    sizes = [[len(group["params"]) for group in side] for side in (theirs, groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"load_state_dict: the checkpoint has param groups of {sizes[0]} weights, this optimizer of {sizes[1]}; "
            "where groups differ, weights are matched by their names, which both need: give both optimizers "
            "model.named_parameters() or askew_cuda.param_groups"
        )
    return [[(i, index) for index in group["params"]] for i, group in enumerate(theirs)]


def _group(theirs: list[Group], source: Source, mine: Group) -> Group:
    """A group of ours with the keywords of the saved one, except those that say how this machine computes, how this
    training is annealed, or what the layers of this model are.
    """
    origins = dict.fromkeys(i for i, index in source if (i, index) != _NOWHERE)
    alike = [_but_for_scales(theirs[i], mine) for i in origins]
    tell = all(_tells_scales(theirs[i], mine) for i in origins)
    if len(origins) > 1 and not (tell and all(each == alike[0] for each in alike)):
        raise ValueError(
            f"load_state_dict: the weights of one param group ({_listed(mine['param_names'], 'here')[:-2]}) lie in "
            f"several groups of the checkpoint ({', '.join(map(str, origins))}); which keywords are theirs? Split the "
            "group"
        )
    saved = {**theirs[next(iter(origins))], **alike[0]} if origins else mine
    if ("betas" in saved) != ("betas" in mine):
        rules = ("AdamW", "SGD") if "betas" in saved else ("SGD", "AdamW")
        raise ValueError(
            f"load_state_dict: the checkpoint is one of {rules[0]}; this optimizer goes by the rule of {rules[1]}"
        )
    taken = {key: copy.deepcopy(value) for key, value in saved.items() if key not in {*_OWN} - {"param_names"}}
    kept = {key: mine[key] for key in (*CONSTRAINT, *EXECUTION) if key in mine and key not in taken}
    names = {"param_names": mine["param_names"]} if "param_names" in mine else {}
    return {**taken, **kept, **names, "params": mine["params"]}


def _but_for_scales(saved: Group, mine: Group) -> Group:
    """What is taken over of a saved group; where its quantizer is that of ours with scales that were given, with ours:
    groups once had to be as many as there were scales.
    """
    rest = {key: value for key, value in saved.items() if key not in _OWN}
    return {**rest, "quantizer": mine["quantizer"]} if _tells_scales(saved, mine) else rest


def _tells_scales(saved: Group, mine: Group) -> bool:
    """Whether the quantizer of a saved group says scales, and is else that of ours, whose scales are state."""
    told, ours = saved.get("quantizer"), mine.get("quantizer")
    if ours is None or not isinstance(told, Mapping) or isinstance(told.get("scale", "auto"), str):
        return False
    return Quantizer.parse({**told, "scale": "auto"}) == Quantizer.parse(ours)


def _told(saved: Group, group: Group, weight: Tensor, name: str) -> dict[str, Tensor]:
    """The scale that a saved group's quantizer says for a weight which never had a state there."""
    if not _tells_scales(saved, group):
        return {}
    quantizer = Quantizer.parse(saved["quantizer"])
    scale = scales.estimate(weight, quantizer, pretrained=True, name=name, channel_dim=group["channel_dim"])
    return {"scale": place_beside(scale, weight)}


def _count(saved: dict[str, Any], sources: list[Source], adopted: list[Group]) -> None:
    """Sets count and epsilon of the adopted groups that anneal themselves. Groups of a checkpoint that did not count
    its steps take the count from their epsilon, all of them the same one.
    """
    silent = []
    for source, group in zip(sources, adopted, strict=True):
        origin = saved["param_groups"][source[0][0]] if source else {}
        theirs, mine = origin.get("total_steps"), group["total_steps"]
        check_keywords(group, ("steps_done", "epsilon"))
        if theirs is not None and theirs != mine and (mine is not None or group["steps_done"] < theirs):
            hints.warn(
                f"load_state_dict: the checkpoint has total_steps = {theirs}, this optimizer total_steps = {mine}; "
                + ("epsilon stays as it is" if mine is None else f"it goes on at step {group['steps_done']} of {mine}")
            )
        if mine is not None and theirs is None and origin.get("quantizer") is not None and "epsilon" in origin:
            silent.append((source, group))
    if silent:
        count = _count_by_epsilon(saved, silent)
        for group in adopted:
            group["steps_done"] = count if group["total_steps"] is not None else group["steps_done"]
    for group in adopted:
        if group["total_steps"] is not None and group["quantizer"] is not None:
            epsilon = epsilon_at(group, group["steps_done"])
            old = group["epsilon"]
            group["epsilon"] = torch.full_like(old, epsilon) if isinstance(old, Tensor) else epsilon


def _count_by_epsilon(saved: dict[str, Any], silent: list[tuple[Source, Group]]) -> int:
    """How many steps a run has made that did not count them: its epsilon says it where it is below 1, else AdamW's
    counters where they lie before the annealing.
    """
    count = max(count_at(group, float(group["epsilon"])) for _, group in silent)
    states = [saved["state"].get(index) for source, _ in silent for _, index in source]
    states = [state for state in states if state]
    if count == 0 and states:
        made = max((int(state["step"]) for state in states if state.get("step") is not None), default=0)
        if made and all(epsilon_at(group, made) == 1 for _, group in silent):
            return made
        hints.warn(
            "load_state_dict: the checkpoint does not say how many steps it has made, and its epsilon is 1: "
            "total_steps are counted from 0. If that is wrong, set group['steps_done'] in every param group"
        )
    return count


def _state(kept: dict[str, Any], weight: Tensor, group: Group, name: str) -> dict[str, Any]:
    """The state of a weight: moments in its dtype, as torch casts them, or in float32 on request; scale and step in
    their own.
    """
    wide = group["state_dtype"] is not None and weight.dtype.itemsize == 2
    state: dict[str, Any] = {}
    for key, value in kept.items():
        if value is None:  # old versions of torch write a momentum_buffer that is None
            continue
        if key == "step":
            value = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
            dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else counter_dtype()
            state[key] = value.detach().to(weight.device if group.get("capturable") else "cpu", dtype, copy=True)
        elif not isinstance(value, Tensor):
            state[key] = copy.deepcopy(value)
        elif key in ("scale", "scale_velocity", "scale_growth"):
            _check_shape(value, _scale_shape(weight, group), key, name)
            scale = place_beside(value.detach(), weight)
            state[key] = scale.to(weight.device, reference.arithmetic(weight.dtype), copy=True)
        else:
            _check_shape(value, weight.shape, key, name)
            dtype = torch.int16 if key == "remainder" else torch.float32 if wide else weight.dtype
            like = torch.empty_like(weight, dtype=dtype, requires_grad=False)
            local(like).copy_(local(place_beside(value.detach(), weight)))
            state[key] = like
    return state


def _scale_shape(weight: Tensor, group: Group) -> tuple[int, ...]:
    if group["quantizer"] is None:
        return ()
    return Quantizer.parse(group["quantizer"]).scale_shape(weight, group["channel_dim"])


def _check_shape(value: Tensor, wanted: tuple[int, ...], key: str, name: str) -> None:
    if tuple(value.shape) != tuple(wanted):
        raise ValueError(
            f"load_state_dict: {key} of {name} has shape {tuple(value.shape)} in the checkpoint; {tuple(wanted)} is "
            "needed here. Weights are matched by name where both optimizers have names, else by their position; scales "
            "also go by the groups' channel_dim, which askew_cuda.param_groups sets"
        )
