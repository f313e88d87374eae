"""From trained to quantized weights: for a while, for good, or as codes and scales."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import Group, GroupedOptimizer
from .interrupts import deferred
from .quantizer import codes, distance, snap


@dataclass(frozen=True)
class TensorReport:
    """One tensor, before finalize() snapped it. Distances are in units of half the distance between levels: 0 on a level, 1 half-way."""

    name: str
    numel: int
    max_distance: float
    share_on_level: float


@dataclass(frozen=True)
class FinalizeReport:
    """What finalize() did: in all, and per tensor. ``never_stepped`` names quantized weights that never received a gradient."""

    max_distance: float
    share_on_level: float
    never_stepped: tuple[str, ...]
    tensors: tuple[TensorReport, ...]


class FinalizingOptimizer(GroupedOptimizer):
    """An optimizer that puts its weights on their levels."""

    def _start(self) -> None:
        super()._start()
        self._quantized_depth = 0
        self._lent: dict[Tensor, Tensor] = {}  # scales that are not set yet, while quantized() holds them

    def _quantized_weights(self) -> Iterator[tuple[str, Tensor, Tensor, tuple[float, ...], Group]]:
        """name, weight, scale, levels and group of each quantized weight; a scale that is not set yet is computed, not stored."""
        for group in self.param_groups:
            quantizer = self._quantizer(group)
            if quantizer is not None:
                for name, weight in self._named(group):
                    scale = self._scale(weight)
                    scale = self._lent.get(weight) if scale is None else scale
                    scale = self._estimate(group, quantizer, name, weight) if scale is None else scale
                    yield name, weight, scale, quantizer.codebook.levels, group

    def quantized_parameters(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(weight, codes, levels, scale) of every quantized weight: the snapped weight is ``scale * levels[codes]``.

        codes: uint8, as the weight. levels: (K,), the scale's dtype. scale: () | (channels, 1, ..) | (rows, groups), the last for
        ``weight.reshape(rows, groups, -1)``. Nothing is mutated.
        """
        for _, weight, scale, levels, _ in self._quantized_weights():
            yield weight, codes(weight.detach(), scale, levels), scale.new_tensor(levels), scale

    @contextlib.contextmanager
    def quantized(self) -> Iterator[None]:
        """Weights on their levels inside the block; the trained ones are back after it, whatever happens in it. May be nested.

        Holds a copy of the quantized weights meanwhile. step() is refused inside.
        """
        if self._quantized_depth:
            self._quantized_depth += 1
            try:
                yield
            finally:
                self._quantized_depth -= 1
            return
        trained: list[tuple[Tensor, Tensor]] = []
        try:
            try:
                with torch.no_grad(), deferred():
                    for _, weight, scale, levels, _ in self._quantized_weights():
                        snapped = snap(weight, scale, levels)
                        trained.append((weight, weight.detach().clone()))
                        self._lent[weight] = scale
                        weight.copy_(snapped)
                    self._quantized_depth = 1
                yield
            finally:
                with deferred():
                    self._give_back(trained)
        finally:  # Ctrl-C may come on the way to where it is held back
            self._give_back(trained)

    @torch.no_grad()
    def _give_back(self, trained: list[tuple[Tensor, Tensor]]) -> None:
        while trained:
            weight, value = trained[-1]
            weight.copy_(value)
            trained.pop()
        self._lent.clear()
        self._quantized_depth = 0

    @torch.no_grad()
    def finalize(self) -> FinalizeReport:
        """Snaps every quantized weight onto its level, for good, and says how far they were.

        Holds a copy of the quantized weights meanwhile: all of them are snapped, or none.

        Returns:
            The largest distance, in units of half the distance between levels, the share of weights that were on a level, and
            the names of quantized weights that never received a gradient; per tensor and in all.

        Raises:
            ValueError: a weight holds NaN; nothing has been snapped. RuntimeError: called inside :meth:`quantized`.
        """
        if self._quantized_depth:
            raise RuntimeError("finalize() inside quantized(): leave the block first")
        found, tensors, annealing = list(self._quantized_weights()), [], 0.0
        for name, weight, scale, levels, group in found:
            away = distance(weight, scale, levels)
            if away.isnan().any():
                raise ValueError(f"finalize: {name} holds {int(away.isnan().sum())} NaN weights; they have no level")
            largest, share = (float(away.max()), float((away == 0).double().mean())) if away.numel() else (0.0, 1.0)
            tensors.append(TensorReport(name, weight.numel(), largest, share))
            annealing = max(annealing, float(group["epsilon"]))
        total = sum(each.numel for each in tensors)
        largest = max((each.max_distance for each in tensors), default=0.0)
        share = sum(each.share_on_level * each.numel for each in tensors) / total if total else 1.0
        if annealing > 0:
            warnings.warn(
                f"finalize: epsilon is still {annealing:.3g}: {1 - share:.1%} of the weights are off their levels and will move, "
                f"by up to {largest:.3g} of half the distance between levels; anneal to 0 first",
                stacklevel=2,
            )
        ready = [(weight, snap(weight, scale, levels), scale) for _, weight, scale, levels, _ in found]
        with deferred():
            for weight, snapped, scale in ready:
                weight.copy_(snapped)
                self.state[weight]["scale"] = scale
                if "remainder" in self.state[weight]:
                    self.state[weight]["remainder"].zero_()
        never = tuple(name for name, weight, *_ in found if weight not in self._stepped)
        return FinalizeReport(largest, share, never, tuple(tensors))
