"""Builds the compiled extension where that is possible; a pure Python package otherwise.

ASKEW_BUILD=auto (default): what the machine has the tools for; cuda: CPU and CUDA kernels, or an error; cpu: the CPU
kernels, or an error; none: nothing compiled. TORCH_CUDA_ARCH_LIST: the GPU architectures, as torch understands it. The
extension is built against the torch that is installed where the package goes; that torch needs no CUDA of its own.

ASKEW_WERROR=1: a warning of a compiler is an error. That is for CI: other compilers have other warnings.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

MODES = ("auto", "cuda", "cpu", "none")
# What takes longest comes first, so that no core waits for it at the end.
CUDA_SOURCES = [
    *(f"csrc/cuda/{name}.cu" for name in ("bfloat16", "float16", "float64", "float32", "setup", "kernel")),
    "csrc/torch/setup_cuda.cpp",
    "csrc/torch/stream.cpp",
]
SOURCES = [
    *(f"csrc/cpu/{name}.cpp" for name in ("avx512", "loop", "avx2", "look", "fit")),
    *(
        f"csrc/torch/{name}.cpp"
        for name in ("plan", "operators", "setup", "prepared", "arguments", "radial", "learn_scales", "module")
    ),
]
# at::parallel_for is a plain call in a file that is compiled without OpenMP. On Linux torch brings the same libgomp
# under its own name.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
# Every operation rounds once and none is fused; without errno and traps the compiler may vectorise sqrt and selects.
FLAGS = "-std=c++20 -O3 -g0 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi".split()
NVCC_FLAGS = "-std=c++20 -O3 -fmad=false -Xcompiler -ffp-contract=off".split()
if os.environ.get("ASKEW_WERROR") == "1":
    FLAGS += ["-Werror"]
    NVCC_FLAGS += ["--Werror", "all-warnings"]
ARCHITECTURES = ("8.0", "9.0", "10.0")  # the newest one that nvcc knows also as PTX, for GPUs to come


def find_torch():
    """torch and its extension builder, or None. An isolated build environment hides torch: look where the package will
    go.
    """
    for path in (None, sysconfig.get_path("platlib")):
        if path:
            sys.path.append(path)  # last, so that the build's own tools win
        try:
            import torch
            from torch.utils import cpp_extension
        except ImportError:
            continue
        return torch, cpp_extension
    return None


def find_cuda() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, or where nvcc is. A wrapper script on the PATH has no headers beside it."""
    nvcc = shutil.which("nvcc")
    named = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        nvcc and Path(nvcc).resolve().parent.parent,
        "/usr/local/cuda",
    ]
    for path in (Path(each) for each in named if each):
        if (path / "bin/nvcc").exists() and (path / "include/cuda_runtime.h").exists():
            return path
    return None


def add_cuda(module, cpp_extension, cuda: Path) -> None:
    """The CUDA kernels and a runtime library of their own: nothing of torch's is needed, so that a torch without CUDA
    will do.
    """
    cpp_extension.CUDA_HOME = str(cuda)
    known = subprocess.run(
        [cuda / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout.split()
    default = ";".join(each for each in ARCHITECTURES if f"compute_{each.replace('.', '')}" in known) + "+PTX"
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default)
    module.sources = CUDA_SOURCES + module.sources
    module.define_macros += [("ASKEW_WITH_CUDA", None), ("ASKEW_CUDA_ARCHITECTURES", f'"{architectures}"')]
    module.library_dirs += [str(cuda / folder) for folder in ("lib64", "lib") if (cuda / folder).is_dir()]
    module.libraries += ["cudart_static", "dl", "rt", "pthread"]
    changed = max(header.stat().st_mtime for header in Path("csrc").rglob("*.h"))
    for built in Path("build").glob(
        "temp*/csrc/cuda/*.o"
    ):  # beside a torch without CUDA, BuildExtension does not see that headers changed
        if built.stat().st_mtime < changed:
            built.unlink()


def extension():
    """(ext_modules, cmdclass) for setup()."""
    mode = os.environ.get("ASKEW_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"ASKEW_BUILD = {mode!r}; {', '.join(MODES[:-1])} or {MODES[-1]}")
    if mode == "none":
        return [], {}
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    found, cuda = find_torch(), find_cuda() if mode in ("auto", "cuda") else None
    wanted = {"a C++20 compiler": compiler and shutil.which(compiler.split()[0]), "torch": found}
    if mode == "cuda":
        wanted["the CUDA toolkit (nvcc; CUDA_HOME says where)"] = cuda
    missing = " and ".join(name for name, there in wanted.items() if not there)
    if missing and mode != "auto":
        raise SystemExit(f"askew_cuda: {missing} not found, but ASKEW_BUILD = {mode!r} asks for it")
    if missing:
        print(
            f"askew_cuda: {missing} not found: installing the pure Python package, without compiled kernels",
            file=sys.stderr,
        )
        return [], {}
    torch, cpp_extension = found
    module = cpp_extension.CppExtension(
        "askew_cuda._C",
        list(SOURCES),
        depends=[str(path) for path in Path("csrc").rglob("*.*")],
        extra_compile_args={"cxx": FLAGS + OPENMP, "nvcc": NVCC_FLAGS},
        extra_link_args=OPENMP,
        define_macros=[("ASKEW_TORCH_VERSION", f'"{torch.__version__}"')],
    )
    # torch's headers are not held to our warnings
    module.extra_compile_args["cxx"] = module.extra_compile_args["cxx"] + [
        f"-isystem{path}" for path in module.include_dirs
    ]
    module.include_dirs = []
    if cuda:
        add_cuda(module, cpp_extension, cuda)
    elif mode == "auto":
        print(
            "askew_cuda: no CUDA toolkit found (nvcc; CUDA_HOME says where): building the CPU kernels only",
            file=sys.stderr,
        )
    return [module], {"build_ext": cpp_extension.BuildExtension}


ext_modules, cmdclass = extension()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
