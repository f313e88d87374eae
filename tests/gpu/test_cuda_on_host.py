"""The CUDA kernel's body, every thread of every block, run on the processor under sanitizers; and faults planted in it
are caught.
"""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]
FLAGS += ["-Werror"] if os.environ.get("ASKEW_WERROR") == "1" else []
SANITIZERS = ["-DASKEW_NOT_INLINED", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (CXX says which)")


def compiled(root: Path, source: str, flags: list[str]) -> Path:
    """What the compiler makes of a source under a root with csrc/; kept in build/ until anything that it depends on
    changes.
    """
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    headers = [*sorted(root.glob("csrc/**/*.h")), *sorted(root.glob("tests/gpu/*.h"))]
    texts = [path.read_text() for path in (root / source, *headers)]
    made = ROOT / "build" / "host_run" / hashlib.sha256("\0".join([version, *flags, *texts]).encode()).hexdigest()[:16]
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        new = made.with_suffix(f".{os.getpid()}")
        subprocess.run([COMPILER, *FLAGS, root / source, *flags, "-o", new], check=True)
        new.replace(made)  # another process may have been faster; it made the same
    return made


def host_run(root: Path, *flags: str) -> Path:
    """The program of tests/gpu/host_run.cpp. The CPU kernel that it compares with has tests of its own, and no
    sanitizers.
    """
    kernel = compiled(ROOT, "csrc/cpu/loop.cpp", ["-c", "-fPIC"])
    return compiled(root, "tests/gpu/host_run.cpp", [*SANITIZERS, *flags, f"-Wl,{kernel}"])


def host_setup(root: Path) -> Path:
    """The program of tests/gpu/host_setup.cpp."""
    kernels = [compiled(ROOT, f"csrc/cpu/{name}.cpp", ["-c", "-fPIC"]) for name in ("look", "fit")]
    return compiled(root, "tests/gpu/host_setup.cpp", [*SANITIZERS, *(f"-Wl,{kernel}" for kernel in kernels)])


def run(program: Path, cases: int, seed: int) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=0"}
    return subprocess.run([program, str(cases), str(seed)], capture_output=True, text=True, env=environment)


def test_every_thread_of_every_block_does_what_the_cpu_does():
    """All variants, over hostile sizes, alignments, scale layouts and device-resident numbers; and the map from chunks
    to weights.
    """
    done = run(host_run(ROOT), 1500, 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("1500 of 1500 cases")


def test_every_thread_of_the_kernels_around_the_step_does_what_the_cpu_does():
    """Scales, codes, packed or not, snapped weights, counts and sums; and weights of packed codes."""
    done = run(host_setup(ROOT), 3000, 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("3000 cases")


# What is planted: file, line, what becomes of it, and what the program says then.
FAULTS = {
    "one weight too many at the chunk's end": (
        "cuda/block.h",
        "each < end && each < size",
        "each < end",
        "AddressSanitizer|another value",
    ),
    "one weight too few": (
        "cuda/block.h",
        "int64_t size = left < arguments.chunk ? left :",
        "int64_t size = left < arguments.chunk ? left - 1 :",
        "wrong span|wrong weights",
    ),
    "vectors that are not aligned": (
        "cuda/block.h",
        "return all % 16 == 0 &&",
        "return all % 2 == 0 &&",
        "misaligned address",
    ),
    "codes that are not aligned": (
        "cuda/block.h",
        "&& address(span.codes) % vector == 0",
        "&& vector > 0",
        "misaligned address",
    ),
    "the span before": (
        "cuda/block.h",
        "if (first <= number && number < next)",
        "if (first < number && number <= next)",
        "wrong span|wrong weights",
    ),
    "32 bits for a weight's index": (
        "cuda/block.h",
        "const int64_t begin = number * arguments.chunk",
        "const int64_t begin = static_cast<int32_t>(number * arguments.chunk)",
        "wrong weights",
    ),
    "the scale of the run before": (
        "cuda/block.h",
        "? 0 : 1 + (position",
        "? 0 : (position",
        "wrong scale|another value",
    ),
    "a vector across two scales": ("cuda/block.h", "end <= size && end <= shared.end", "end <= size", "another value"),
    "threads that overlap": (
        "cuda/block.h",
        "position += block_threads * count)",
        "position += block_threads * count / 2)",
        "another value",
    ),
    "an infinity that does not skip the step": (
        "cuda/block.h",
        "if (block.skipped || arguments.sums_alone) return;",
        "if (arguments.sums_alone) return;",
        "another value",
    ),
    "a chunk's float32 gradients where 16-bit ones would lie": (
        "cuda/block.h",
        "from * (has_wide_grad(arguments) ? sizeof(typename V::T) : sizeof(typename V::Storage))",
        "from * sizeof(typename V::Storage)",
        "misaligned address|another value",
    ),
    "float32 gradients that are taken for 16-bit ones": (
        "cuda/block.h",
        "return is_wide ? wide : T(widen(narrow));",
        "return T(widen(narrow));",
        "another value",
    ),
    "a sum that a NaN takes part in": (
        "cuda/block.h",
        "if (!(is_finite(w) && is_finite(g))) continue;",
        "",
        "another sum",
    ),
    "a block of sums that is cut": (
        "cuda/block.h",
        "size = whole_blocks(span, begin + size) - from;",
        "",
        "Sanitizer|another",
    ),
    "vectors that begin where the chunk does": (
        "cuda/block.h",
        "static_cast<int32_t>(block.begin % count) : 0;",
        "0 : 0;",
        "misaligned address",
    ),
    "a column of the table that is taken for zero": (
        "cuda/table.h",
        "used[k] = used[k] || row[k] != 0;",
        "used[k] = row[k] != 0;",
        "another table",
    ),
    "a row of the table too few": (
        "cuda/table.h",
        "if (row >= part.rows) return;",
        "if (row + 1 >= part.rows) return;",
        "another table",
    ),
}


SETUP_FAULTS = {
    "a weight that belongs to two blocks of sums": (
        "cuda/team_look.h",
        "last = first + block_size < size ?",
        "last = first + block_size + 1 < size ?",
        "another count|another sum|AddressSanitizer",
    ),
    "the scale of the run before": (
        "cuda/team_look.h",
        "if (i < run_end) return;",
        "if (i <= run_end) return;",
        "another|other",
    ),
    "a last byte that is not filled up": (
        "cuda/team_look.h",
        "(i < size ? block.codes[i] : 0)",
        "block.codes[i]",
        "other packed codes|Sanitizer",
    ),
    "counts that are not cleared": ("cuda/team_look.h", "block.occupancy[thread] = 0;", "", "another count of a level"),
    "the last trial of a group": (
        "cuda/team_fit.h",
        "trial < block.trials.count; trial += team_halves",
        "trial < block.trials.count - 1; trial += team_halves",
        "another scale",
    ),
    "a range that forgets the row before": (
        "cuda/team_fit.h",
        "block.up = block.down = 0;",
        "",
        "another scale",
    ),
    "sums of trials in one row of chunks": (
        "cuda/team_fit.h",
        "arguments.space.sums[at * arguments.fit.grids.most() + trial]",
        "arguments.space.sums[at + trial]",
        "another scale|Sanitizer",
    ),
}


def planted(fault: tuple[str, str, str, str], folder: Path) -> Path:
    """A copy of the sources with a fault in it."""
    name, line, wrong, _ = fault
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "tests/gpu").mkdir(parents=True)
    for each in ("host_run.cpp", "host_setup.cpp", "host.h"):
        shutil.copy(ROOT / "tests/gpu" / each, folder / "tests/gpu")
    path = folder / "csrc" / name
    text = path.read_text()
    assert text.count(line) == 1
    path.write_text(text.replace(line, wrong))
    return folder


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught(fault, tmp_path):
    done = run(host_run(planted(fault, tmp_path), "-DFEW_VARIANTS"), 20000, 1)
    assert done.returncode != 0
    assert re.search(fault[3], done.stderr), done.stderr[-2000:]


@pytest.mark.parametrize("fault", SETUP_FAULTS.values(), ids=SETUP_FAULTS.keys())
def test_a_fault_planted_around_the_step_is_caught(fault, tmp_path):
    done = run(host_setup(planted(fault, tmp_path)), 3000, 1)
    assert done.returncode != 0
    assert re.search(fault[3], done.stderr), done.stderr[-2000:]


def test_without_a_fault_the_same_cases_pass():
    """Else the faults above would prove nothing."""
    assert run(host_run(ROOT, "-DFEW_VARIANTS"), 20000, 1).returncode == 0
