"""What is here, what is not and why, and whether each backend computes what the reference computes."""

import itertools
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from . import backends, checks
from .quantizer import Codebook


def _version_of(command: str | None) -> str:
    """First line of what a command says of its version; "not found"."""
    if command is None or shutil.which(command) is None:
        return "not found"
    run = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    return (
        f"{(lines[-1] if command.endswith('nvcc') else lines[0]).strip()} ({shutil.which(command)})"
        if lines
        else "says nothing"
    )


def machine() -> dict[str, str]:
    """Versions and tools, by name."""
    compiler = os.environ.get("CXX") or next((each for each in ("c++", "g++", "clang++") if shutil.which(each)), None)
    devices = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    built = backends.build_info()
    threads = f"{torch.get_num_threads()} threads" if built and built["threads"] else "one thread: built without OpenMP"
    return {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}",
        "GPU": ", ".join(devices) or "none that torch can use",
        "driver": _version_of("nvidia-smi"),
        "C++ compiler": _version_of(compiler),
        "nvcc": _version_of("nvcc"),
        "triton": backends.triton_version() or "not installed",
        "extension": "not there"
        if built is None
        else f"built for torch {built['torch']} by {built['compiler']}, CUDA {built['cuda']}",
        "CPU kernels": "none" if built is None else f"{', '.join(backends.extension.cpu_capabilities())}; {threads}",
    }


def _step(
    backend: str, device: torch.device, dtype: torch.dtype, rule: str, levels: tuple[float, ...], anneal: str
) -> list[torch.Tensor]:
    """Three steps of one backend on 1,000 weights: all that they leave."""
    generator = torch.Generator().manual_seed(0)

    def numbers() -> torch.Tensor:
        return (torch.randn(1000, generator=generator, dtype=torch.float64) * 0.1).to(device, dtype)

    weight, state = numbers(), [numbers(), numbers().abs()]
    scale = torch.full((), 0.05, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    codes, step = torch.zeros(1000, dtype=torch.uint8, device=device), torch.zeros(())
    settings = {
        "lr": 0.03,
        "weight_decay": 0.01,
        "maximize": False,
        "epsilon": 0.5,
        "anneal": anneal,
        "skew_at": "velocity",
    }
    settings |= {"recovery": 0.5, "alpha": None, "max_step": 0.5, "clip": True}
    operators = backends.operators(backend)
    lists: tuple[list[Any], ...] = ([scale], list(levels), [codes], [])
    for _ in range(3):
        if rule == "sgd":
            operators.sgd_(
                [weight], [numbers()], state[:1], *lists, momentum=0.9, dampening=0.0, nesterov=True, **settings
            )
        else:
            rest = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False}
            operators.adamw_([weight], [numbers()], state[:1], state[1:], [], [step], *lists, **rest, **settings)
    return [weight, *state, codes, step]


def self_test(backend: str, device: torch.device) -> Iterator[tuple[str, bool]]:
    """(case, whether the backend's bits are the reference's) for each dtype that it has, rule, codebook and
    annealing.
    """
    books = {name: Codebook.named(name).levels for name in ("binary", "ternary", "4bit", "nf4")}
    dtypes = [dtype for dtype in checks.DTYPES if not backends.absent(backend, device, dtype)]
    for dtype, rule, name, anneal in itertools.product(dtypes, ("sgd", "adamw"), books, ("capture", "interval")):
        mine, wanted = (_step(each, device, dtype, rule, books[name], anneal) for each in (backend, "reference"))
        yield f"{dtype} {rule} {name} {anneal}", all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


def examine() -> dict[str, Any]:
    """All that there is to know, as plain values, which JSON takes: ``machine`` as :func:`machine`; ``backends``, by
    name: ``absent`` (the reason, or None), and where it is present ``interpreted`` (Triton, on the CPU), ``cases``, how
    many the self-test has, and ``differs``, those whose bits are not the reference's.
    """
    gpu = torch.device("cuda") if torch.cuda.is_available() else None
    found: dict[str, Any] = {}
    for backend in backends.BACKENDS[:-1]:
        interpreted = (
            backend == "triton" and gpu is None and not backends.absent(backend, torch.device("cpu"), torch.float32)
        )
        device = torch.device("cpu") if backend == "cpu" or interpreted else gpu or torch.device("cuda")
        reason = backends.absent(backend, device, torch.float32)
        if reason:
            found[backend] = {"absent": reason}
            continue
        results = list(self_test(backend, device))
        differs = [case for case, good in results if not good]
        found[backend] = {"absent": None, "interpreted": interpreted, "cases": len(results), "differs": differs}
    return {"machine": machine(), "backends": found}


def doctor(as_json: bool = False) -> int:
    """Prints all of it; 0 where every backend that is here agrees with the reference, else 1."""
    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return int(any(each.get("differs") for each in found["backends"].values()))


def _print(found: dict[str, Any]) -> None:
    for name, fact in found["machine"].items():
        print(f"{name:14}{fact}")
    print()
    for backend, each in found["backends"].items():
        if each["absent"]:
            print(f"{backend:14}absent: {each['absent']}")
            continue
        where = " (interpreted on the CPU)" if each["interpreted"] else ""
        print(
            f"{backend:14}present{where}; self-test: {each['cases'] - len(each['differs'])} of {each['cases']} cases "
            "equal the reference bit for bit"
        )
        for case in each["differs"]:
            print(f"{'':14}DIFFERS: {case}; please report it with the lines above")
    print(f"{'reference':14}present, on every device: pure PyTorch")
