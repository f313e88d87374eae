"""What the built extension's GPU code is made of: registers, spills, the width of its loads and stores. Needs no
GPU.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cases import EXTENSION

pytestmark = pytest.mark.skipif(
    EXTENSION is None or EXTENSION.build_info()["cuda"] is None,
    reason="the extension was built without CUDA kernels (no nvcc was found)",
)
ROOT = Path(__file__).parent.parent.parent
STORAGES = ("float", "double", "BFloat16", "Float16")


def tool(name: str) -> str:
    """A binary tool of the CUDA toolkit, from the PATH, the toolkit, or the package triton, which brings it along."""
    triton = importlib.util.find_spec("triton")
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    folders += [f"{Path(triton.origin).parent}/backends/nvidia/bin"] if triton else []
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        pytest.skip(
            f"{name} is missing: it comes with the CUDA toolkit and with the package triton (pip install triton)"
        )
    return found


def dump(what: str) -> str:
    return subprocess.run(
        [tool("cuobjdump"), what, EXTENSION.__file__], capture_output=True, text=True, check=True
    ).stdout


@functools.cache
def resources() -> dict[str, dict[str, int]]:
    """What each kernel uses, by its mangled name: registers, bytes of stack (spills lie there), .."""
    found = {}
    for name, usage in re.findall(r"Function (\S+):\n\s*(REG:.*)", dump("-res-usage")):
        numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", usage)}
        kept = found.setdefault(name, numbers)  # one kernel, several architectures: the most of each
        for key, value in numbers.items():
            kept[key] = max(kept.get(key, 0), value)
    return found


@functools.cache
def instructions() -> dict[str, list[str]]:
    """Memory instructions of each kernel, by its mangled name."""
    found, current = {}, []
    for line in dump("-sass").splitlines():
        name = re.search(r"Function : (\S+)", line)
        if name:
            current = found.setdefault(name[1], [])
        elif instruction := re.search(r"\b(LDG|STG|LDL|STL)\.\S+", line):
            current.append(instruction[0])
    return found


def kernels(storage: str) -> list[str]:
    length = f"{len(storage)}{storage}" if len(storage) > 6 else {"float": "If", "double": "Id"}[storage]
    return [
        name
        for name in resources()
        if "step_kernel" in name and f"Variant{length if length[0] == 'I' else 'INS_' + length}" in name
    ]


OLDEST = """
#include "maths/pack.h"
__global__ void narrowed(askew::BFloat16* to, askew::Float16* half, float x) {
  askew::narrow(*to, x);
  askew::narrow(*half, askew::widen(*to));
}
"""


def test_older_gpus_are_built_for(tmp_path):
    """Compute capability 7.5, which cuda_problem() advises there: what converts 16-bit weights is all that differs."""
    (tmp_path / "narrow.cu").write_text(OLDEST)
    command = [tool("nvcc"), "-std=c++20", "-arch=sm_75", f"-I{ROOT}/csrc", "-cubin", "-o", tmp_path / "narrow.cubin"]
    subprocess.run([*command, tmp_path / "narrow.cu"], check=True)


def is_usual(name: str) -> bool:
    """Whether a kernel knows the flags of its launches (csrc/cuda/kinds.h)."""
    return "5UsualI" in name


def learns(name: str) -> bool:
    """Whether scales do, in a usual kernel."""
    return re.search(r"Lb(\d)ELNS_8RoundingE", name)[1] == "1"


def rounding(name: str) -> str:
    """That of a usual kernel."""
    return {"0": "nearest", "1": "remainder", "2": "stochastic"}[re.search(r"8RoundingE(\d)", name)[1]]


def has_wide_state(name: str) -> bool:
    """Whether a usual kernel keeps float32 state of 16-bit weights."""
    return re.search(r"8RoundingE\dELb(\d)", name)[1] == "1"


def test_every_variant_is_there():
    """Two rules; without levels, and uniform, small and large tables under both annealings. Of usual launches: scales
    that learn or don't; of 16-bit weights, too, each rounding with both widths of state, where to nearest no scale
    learns.
    """
    for storage in STORAGES:
        usual = [name for name in kernels(storage) if is_usual(name)]
        assert len(kernels(storage)) - len(usual) == 2 * (1 + 2 * 3), storage
        assert len(usual) == 2 * {"float": 2, "BFloat16": 2 * (3 + 2)}.get(storage, 0), storage


@pytest.mark.parametrize("storage", STORAGES)
def test_registers_are_few_and_none_is_spilled(storage):
    for name in kernels(storage):
        hard = ("AdamW" in name) + ("Float16" in name)
        more = "Float16" in name or ("AdamW" in name and "Interval" in name)
        allowed = 128 if storage == "double" or hard == 2 else 80 if more else 64
        if is_usual(name):
            rounds = rounding(name) == "remainder" or (rounding(name) == "stochastic" and learns(name))
            allowed = 80 if hard == 2 and rounds and not has_wide_state(name) else 64
        used = resources()[name]
        assert used["REG"] <= allowed, name
        assert used["STACK"] == 0, name
        assert used["LOCAL"] == 0, name


@pytest.mark.parametrize("storage", STORAGES)
def test_aligned_tensors_move_sixteen_bytes_at_a_time(storage):
    for name in kernels(storage):
        wide = [each for each in instructions()[name] if ".128" in each]
        if is_usual(name) and has_wide_state(name):  # 16 bytes of state; as many weights are 8 bytes
            half = [each for each in instructions()[name] if ".64" in each]
            assert sum(each.startswith("LDG") for each in half) >= 2, name
            assert sum(each.startswith("STG") for each in half) >= 1, name
            assert sum(each.startswith("LDG") for each in wide) >= (1 if "AdamW" not in name else 2), name
            assert sum(each.startswith("STG") for each in wide) >= (1 if "AdamW" not in name else 2), name
            continue
        # weight, gradient and moments are read at least; all but the gradient are written
        tensors = 2 if "AdamW" not in name else 4
        assert sum(each.startswith("LDG") for each in wide) >= tensors, name
        assert sum(each.startswith("STG") for each in wide) >= tensors - 1, name


@pytest.mark.parametrize("storage", STORAGES)
def test_nothing_lies_in_local_memory(storage):
    for name in kernels(storage):
        assert not [each for each in instructions()[name] if each.startswith(("LDL", "STL"))], name


def test_kernels_around_the_step_are_there_and_small():
    """Of each storage: a look at weights with and without counts and the three parts of the search for scales, each
    with three kinds of levels; and weights of packed codes. What passes over all weights uses no local memory.
    """
    around = [name for name in resources() if re.search(r"(look|fit_\w+|restore)_kernel", name)]
    assert len(around) == 4 * (2 * 3 + 3 * 3 + 1)
    for name in around:
        assert resources()[name]["SHARED"] <= 48 * 1024, name
        if "look_kernel" in name or "restore_kernel" in name:
            assert resources()[name]["REG"] <= (72 if "AroundId" in name else 48), name
            assert resources()[name]["LOCAL"] == resources()[name]["STACK"] == 0, name
