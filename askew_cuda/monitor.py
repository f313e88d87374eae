"""What the weights do while they train, sampled now and then: on their levels or not, flipping, how the levels are
occupied.
"""

import io
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .distributed import all_rows, company_of, each_whole, gradient_of, zero_around
from .look import Measured, counting, non_finite
from .optimizer import QuantizedOptimizer
from .wrappers import unwrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture


@dataclass(frozen=True)
class Sample:
    """One tensor, or all of them, at one step.

    share_on_level: of the weights. max_distance: largest distance from a level, in units of half the distance between
        levels.
    flips: share of codes that changed since the sample before; None in the first. occupancy: share of weights per
    level, lowest level first; None for all tensors together. error: rms(w - snapped w) / rms(w). non_finite_grads,
    nan_weights: how many.
    """

    share_on_level: float
    max_distance: float
    flips: float | None
    occupancy: tuple[float, ...] | None
    error: float
    non_finite_grads: int
    nan_weights: int


class Monitor:
    """Samples an optimizer's quantized weights after every ``every``-th step, or, where that is None, when
    :meth:`sample` is called; made by :func:`monitor`.

    It reads weights, gradients and scales and changes nothing: the training is the same, bit for bit. It keeps the last
    codes, one byte per weight. A sample is counted on the weights' device, and a step doesn't wait for its numbers:
    whoever asks for them first does. Of weights that ranks share, all ranks wait and exchange them in the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, every: int | None = 100):
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"monitor: every = {every!r}; a whole number of steps, at least 1, or None")
        optimizer = unwrap(optimizer)
        if not isinstance(optimizer, QuantizedOptimizer):
            raise TypeError(f"monitor: optimizer is a {type(optimizer).__name__}; an AskewSGD or AskewAdamW is needed")
        self.every, self.steps = every, 0
        self._history: list[tuple[int, dict[str, Sample]]] = []
        self._unread: list[tuple[int, Callable[[], dict[str, Sample]]]] = []
        self._optimizer = weakref.ref(optimizer)
        self._codes: dict[str, Tensor] = {}
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @property
    def history(self) -> list[tuple[int, dict[str, Sample]]]:
        """All samples: (step, {name: Sample}), the first one first; the name "all" is all weights together. Waits for
        the device, where a sample's numbers are still there.
        """
        while self._unread:
            step, read = self._unread[0]
            self._history.append((step, read()))
            del self._unread[0]
        return self._history

    def _after_step(self, optimizer: object, args: object, kwargs: object) -> None:
        self.steps += 1
        if self.every is not None and self.steps % self.every == 0:
            self._take()

    def close(self) -> None:
        """Stops sampling."""
        self._hook.remove()

    def sample(self) -> dict[str, Sample]:
        """Takes a sample now, and waits for it."""
        self._take()
        return self.history[-1][1]

    @torch.no_grad()
    def _take(self) -> None:
        optimizer = self._optimizer()
        counts = [] if optimizer is None else self._counts(optimizer)
        if optimizer is None or zero_around(optimizer) is None:
            named = [(name, count) for name, _, count in counts]
            self._unread.append(
                (self.steps, lambda: _samples_of([(name, _numbers_of(count)) for name, count in named]))
            )
        else:  # other ranks step other weights, and all of them are here now
            told = all_rows([(name, weight, _numbers_of(count)) for name, weight, count in counts], optimizer)
            self._unread.append((self.steps, lambda: _samples_of(told)))

    def _counts(self, optimizer: QuantizedOptimizer) -> list[tuple[str, Tensor, "_Counting | dict[str, Any]"]]:
        """What is counted of each weight; of those that are sharded by one rank each, which tells the others."""
        weights = list(optimizer._quantized_weights())
        grads = [gradient_of(weight) for _, weight, *_ in weights]
        items = [
            [weight, scale] + ([] if grad is None else [grad])
            for (_, weight, scale, *_), grad in zip(weights, grads, strict=True)
        ]
        before, self._codes = self._codes, {}  # a rank keeps the codes of the weights that it looks at

        def look(i: int, weight: Tensor, scale: Tensor, grad: Tensor | None = None) -> "_Counting | dict[str, Any]":
            name, part, _, levels, _ = weights[i]
            count = self._count(name, weight, scale, levels, grad, before)
            return _numbers_of(count) if company_of(part) else count

        counts = each_whole(items, look)
        return [(name, weight, count) for (name, weight, *_), count in zip(weights, counts, strict=True)]

    def _count(
        self,
        name: str,
        weight: Tensor,
        scale: Tensor,
        levels: tuple[float, ...],
        grad: Tensor | None,
        earlier: dict[str, Tensor],
    ) -> "_Counting":
        before = earlier.get(name)
        kept = before is not None and before.numel() == weight.numel() and before.device == weight.device
        if before is None or not kept:
            before = torch.empty(weight.numel(), dtype=torch.uint8, device=weight.device)
        self._codes[name] = before
        measured = counting(weight, scale, levels, 0.0, before, kept)
        return _Counting(measured, None if grad is None else non_finite(grad), weight.numel(), kept)

    def log(self, prefix: str = "askew") -> dict[str, float]:
        """The last sample as one flat dictionary for any logger: "askew/all/flips", "askew/0.weight/error", .. Empty
        before it.
        """
        flat: dict[str, float] = {}
        for name, sample in self.history[-1][1].items() if self.history else ():
            for key, value in asdict(sample).items():
                if isinstance(value, tuple):
                    flat |= {f"{prefix}/{name}/occupancy/{level}": share for level, share in enumerate(value)}
                elif value is not None:
                    flat[f"{prefix}/{name}/{key}"] = value
        return flat

    def postfix(self) -> dict[str, str]:
        """The last sample in a few words, for ``tqdm.set_postfix``."""
        if not self.history:
            return {}
        sample = self.history[-1][1]["all"]
        words = {
            "on level": f"{sample.share_on_level:.1%}",
            "flips": "-" if sample.flips is None else f"{sample.flips:.2%}",
        }
        bad = {"nan": sample.nan_weights, "bad grads": sample.non_finite_grads}
        return words | {name: str(count) for name, count in bad.items() if count}

    def picture(self, path: str | PathLike[str] | None = None) -> "Picture":
        """Draws the history: share on a level and flips over the steps; how each tensor's levels are occupied at the
        end.

        Args:
            path: a file that the picture is written to as well; its ending says the format.

        Returns: matplotlib's figure, which a notebook shows where it is the last line of a cell.

        Raises:
            ValueError: no sample was taken.
            ImportError: matplotlib is missing.
        """
        if not self.history:
            raise ValueError("Monitor.picture: there is no sample yet; call sample(), or step the optimizer")
        from matplotlib.figure import Figure

        class Shown(Figure):
            def _repr_png_(self) -> bytes:  # what a notebook asks for, whether or not pyplot is there
                drawn = io.BytesIO()
                self.savefig(drawn, dpi=80)
                return drawn.getvalue()

        steps = [step for step, _ in self.history]
        together = [found["all"] for _, found in self.history]
        figure = Shown(figsize=(12, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(
            steps, [100 * each.share_on_level for each in together], "o-", markersize=3, label="weights on a level"
        )
        flips = [float("nan") if each.flips is None else 100 * each.flips for each in together]
        left.plot(steps, flips, "s-", markersize=3, label="codes that flipped since the last sample")
        left.set(xlabel="step", ylabel="%", ylim=(-2, 102), title="All quantized weights")
        left.legend()
        last = {name: sample for name, sample in self.history[-1][1].items() if name != "all"}
        occupancies = [sample.occupancy or () for sample in last.values()]
        most = max(map(len, occupancies), default=0)
        for level in range(most):
            widths = [100 * each[level] if level < len(each) else 0 for each in occupancies]
            starts = [100 * sum(each[:level]) for each in occupancies]
            right.barh(
                list(last), widths, left=starts, color=f"C{level % 10}", label=f"level {level}" if most <= 8 else None
            )
        right.invert_yaxis()
        right.set(xlabel="% of the weights, lowest level left", title=f"Occupancy of the levels at step {steps[-1]}")
        if 0 < most <= 8:
            right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=most, fontsize=8)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


class _Counting(NamedTuple):
    """What is being counted of a weight, on its device."""

    measured: Callable[[], Measured]
    non_finite: Tensor | None  # of its gradient
    numel: int
    compared: bool  # its codes, with those of the sample before


def _numbers_of(count: _Counting | dict[str, Any]) -> dict[str, Any]:
    """The numbers, once they are there; those that another rank has told are."""
    if isinstance(count, dict):
        return count
    seen = count.measured()
    return {
        "numel": count.numel,
        "on_level": seen.on_level,
        "away": seen.largest,
        "flipped": seen.flipped,
        "compared": count.numel if count.compared else 0,
        "occupancy": seen.occupancy,
        "squares": seen.squares,
        "errors": seen.errors,
        "grads": 0 if count.non_finite is None else int(count.non_finite),
        "nan": seen.nan,
    }


def _samples_of(counts: list[tuple[str, dict[str, Any]]]) -> dict[str, Sample]:
    """Of each weight, and of all together."""
    found = {name: _sample_of(count) for name, count in counts}
    total: dict[str, Any] = dict.fromkeys(
        ("numel", "on_level", "flipped", "compared", "squares", "errors", "grads", "nan"), 0.0
    )
    for _, count in counts:
        for key in total:
            total[key] += count[key]
    total |= {"away": max((each.max_distance for each in found.values()), default=0.0), "occupancy": None}
    return found | {"all": _sample_of(total)}


def _sample_of(count: dict[str, Any]) -> Sample:
    numel = max(count["numel"], 1)
    return Sample(
        share_on_level=count["on_level"] / numel if count["numel"] else 1.0,
        max_distance=count["away"],
        flips=count["flipped"] / count["compared"] if count["compared"] else None,
        occupancy=None if count["occupancy"] is None else tuple(each / numel for each in count["occupancy"]),
        error=(count["errors"] / count["squares"]) ** 0.5 if count["squares"] else 0.0,
        non_finite_grads=int(count["grads"]),
        nan_weights=int(count["nan"]),
    )


def monitor(optimizer: torch.optim.Optimizer, every: int | None = 100) -> Monitor:
    """Watches the quantized weights of an optimizer, or of the one that it wraps: a sample after every ``every``-th
    step (None: only when asked), by PyTorch operations; see :class:`Monitor`.

    >>> import askew_cuda as askew
    >>> weight = torch.nn.Parameter(torch.tensor([0.9, -1.2, 0.1, 1.0]))
    >>> weight.grad = torch.zeros(4)
    >>> optimizer = askew.AskewSGD([("w", weight)], lr=0.1, quantizer=askew.Quantizer("binary", scale=1.0))
    >>> watch = monitor(optimizer, every=1)
    >>> optimizer.step()
    >>> watch.log()["askew/w/share_on_level"]
    0.5
    """
    return Monitor(optimizer, every)
