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
    texts = [path.read_text() for path in (root / source, *sorted(root.glob("csrc/**/*.h")))]
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


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught(fault, tmp_path):
    name, line, planted, message = fault
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "tests/gpu").mkdir(parents=True)
    shutil.copy(ROOT / "tests/gpu/host_run.cpp", tmp_path / "tests/gpu")
    path = tmp_path / "csrc" / name
    text = path.read_text()
    assert text.count(line) == 1
    path.write_text(text.replace(line, planted))
    done = run(host_run(tmp_path, "-DFEW_VARIANTS"), 20000, 1)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr[-2000:]


def test_without_a_fault_the_same_cases_pass():
    """Else the faults above would prove nothing."""
    assert run(host_run(ROOT, "-DFEW_VARIANTS"), 20000, 1).returncode == 0
