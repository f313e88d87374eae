"""The backends: which are here, why the others are not, which one a call takes, and the call.

Each backend offers ``sgd_`` and ``adamw_`` with the arguments of :mod:`askew_cuda.reference`, whose results it
reproduces.
"""

import functools
import importlib
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import checks, reference
from .checks import DTYPES, Call, Learning

BACKENDS = ("cuda", "triton", "cpu", "reference")

_REINSTALL = "reinstall it: `pip install --no-build-isolation --force-reinstall --no-deps .` in its checkout"


def _load() -> tuple[Any, str]:
    """The compiled extension, or None and the reason with its remedy."""
    try:
        return importlib.import_module(f"{__package__}._C"), ""
    except ModuleNotFoundError:
        return (
            None,
            "the package was installed without its compiled extension; with a C++20 compiler and torch in place, "
            f"{_REINSTALL}",
        )
    except ImportError as error:  # built for another torch, most of the time
        return None, f"the compiled extension does not load under torch {torch.__version__} ({error}); {_REINSTALL}"


extension, _extension_absent = _load()

if extension is not None:

    def _fake(operator: str) -> Callable[..., None]:
        """Nothing is returned; all results are mutated arguments. What is traced is checked when it is traced."""

        def check(*lists: Any, **settings: Any) -> None:
            checks.check_call(Call.of(operator, *lists, **settings))

        return check

    for _operator in ("sgd_", "adamw_"):
        torch.library.register_fake(f"askew_cuda::{_operator}", _fake(_operator))

    # What the operators around the step return, from their tensors; measure mutates its codes besides.
    _RESULTS: dict[str, Callable[..., Any]] = {
        "fit_scales": lambda rows, levels: rows.new_empty(len(rows), dtype=torch.float64),
        "codes": lambda weight, scale, run, levels, base, per_byte: weight.new_empty(
            -(-weight.numel() // per_byte), dtype=torch.uint8
        ),
        "snap": lambda weight, scale, run, levels: torch.empty_like(weight),
        "snap_": lambda weight, scale, run, levels: None,
        "learn_scales_": lambda *lists, **settings: None,
        "measure": lambda weight, scale, run, levels, near, codes, compare: (
            weight.new_empty(5 + len(levels), dtype=torch.int64),
            weight.new_empty(3, dtype=torch.float64),
        ),
    }
    for _operator, _result in _RESULTS.items():
        torch.library.register_fake(f"askew_cuda::{_operator}", _result)


def build_info() -> dict[str, object] | None:
    """What the compiled extension was built with (torch, compiler, cuda, threads); None where there is none."""
    return None if extension is None else extension.build_info()


def _cuda_absent(device: torch.device) -> str:
    """Why the extension can't step weights on this device by CUDA kernels; "" where it can."""
    if extension.build_info()["cuda"] is None:
        return (
            "the extension was built without CUDA kernels; with the CUDA toolkit in place (nvcc; CUDA_HOME says "
            f"where), {_REINSTALL}"
        )
    if device.type != "cuda":
        return f"it steps CUDA tensors, and the weights are on {device}"
    if torch.version.hip is not None:
        return "torch is built for ROCm, whose GPUs don't run CUDA kernels; backend='triton' may"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU that it can use"
    return extension.cuda_problem(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_works(device: torch.device) -> bool:
    return not _cuda_absent(device)


def has_operators(device: torch.device) -> bool:
    """Whether the compiled operators around the step (scales, codes, snapping, ..) take tensors of this device."""
    return extension is not None and (device.type == "cpu" or (device.type == "cuda" and _cuda_works(device)))


def triton_version() -> str:
    """Triton's version, "" where it is not installed. It is imported when it is asked for first, not with the
    package.
    """
    try:
        version: str = importlib.import_module("triton").__version__
    except ImportError:
        return ""
    return version


def _triton_absent(device: torch.device, dtype: torch.dtype) -> str:
    """absent() for Triton, which is loaded only where all else is fit for it."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if dtype == torch.float64:
        return "its kernels compute in float32; backend='reference' steps float64 weights on any device"
    if device.type == "cpu" and not interpreted:
        return "it steps GPU tensors; CPU tensors too, slowly, where TRITON_INTERPRET=1 is set before Triton is loaded"
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"it steps cuda (NVIDIA, AMD) and xpu (Intel) tensors, and the weights are on {device}"
    version = triton_version()
    if not version:
        return "triton is not installed: `pip install triton`"
    if tuple(int(number) for number in version.split(".")[:2]) < (
        3,
        6,
    ):  # 3.5 divides with subnormal numbers flushed to zero
        return f"triton 3.6 or newer is needed, and {version} is installed: `pip install --upgrade triton`"
    if device.type == "cpu":
        return ""
    if interpreted:
        return f"TRITON_INTERPRET=1 is set: it steps CPU tensors only, and the weights are on {device}; unset it"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler at run time: install gcc or clang, or name one in CC"
    return ""


def absent(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why ``backend`` can't step weights of this dtype on this device, and what helps; "" where it can."""
    if dtype not in DTYPES:
        return f"weights of {dtype} are not supported; float32, float64, bfloat16 and float16 are"
    if backend == "cpu":
        return _extension_absent or (
            "" if device.type == "cpu" else f"it steps CPU tensors, and the weights are on {device}"
        )
    if backend == "cuda":
        return _extension_absent or _cuda_absent(device)
    if backend == "triton":
        return _triton_absent(device, dtype)
    return ""


@functools.cache
def _choose(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, a warning or "")."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend = {backend!r}; 'auto', 'cuda', 'triton', 'cpu' or 'reference'")
    if dtype not in DTYPES:
        raise TypeError(absent("reference", device, dtype))
    if backend != "auto":
        reason = absent(backend, device, dtype)
        if reason:
            raise RuntimeError(f"backend = {backend!r} is absent: {reason}")
        return backend, ""
    # Triton's interpreter is for tests, not for "auto".
    candidates = [name for name in BACKENDS if (name, device.type) != ("triton", "cpu")]
    chosen = next(name for name in candidates if not absent(name, device, dtype))
    if chosen != "reference":
        return chosen, ""
    own = absent("cpu" if device.type == "cpu" else "cuda", device, dtype)
    return chosen, f"askew_cuda steps {device.type} weights by its slow pure PyTorch reference: {own}"


_warned: set[str] = set()


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that steps weights of this dtype on this device: the one asked for, or the first present one for
    "auto".

    Raises:
        ValueError: ``backend`` is not a backend's name. TypeError: no backend has this dtype.
        RuntimeError: it is absent; the message says why and what helps.
    """
    chosen, warning = _choose(backend, device, dtype)
    if warning and warning not in _warned:
        _warned.add(warning)
        warnings.warn(warning, stacklevel=2)
    return chosen


def explain(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """What choose() says, and of which weights; for "auto" with the reasons why no other backend of the device was
    taken before it.
    """
    chosen = choose(backend, device, dtype)
    before = BACKENDS[: BACKENDS.index(chosen)] if backend == "auto" else ()
    reasons = [
        f"{name} is absent: {absent(name, device, dtype)}"
        for name in before
        if (name == "cpu") == (device.type == "cpu")
    ]
    return f"{chosen} for {dtype} on {device}" + (f" ({'; '.join(reasons)})" if reasons else "")


def ready(backend: str, call: Call) -> Callable[[], None]:
    """A call that was checked, to be made by a backend that is present; what can be allocated before is."""
    if backend == "reference":
        return functools.partial(getattr(reference, call.operator), **call.arguments())
    if backend == "triton":
        from .triton import launch  # not before: it takes Triton

        return functools.partial(launch.make, call)
    # through the dispatcher, where torch.compile, fake tensors and tracing listen
    return functools.partial(getattr(torch.ops.askew_cuda, call.operator).default, **_as_tensors(call.arguments()))


def planned(keeper: str, calls: Sequence[tuple[Call, Learning | None]]) -> Any:
    """Calls that were checked, to be made together again and again: the plan of "extension" or of "triton"."""
    if keeper == "triton":
        from .triton import launch

        return launch.KeptCalls([call for call, _ in calls])
    with_learning = [(call, call.arguments() | (learning._asdict() if learning else {})) for call, learning in calls]
    return extension.Plan([(call.operator, arguments) for call, arguments in with_learning])


def _as_tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a compiled operator, which takes numbers that change from step to step as tensors."""
    for name in ("lr", "epsilon", "grad_scale", "found_inf", "seed"):
        value = arguments.get(name)
        if value is not None and not isinstance(value, torch.Tensor):
            dtype = torch.int64 if name == "seed" else torch.float64
            arguments[name] = torch.tensor(value, dtype=dtype, device="cpu")
    return arguments


def ready_to_learn(backend: str, call: Call, learning: Learning) -> Callable[[], None]:
    """What follows a call whose scales learn, as :func:`ready`."""
    arguments = learning.arguments(call)
    if backend in ("reference", "triton"):
        return functools.partial(reference.learn_scales_, **arguments)
    return functools.partial(torch.ops.askew_cuda.learn_scales_.default, **_as_tensors(arguments))


class Operators(NamedTuple):
    """The two operators of a backend; :func:`askew_cuda.reference.sgd_` describes their arguments."""

    sgd_: Callable[..., None]
    adamw_: Callable[..., None]


def operators(backend: str) -> Operators:
    """The operators of a backend that is present, for calls by hand: arguments are checked each time."""

    def operator(name: str) -> Callable[..., None]:
        def checked(*lists: Any, **settings: Any) -> None:
            call = Call.of(name, *lists, **settings)
            if not torch.compiler.is_compiling():  # what is traced is checked by the fake kernel
                checks.check_call(call)
            ready(backend, call)()

        return checked

    return Operators(operator("sgd_"), operator("adamw_"))
