"""The command that measures all that is promised of a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def parts() -> list[list[str]]:
    listed = subprocess.run([SCRIPT, "--list"], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in listed.splitlines()]


def test_its_parts_are_benchmarks_with_these_options_and_take_nine_minutes_at_most():
    assert sum(int(limit) for limit, *_ in parts()) <= 9 * 60
    for _, python, option, module, *arguments in parts():
        assert (python, option) == ("python", "-m")
        code = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        known = set(re.findall(r'add_argument\("(--[a-z-]+)"', code))
        assert {argument for argument in arguments if argument.startswith("--")} <= known


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Expected an NVIDIA GPU, but nvidia-smi finds none.")
