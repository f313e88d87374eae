"""Builds the compiled extension where that is possible; a pure Python package otherwise.

ASKEW_BUILD=auto (default): what the machine has the tools for; cpu: the CPU kernels, or an error; none: nothing compiled.
The extension is built against the torch that is installed where the package goes.
"""

import os
import shutil
import sys
import sysconfig

from setuptools import setup

SOURCES = ["csrc/module.cpp", "csrc/ops.cpp", "csrc/cpu.cpp", "csrc/cpu_avx2.cpp", "csrc/cpu_avx512.cpp"]
HEADERS = ["csrc/cpu.cpp", "csrc/cpu.h", "csrc/ops.h", "csrc/pack.h", "csrc/spans.h", "csrc/step.h"]
# Every operation rounds once and none is fused; without errno and traps the compiler may vectorise sqrt and selects.
# at::parallel_for is a plain call in a file that is compiled without OpenMP. On Linux torch brings the same libgomp under its own name.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]


def find_torch():
    """torch's extension builder, or None. An isolated build environment hides torch: look where the package will go."""
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


def extension():
    """(ext_modules, cmdclass) for setup()."""
    mode = os.environ.get("ASKEW_BUILD", "auto")
    if mode not in ("auto", "cpu", "none"):
        raise SystemExit(f"ASKEW_BUILD = {mode!r}; auto, cpu or none")
    if mode == "none":
        return [], {}
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    found = find_torch()
    missing = [
        name for name, there in (("a C++17 compiler", compiler and shutil.which(compiler.split()[0])), ("torch", found)) if not there
    ]
    if missing:
        message = f"askew_cuda: {' and '.join(missing)} not found"
        if mode != "auto":
            raise SystemExit(f"{message}, but ASKEW_BUILD = {mode!r} asks for the compiled extension")
        print(f"{message}: installing the pure Python package, without compiled kernels", file=sys.stderr)
        return [], {}
    torch, cpp_extension = found
    module = cpp_extension.CppExtension(
        "askew_cuda._C",
        SOURCES,
        depends=HEADERS,
        extra_compile_args=FLAGS + OPENMP,
        extra_link_args=OPENMP,
        define_macros=[("ASKEW_TORCH_VERSION", f'"{torch.__version__}"')],
    )
    # torch's headers are not held to our warnings
    torch_paths = list(module.include_dirs)
    module.include_dirs = []
    module.extra_compile_args += [f"-isystem{path}" for path in torch_paths]
    return [module], {"build_ext": cpp_extension.BuildExtension}


ext_modules, cmdclass = extension()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
