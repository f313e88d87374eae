"""What `pip install` brings: the source archive holds every source, and what is built of it works in an empty
environment.

ASKEW_BUILD says what is compiled, as it does for setup.py; "none", which takes seconds, where it says nothing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import askew_cuda

ROOT = Path(__file__).parent.parent.parent
KERNELS = os.environ.get("ASKEW_BUILD", "none")
PARTS = ("askew_cuda", "csrc", "pyproject.toml", "setup.py", *(path.name for path in ROOT.glob("[A-Z]*.*")), "LICENSE")
TRAINING = """
import torch, askew_cuda as askew
weight = torch.nn.Parameter(torch.linspace(-1, 1, 96).reshape(8, 12))
optimizer = askew.AskewSGD([weight], lr=0.1, quantizer="ternary", pretrained=True, total_steps=40)
for _ in range(40):
    weight.grad = weight.detach() * 0.1
    optimizer.step()
assert optimizer.finalize().share_on_level == 1.0
print(askew.__file__)
"""


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ASKEW_BUILD")}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=clean | (env or {}), cwd=cwd, check=False
    )


def built(what: str, source: Path, out: Path, **env: str) -> Path:
    found = run(sys.executable, "-m", "build", "--no-isolation", what, "--outdir", out, source, env=env, cwd=out.parent)
    assert found.returncode == 0, found.stdout + found.stderr
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Of a copy, so that no list of files that an earlier build left stands in for MANIFEST.in."""
    checkout = tmp_path_factory.mktemp("checkout")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / part, checkout)
    return built("--sdist", checkout, tmp_path_factory.mktemp("sdist") / "out", ASKEW_BUILD="none")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built of the source archive alone."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return built("--wheel", folder / sdist.name.removesuffix(".tar.gz"), folder / "out", ASKEW_BUILD=KERNELS)


class Environment:
    """An empty one; with torch, that of the tests, which is a gigabyte to install anew."""

    def __init__(self, folder: Path, torch: bool):
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.bin, self.folder = folder / "bin", folder
        if torch:
            site = next(folder.glob("lib/python*/site-packages"))
            (site / "torch.pth").write_text(sysconfig.get_path("platlib") + "\n")

    def pip(self, *arguments: object, **env: str) -> subprocess.CompletedProcess:
        flags = ("--no-deps", "--no-index", "--no-build-isolation", "--verbose")
        return run(sys.executable, "-m", "pip", "--python", self.bin / "python", "install", *flags, *arguments, env=env)

    def run(self, *command: object) -> subprocess.CompletedProcess:
        return run(self.bin / command[0], *command[1:], cwd=self.folder)


def test_the_source_archive_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        there = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    assert any(name.endswith(".cu") for name in sources)
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("askew_cuda/**/*.py")}
    assert sources | modules | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff"} <= there
    assert sdist.name == f"askew_cuda-{askew_cuda.__version__}.tar.gz"


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    there = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("askew_cuda/**/*.py")} | {"askew_cuda/py.typed"}
    compiled = {name for name in there if name.endswith(".so")}
    assert len(compiled) == (KERNELS != "none")
    assert {name for name in there if ".dist-info/" not in name} == modules | compiled


def test_the_wheel_works_where_torch_is(wheel, tmp_path):
    environment = Environment(tmp_path / "env", torch=True)
    assert environment.pip(wheel).returncode == 0
    trained = environment.run("python", "-W", "ignore", "-c", TRAINING)
    assert trained.returncode == 0, trained.stderr
    assert Path(trained.stdout.strip()).is_relative_to(environment.folder)
    assert environment.run("askew-cuda", "--version").stdout == f"askew_cuda {askew_cuda.__version__}\n"
    backends = json.loads(environment.run("askew-cuda", "doctor", "--json").stdout)["backends"]
    if KERNELS == "none":
        assert "without its compiled extension" in backends["cpu"]["absent"]
    else:
        assert backends["cpu"]["absent"] is None
        assert backends["cpu"]["differs"] == []


def test_without_torch_it_says_what_is_missing(wheel, tmp_path):
    environment = Environment(tmp_path / "env", torch=False)
    assert environment.pip(wheel).returncode == 0
    found = environment.run("python", "-c", "import askew_cuda")
    assert "No module named 'torch'" in found.stderr
    metadata = next(environment.folder.glob("lib/python*/site-packages/askew_cuda-*.dist-info/METADATA")).read_text()
    assert "Requires-Dist: torch>=2.11" in metadata


@pytest.mark.parametrize(
    ("torch", "missing"), [(True, "a C++20 compiler"), (False, "a C++20 compiler and torch")], ids=["torch", "nothing"]
)
def test_the_source_archive_installs_where_nothing_compiles(sdist, tmp_path, torch, missing):
    environment = Environment(tmp_path / "env", torch)
    if not torch:  # what builds, and nothing else
        site = next(environment.folder.glob("lib/python*/site-packages"))
        for pattern in ("setuptools*", "_distutils_hack"):
            for each in Path(sysconfig.get_path("purelib")).glob(pattern):
                (site / each.name).symlink_to(each)
    found = environment.pip(sdist, ASKEW_BUILD="auto", PATH="/nowhere", CXX="")
    assert found.returncode == 0, found.stdout + found.stderr
    said = f"{missing} not found: installing the pure Python package"
    assert re.sub(r"\s+", " ", said) in re.sub(r"\s+", " ", found.stdout + found.stderr)
    if torch:
        assert environment.run("python", "-W", "ignore", "-c", TRAINING).returncode == 0
    else:
        insisted = environment.pip("--force-reinstall", sdist, ASKEW_BUILD="cpu", PATH="/nowhere", CXX="")
        assert insisted.returncode != 0
        assert f"{missing} not found, but ASKEW_BUILD = 'cpu' asks for it" in insisted.stdout + insisted.stderr
