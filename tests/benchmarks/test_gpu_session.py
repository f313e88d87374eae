"""The scripts for a GPU machine name what is there. What they do, benchmarks/gpu_rehearsal.sh tries."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ("gpu_session.sh", "gpu_rehearsal.sh")
SESSION = (ROOT / "benchmarks/gpu_session.sh").read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_bash(script):
    subprocess.run(["bash", "-n", ROOT / "benchmarks" / script], check=True)


def test_files_and_modules_that_are_named_are_there():
    files = re.findall(r"(?:tests|benchmarks)/[\w/]*\w(?:\.\w+)?", SESSION)
    modules = [f"benchmarks.speed.{name}" for name in re.findall(r"^bench (\w+)", SESSION, flags=re.MULTILINE)]
    modules += re.findall(r"-m (benchmarks\.speed\.\w+)", SESSION)
    assert len(files) > 5
    assert len(modules) > 5
    for name in [*files, *(f"{module.replace('.', '/')}.py" for module in modules)]:
        assert (ROOT / name).exists(), name
