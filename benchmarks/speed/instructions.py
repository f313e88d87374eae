"""How many instructions does a weight take?    python -m benchmarks.speed.instructions [--save]

Counted, not estimated: a child process makes a step while this one has it stop after every instruction (Linux, ptrace)
and writes down where it stands. What 2,048 weights take in the extension beyond what 1,024 take is the inner loop, on
the path that such a step goes; objdump (binutils) says which of its instructions work on vectors. One thread, float32,
momentum or AdamW.
"""

import argparse
import ctypes
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from askew_cuda import backends
from benchmarks import results
from benchmarks.speed import step
from benchmarks.speed.workloads import Tensors

TRACEME, PEEKUSER, SINGLESTEP = 0, 3, 9  # sys/ptrace.h
RIP = 16 * 8  # sys/user.h: offset of the instruction pointer, x86-64
SIZES = (1024, 2048)
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.restype = ctypes.c_long
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def mapped(library: Path) -> tuple[int, int]:
    """Where the library lies in this process, and in its children: first address, end."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(library))]
    return int(lines[0].split("-")[0], 16), int(lines[-1].split("-")[1].split()[0], 16)


def executed(run: Callable[[], object], library: Path) -> Counter[int]:
    """How often each instruction of the library, by its offset there, is executed by the call."""
    first, end = mapped(library)
    child = os.fork()
    if child == 0:
        LIBC.ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        run()
        os._exit(0)
    os.waitpid(child, 0)
    found: Counter[int] = Counter()
    while True:
        where = LIBC.ptrace(PEEKUSER, child, RIP, None) & (2**64 - 1)
        if first <= where < end:
            found[where - first] += 1
        if LIBC.ptrace(SINGLESTEP, child, None, None) != 0:
            raise OSError(ctypes.get_errno(), "ptrace does not step a child process here")
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            return found


def disassembled(library: Path) -> dict[int, str]:
    """Offset -> instruction."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return {int(where, 16): what for where, what in re.findall(r"^\s+([0-9a-f]+):\t(.*)$", listing, flags=re.MULTILINE)}


def kind(instruction: str) -> str:
    """vector, memory, prefetch or other.

    vector: arithmetic on SIMD registers. memory: their loads and stores. other: addresses, counters, branches.
    """
    name = instruction.split()[0]
    if name.startswith("prefetch"):
        return "prefetch"
    if not re.search(r"%[xyz]mm|%k\d", instruction):
        return "other"
    return "memory" if re.match(r"v?mov[au]p|vmovdq", name) and "(" in instruction else "vector"


def counts(rule: str, library: Path, listing: dict[int, str]) -> dict[str, dict[str, float]]:
    """Variant -> kind -> instructions per weight."""
    few, many = (Tensors(rule, size, torch.float32, torch.device("cpu")) for size in SIZES)
    few, many = (step.our_variants(tensors, "cpu", everything=rule == "sgd") for tensors in (few, many))
    found = {}
    for name, variant in many.items():
        for each in (variant, few[name]):
            each.run()
        loop = executed(variant.run, library)
        loop.subtract(executed(few[name].run, library))
        kinds: Counter[str] = Counter()
        for offset, times in loop.items():
            kinds[kind(listing[offset])] += times
        found[name] = {key: kinds[key] / (SIZES[1] - SIZES[0]) for key in ("vector", "memory", "prefetch", "other")}
        print(
            f"{rule:6} {name:42} " + ", ".join(f"{key} {value:.3f}" for key, value in found[name].items()), flush=True
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/instructions-cpu.json")
    arguments = parser.parse_args()
    if backends.extension is None:
        raise SystemExit(f"instructions: {backends.absent('cpu', torch.device('cpu'), torch.float32)}")
    torch.set_num_threads(1)
    library = Path(backends.extension.__file__).resolve()
    listing = disassembled(library)
    rules = {rule: counts(rule, library, listing) for rule in ("sgd", "adamw")}
    if arguments.save:
        print("written to", results.save("instructions-cpu", {"rules": rules}))


if __name__ == "__main__":
    main()
