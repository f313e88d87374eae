"""The Triton backend twice: to be interpreted, and to be compiled without a GPU. triton.jit decides which when a module
is loaded.
"""

import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: `pip install triton`, or the dev extra")

import triton
from triton.backends.compiler import GPUTarget

from askew_cuda import backends

MODULES = ("storage", "kernel", "where", "launch")


@functools.cache
def load(*, interpreted: bool) -> ModuleType:
    """A copy of askew_cuda.triton.launch of our own; what the library loads for itself stays as it is."""
    package = importlib.import_module("askew_cuda.triton")
    names = [f"{package.__name__}.{name}" for name in MODULES]
    modules = {name: sys.modules.pop(name, None) for name in names}
    attributes = {name: vars(package).pop(name, None) for name in MODULES}
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = interpreted
    try:
        copy = importlib.import_module(names[-1])
    finally:
        triton.knobs.runtime.interpret = before
        for table, kept in ((sys.modules, modules), (vars(package), attributes)):
            for name, module in kept.items():
                table.pop(name, None)
                if module is not None:
                    table[name] = module
    assert copy.INTERPRETED is interpreted
    return copy


class Offline:
    """A driver of a GPU that is not there: enough to compile for it."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Recorder:
    """Stands in for the kernel: compiles what a launch would launch (``compiled``, in order), or only notes what it was
    given.
    """

    def __init__(self, kernel: triton.JITFunction, compiles: bool = True):
        self.kernel, self.compiles = kernel, compiles
        self.compiled, self.given = [], []

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*arguments, **constants) -> None:
            self.given.append((grid, arguments, constants))
            if self.compiles:
                self.compiled.append(self.kernel.warmup(*arguments, grid=grid, **constants))

        return launch


@contextmanager
def offline(capability: int, cache: str | None = None, compiles: bool = True) -> Iterator[tuple[ModuleType, Recorder]]:
    """(the copy to be compiled, what its launches leave), for a GPU of this compute capability."""
    launcher, driver = load(interpreted=False), triton.runtime.driver
    kernel, active, directory = launcher.step_kernel, driver._active, triton.knobs.cache.dir
    devices, launcher.where.DEVICES = launcher.where.DEVICES, ("cpu",)  # their addresses are not followed
    launcher.step_kernel = Recorder(kernel, compiles)
    kernel.device_caches.clear()  # they are by device, and all our devices are number 0
    driver.set_active(Offline(capability))
    triton.knobs.cache.dir = cache or directory
    try:
        yield launcher, launcher.step_kernel
    finally:
        launcher.step_kernel, launcher.where.DEVICES, triton.knobs.cache.dir = kernel, devices, directory
        kernel.device_caches.clear()
        driver._active = active


def variant_of(constants: dict[str, object]) -> tuple[tuple[str, object], ...]:
    """What makes a kernel of its own: the constants of a launch, without those that all launches share."""
    return tuple(
        (name, value) for name, value in constants.items() if name not in ("BLOCK", "num_warps", "enable_fp_fusion")
    )


def on_gpu() -> list[str]:
    """Names of the devices to test on, beside the interpreter."""
    return [] if backends.absent("triton", torch.device("cuda"), torch.float32) else ["cuda"]
