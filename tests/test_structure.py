"""The house rules that a machine can check: who may import whom, sizes, and that nothing leaks out of a compilation unit."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    [
        *ROOT.glob("csrc/*"),
        *(path for folder in ("askew_cuda", "benchmarks", "examples", "tests") for path in ROOT.glob(f"{folder}/**/*.py")),
    ]
)
STANDARD = {"cmath", "cstdint", "cstring", "string", "type_traits"}

TORCH = {"lists.h", "lists.cpp", "ops.h", "ops.cpp", "cuda_call.cpp", "module.cpp"}  # torch stops here
# What a C++ file may include beyond the standard headers that kernels use.
INCLUDES = {
    "pack.h": {"immintrin.h"},
    "step.h": {"pack.h"},
    "rounding.h": {"pack.h"},
    "spans.h": {"rounding.h", "step.h"},
    "variants.h": {"spans.h"},
    "cpu.h": {"spans.h"},
    "cpu.cpp": {"cpu.h", "variants.h"},
    "cpu_avx2.cpp": {"cpu.cpp"},
    "cpu_avx512.cpp": {"cpu.cpp"},
    "cuda.h": {"spans.h"},
    "moves.h": {"pack.h"},
    "block.h": {"cuda.h", "moves.h", "variants.h"},
    "cuda.cu": {"algorithm", "block.h", "cuda_runtime.h"},  # CUDA stops here
}
# What a function that needs it may import, not the module: the package imports without.
OPTIONAL = {"matplotlib", "numpy"}
# What a module of the library may import from it. Nothing outside the library may be imported but torch and the standard library,
# and Triton by the modules that only its backend loads.
TRITON = {"triton_step", "triton_launch"}
IMPORTS = {
    "rounding": set(),
    "reference": {"rounding"},
    "quantizer": {"reference"},
    "scales": {"reference", "quantizer"},
    "triton_checks": set(),
    "triton_step": set(),
    "triton_launch": {"reference", "triton_checks", "triton_step"},
    "ops": {"reference", "triton_launch"},
    "keywords": set(),
    "anneal": {"quantizer", "traps"},
    "traps": {"quantizer"},
    "paper": {"anneal", "quantizer"},
    "param_groups": {"quantizer"},
    "interrupts": set(),
    "groups": {"interrupts", "keywords", "ops", "quantizer", "scales"},
    "finalize": {"groups", "interrupts", "quantizer"},
    "checkpoints": {"groups", "keywords", "quantizer", "reference"},
    "base": {"lost_steps", "checkpoints", "finalize", "groups", "interrupts", "ops"},
    "lost_steps": {"groups"},
    "optimizers": {"base", "groups", "ops"},
    "monitor": {"base", "quantizer"},
    "doctor": {"ops", "quantizer"},
    "bits": {"reference"},
    "tensorfile": set(),
    "packed": {"bits", "quantizer", "reference", "tensorfile"},
    "packed_modules": {"bits", "packed", "quantizer"},
    "inspection": {"bits", "packed", "tensorfile"},
    "cli": {"doctor", "inspection"},
    "__init__": {"anneal", "finalize", "monitor", "ops", "optimizers", "packed", "packed_modules", "paper", "param_groups", "quantizer"},
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix == ".py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_longer_than_60_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("name", INCLUDES)
def test_kernels_include_only_what_they_may(name):
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', (ROOT / "csrc" / name).read_text(), flags=re.MULTILINE)
    assert set(included) <= INCLUDES[name] | STANDARD


def test_the_tables_name_every_file():
    assert set(INCLUDES) == {path.name for path in ROOT.glob("csrc/*")} - TORCH
    assert set(IMPORTS) == {path.stem for path in ROOT.glob("askew_cuda/*.py")}


@pytest.mark.parametrize("module", IMPORTS)
def test_modules_import_only_what_they_may(module):
    tree = ast.parse((ROOT / "askew_cuda" / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            outside = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside = {node.module.split(".")[0]}
        elif isinstance(node, ast.ImportFrom):
            inside = {node.module} if node.module else {alias.name for alias in node.names}
            assert inside <= IMPORTS[module], f"line {node.lineno}"
            continue
        else:
            continue
        allowed = (
            sys.stdlib_module_names | {"torch"} | (set() if node in tree.body else OPTIONAL) | ({"triton"} if module in TRITON else set())
        )
        assert outside <= allowed, f"line {node.lineno}: {outside}"


def test_importing_the_package_takes_torch_and_nothing_heavy():
    code = "import sys, torch; before = set(sys.modules); import askew_cuda; print(*(set(sys.modules) - before))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    loaded = {name.split(".")[0] for name in names}
    assert all(name in ("askew_cuda", "torch") or name in sys.stdlib_module_names for name in loaded), loaded


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_no_function_of_one_instruction_set_can_stand_in_for_another():
    """A weak symbol compiled for AVX-512 could be the one that the linker keeps for every machine."""
    objects = [path for path in ROOT.glob("build/temp*/csrc/cpu*.o")]
    if not objects:
        pytest.skip("the extension was not built in this checkout")
    for path in objects:
        symbols = subprocess.run(
            ["nm", "--defined-only", "--demangle", path], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        weak = [line for line in symbols if line.split(maxsplit=2)[1] in "WVu"]
        assert not weak, f"{path.name}: {weak[:3]}"


def test_the_kernel_compiles_for_arm(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("aarch64-linux-gnu-g++ is not installed (Debian: g++-aarch64-linux-gnu)")
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    subprocess.run([compiler, *flags, "-c", ROOT / "csrc/cpu.cpp", "-o", tmp_path / "cpu.o"], check=True)
