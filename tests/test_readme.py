"""What README says exists."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_named_files_exist():
    names = re.findall(r"\]\(([\w./-]+)\)|(configs/[\w/]+\.yaml)", README)
    paths = [first or second for first, second in names]
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_named_benchmarks_exist():
    names = re.findall(r"python -m benchmarks\.(\w+)", README)
    assert names
    assert [name for name in names if find_spec(f"benchmarks.{name}") is None] == []


@pytest.mark.parametrize("block", BLOCKS)
def test_python_is_valid_and_imports_what_there_is(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_iet"):
            module = __import__(node.module, fromlist=["_"])
            assert all(hasattr(module, alias.name) for alias in node.names)
