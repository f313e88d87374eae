"""The house rules that a machine can check: who may import whom, sizes, names, and that nothing leaks out of a
compilation unit."""

import ast
import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import askew_cuda

ROOT = Path(__file__).parent.parent.parent
PYTHON = sorted(
    path for folder in ("askew_cuda", "benchmarks", "examples", "tests") for path in ROOT.glob(f"{folder}/**/*.py")
)
CSRC = sorted(path for path in ROOT.glob("csrc/**/*") if path.is_file())

# What the files of a folder of csrc/ may include of the others, beyond the standard library. Torch stops at torch/,
# CUDA at cuda/, and the maths knows neither.
STANDARD = {"cmath", "cstdint", "cstring", "string", "type_traits"}
INCLUDES = {
    "maths": {"maths"},
    ".": {"maths", "."},
    "cpu": {"maths", ".", "cpu"},
    "cuda": {"maths", ".", "cuda"},
    "torch": {"maths", ".", "cpu", "cuda", "torch"},
}
OUTSIDE = {"maths/pack.h": {"immintrin.h"}, "cuda/kernel.cu": {"algorithm"}, "cuda/launches.h": {"cuda_runtime.h"}}

# What a function that needs it may import, not the module: the package imports without.
OPTIONAL = {"matplotlib", "numpy", "onnx", "torchao"}
# What is imported only where its library is in use.
BESIDE = {
    "triton/__init__.py": {"triton"},
    "triton/kernel.py": {"triton"},
    "triton/launch.py": {"triton"},
    "triton/where.py": {"triton"},
    "triton/storage.py": {"triton"},
    "integrations/lightning.py": {"lightning"},
    "integrations/timm.py": {"timm"},
    "integrations/transformers.py": {"transformers"},
    "packed/pretrained.py": {"transformers"},
}
# Layers of the package, lowest first: a module may import from its own layer, in one direction, and from those below.
LAYERS = (
    {"reference", "rounding", "summation", "interrupts", "wrappers", "memory"},
    {
        "quantizer",
        "scales",
        "fit",
        "look",
        "layers",
        "schedule",
        "keywords",
        "typed_keywords",
        "checks",
        "backends",
        "triton",
        "distributed",
    },
    {"hints", "anneal", "paper", "param_groups", "checkpoints", "plan"},
    {"optimizer", "optimizers"},
    {"monitor", "packed", "doctor"},
    {"integrations"},
    {"cli", "__init__", "__main__", "__version__"},
)


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_longer_than_60_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", CSRC, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_kernel_includes_only_what_its_folder_may(path):
    here = path.relative_to(ROOT / "csrc")
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), flags=re.MULTILINE):
        folder = str((path.parent / name).resolve().parent.relative_to(ROOT / "csrc"))
        assert folder in INCLUDES[str(here.parent)], name
    if here.parent.name != "torch":
        system = set(re.findall(r"^\s*#\s*include\s*<([^>]+)>", path.read_text(), flags=re.MULTILINE))
        assert system <= STANDARD | OUTSIDE.get(str(here), set())


@pytest.mark.parametrize("folder", ["csrc", "askew_cuda", "benchmarks", "examples", "tests"])
def test_no_file_is_called_what_another_one_is(folder):
    paths = [path for path in (*CSRC, *PYTHON) if path.relative_to(ROOT).parts[0] == folder]
    names = collections.Counter(path.name for path in paths if not path.name.startswith(("__", "conftest")))
    assert not [name for name, count in names.items() if count > 1]


def imports(path: Path) -> list[tuple[ast.stmt, set[str], set[str]]]:
    """(statement, modules of the library, packages outside) of every import."""
    found = []
    tree = ast.parse(path.read_text())
    for_types = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    tree.body = [node for node in tree.body if node not in for_types]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.append((node, set(), {alias.name.split(".")[0] for alias in node.names}))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node, set(), {node.module.split(".")[0]}))
        elif isinstance(node, ast.ImportFrom):
            here = path.parent.relative_to(ROOT / "askew_cuda").parts
            up = here[: len(here) + 1 - node.level]
            inside = [node.module] if node.module else [alias.name for alias in node.names]
            found.append((node, {".".join((*up, name)) for name in inside}, set()))
    return found


MODULES = sorted(ROOT.glob("askew_cuda/**/*.py"))


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_its_layer_and_below(path):
    here = path.relative_to(ROOT / "askew_cuda").parts[0].removesuffix(".py")
    level = next(number for number, layer in enumerate(LAYERS) if here in layer)
    allowed = set().union(*LAYERS[: level + 1])
    for _, inside, _ in imports(path):
        assert {room(name) for name in inside} <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_torch_and_the_standard_library_only(path):
    """And a library beside which alone it is loaded; what is optional inside the function that needs it."""
    beside = BESIDE.get(path.relative_to(ROOT / "askew_cuda").as_posix(), set())
    top = ast.parse(path.read_text()).body
    for node, _, outside in imports(path):
        at_the_top = any(node.lineno == each.lineno for each in top)
        allowed = sys.stdlib_module_names | {"torch"} | (set() if at_the_top else OPTIONAL)
        assert outside <= allowed | beside, f"line {node.lineno}"


def test_a_step_goes_through_the_six_files_that_contributing_names():
    """Each calls the next; and no other file of Python's is on the way, but for leaves that give a number or a name."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = re.findall(r"^[1-6]\. `([^`]+)`", text, flags=re.MULTILINE)
    assert len(files) == 6
    calls = (r"plan\.run\(", r"calls\.run\(", r"call\.run\(", r"cpu_kernels", r"= step<", r"P step\(P w")
    for file, call in zip(files, calls, strict=True):
        assert re.search(call, (ROOT / file).read_text()), file
    seen, weight = set(), torch.nn.Parameter(torch.randn(8, 4))
    optimizer = askew_cuda.AskewSGD([weight], lr=0.1, momentum=0.9, quantizer="ternary", pretrained=True)
    weight.grad = torch.ones(8, 4)
    optimizer.step()

    def trace(frame, event, argument):
        seen.add(Path(frame.f_code.co_filename))

    sys.settrace(trace)
    try:
        optimizer.step()
    finally:
        sys.settrace(None)
    ours = {str(path.relative_to(ROOT)) for path in seen if path.is_relative_to(ROOT / "askew_cuda")}
    assert ours - set(files) <= {"askew_cuda/optimizers.py", "askew_cuda/schedule.py"}


def test_importing_the_package_takes_torch_and_nothing_heavy():
    code = "import sys, torch; before = set(sys.modules); import askew_cuda; print(*(set(sys.modules) - before))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    loaded = {name.split(".")[0] for name in names}
    assert all(name in ("askew_cuda", "torch") or name in sys.stdlib_module_names for name in loaded), loaded
    assert not [name for name in names if name.startswith(("askew_cuda.triton", "askew_cuda.integrations"))]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_no_function_of_one_instruction_set_can_stand_in_for_another():
    """A weak symbol compiled for AVX-512 could be the one that the linker keeps for every machine."""
    objects = [path for path in ROOT.glob("build/temp*/csrc/cpu/*.o")]
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
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    warnings = ["-Wall", "-Wextra", "-Wno-psabi"] + ["-Werror"] * (os.environ.get("ASKEW_WERROR") == "1")
    subprocess.run(
        [compiler, *flags, *warnings, "-c", ROOT / "csrc/cpu/loop.cpp", "-o", tmp_path / "loop.o"], check=True
    )


def test_no_name_of_the_package_means_two_things():
    """But for what is stated twice on purpose: the method, in PyTorch and in Triton."""
    where = collections.defaultdict(set)
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            names += [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            for name in names:
                where[name].add(str(path.relative_to(ROOT / "askew_cuda")))
    twins = [{"reference.py", f"triton/{name}.py"} for name in ("kernel", "launch", "where")]
    twins += [{"rounding.py", "triton/storage.py"}]
    assert {name: files for name, files in where.items() if len(files) > 1 and files not in twins} == {
        "__all__": where["__all__"]
    }
