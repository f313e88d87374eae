"""The first half minute on a GPU: does a kernel launch at all, by every way in, and are the bits those of the CPU?

    python tests/gpu/smoke.py [--device cuda] [--backend auto] [--no-graphs]

--device cpu rehearses the script itself. Each line is flushed at once; a failure does not stop what follows, but for a
device that is lost.
"""

import argparse
import itertools
import time
import traceback
import warnings
from collections.abc import Callable

import torch

import askew_cuda as askew
from askew_cuda import backends

KINDS = {"sgd": (askew.AskewSGD, {"momentum": 0.9}), "adamw": (askew.AskewAdamW, {})}
QUANTIZER = askew.Quantizer("2bit", scale=0.07)


def weights(count: int, device: torch.device, dtype: torch.dtype, offset: int = 0) -> list[torch.nn.Parameter]:
    """The same numbers on every device, each in a buffer of its own that starts ``offset`` elements late."""
    made = []
    for k in range(count):
        generator = torch.Generator().manual_seed(k)
        size = 1 + 997 * (k % 13) + (20_000 if k == 1 else 0)
        values, grads = (torch.randn(size + offset, generator=generator) * s for s in (0.1, 0.05))
        parameter = torch.nn.Parameter(values.to(device, dtype)[offset:])
        parameter.grad = grads.to(device, dtype)[offset:]
        made.append(parameter)
    return made


def same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether all values are the same; NaN counts as NaN."""
    pairs = zip(ones, others, strict=True)
    return all(bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)


class Smoke:
    """Tries things on a device, by one of its backends, and keeps what has failed."""

    def __init__(self, device: torch.device, backend: str):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.backend = backend if self.on_gpu else "auto"
        self.start, self.failed = time.monotonic(), []

    def check(self, name: str, run: Callable[[], bool]) -> None:
        """Runs it, and says at once how it went."""
        try:
            good = run()
            words = "" if good else "DIFFERS"
        except Exception as error:
            good, words = False, f"{type(error).__name__}: {error}"
            traceback.print_exc()
        if self.on_gpu:
            try:
                torch.cuda.synchronize()
            except Exception as error:  # nothing more will run in this process
                print(f"FAILED  {name}: the device is lost: {error}", flush=True)
                raise SystemExit(2) from error
        if not good:
            self.failed.append(name)
        print(f"{'ok' if good else 'FAILED':7} {time.monotonic() - self.start:6.1f} s  {name} {words}", flush=True)

    def train(self, kind, device, backend, count, dtype=torch.float32, offset=0, **keywords) -> list[torch.Tensor]:
        """Weights and codes after three steps in two groups, the second of which is not quantized."""
        mine = weights(count, device, dtype, offset)
        quantized = mine if count == 1 else mine[: -(count // 3) or None]
        groups = [{"params": quantized, "quantizer": QUANTIZER, "outputs": ("codes",)}]
        groups += [{"params": mine[len(quantized) :]}] if len(quantized) < count else []
        optimizer = kind(groups, lr=0.1, backend=backend, total_steps=5, hold=0.0, end=1.0, **keywords)
        for _ in range(3):
            optimizer.step()
        return [w.detach().cpu() for w in mine] + [optimizer.outputs[w]["codes"].cpu() for w in quantized]

    def equal(self, kind, count: int, **keywords) -> bool:
        """Whether the device does what the CPU does."""
        theirs = self.train(kind, torch.device("cpu"), "auto", count, **keywords)
        return same(self.train(kind, self.device, self.backend, count, **keywords), theirs)

    def captured(self, count: int) -> bool:
        """A graph's replays against eager steps."""
        results = []
        for graphed in (False, True):
            mine = weights(count, self.device, torch.float32)
            epsilon = torch.tensor(0.4, device=self.device, dtype=torch.float64)
            quantized = {"quantizer": QUANTIZER, "epsilon": epsilon, "backend": self.backend}
            optimizer = askew.AskewSGD(mine, lr=0.1, momentum=0.9, **quantized)
            optimizer.step()
            torch.cuda.synchronize()
            if graphed:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step()
            for k in range(4):
                epsilon.fill_(0.4 - 0.1 * k)
                graph.replay() if graphed else optimizer.step()
            torch.cuda.synchronize()
            results.append([w.detach().cpu() for w in mine])
        return same(*results)

    def everything(self, graphs: bool) -> None:
        sgd, momentum = KINDS["sgd"]
        for (name, (kind, keywords)), count in itertools.product(KINDS.items(), (1, 18, 19, 300)):
            self.check(f"{name}, {count} tensors", lambda k=kind, w=keywords, c=count: self.equal(k, c, **w))
        for dtype in (torch.bfloat16, torch.float16, *[torch.float64][: self.backend != "triton"]):
            self.check(f"sgd, {dtype}", lambda d=dtype: self.equal(sgd, 5, dtype=d, **momentum))
        self.check("sgd, misaligned", lambda: self.equal(sgd, 25, offset=1, **momentum))
        for rounding in ("remainder", "stochastic"):
            more = {"dtype": torch.bfloat16, "low_precision": rounding, **momentum}
            self.check(f"sgd, bfloat16, {rounding}", lambda m=more: self.equal(sgd, 5, **m))
        for count in (3, 60) if graphs and self.on_gpu else ():
            self.check(f"a captured graph, {count} tensors", lambda c=count: self.captured(c))


def main() -> int:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--no-graphs", action="store_true", help="a capture needs torch's caching allocator")
    options = parser.parse_args()
    smoke = Smoke(options.device, options.backend)
    name = torch.cuda.get_device_name() if smoke.on_gpu else "CPU"
    print(torch.__version__, torch.version.cuda, name, backends.build_info(), flush=True)
    print("backend:", backends.explain(smoke.backend, options.device, torch.float32), flush=True)
    smoke.everything(graphs=not options.no_graphs)
    print(f"failed: {'; '.join(smoke.failed)}" if smoke.failed else "all good", flush=True)
    return len(smoke.failed)


if __name__ == "__main__":
    raise SystemExit(main())
