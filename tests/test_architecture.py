"""The package's rooms depend downwards only; the test tree mirrors them; test files share through tests/helpers."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_iet"

# Each room may import from those after it, and from itself.
ORDER = [
    "__main__", "cli", "tools", "search", "callbacks", "audit", "evaluation", "modules", "shards", "data", "metrics",
    "functional", "plots", "utilities",
]  # fmt: skip

# Tests of what is not in the package, and of the program as a whole.
ELSEWHERE = {"benchmarks", "docs", "helpers", "notebooks"}


def imports(path, package, *, but="$"):
    """Dotted names below a package that a file imports, wherever in the file; those of ``but`` may be left out."""
    text = path.read_text(encoding="utf-8")
    if not re.search(rf"\b{package}\b(?!{but})|\bfrom\s*\.", text):  # parsing takes long
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith(f"{package}."))


def rooms_of(imported):
    """Rooms among imported names; ``lightning_iet.__version__`` and exported classes are in none."""
    return {name.split(".")[1] for name in imported} & set(ORDER)


def test_all_rooms_have_their_place_in_the_order():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_dependencies_point_down_only(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").is_file() else sorted((PACKAGE / room).rglob("*.py"))
    assert files
    allowed = set(ORDER[ORDER.index(room) :])
    imported = {path: list(imports(path, "lightning_iet")) for path in files}
    upward = {
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path, names in imported.items()
        for other in rooms_of(names) - allowed
    }
    assert not upward
    if room != "__main__":  # the package itself exports what lies above
        exported = [path for path, names in imported.items() if any(name.split(".")[1][0].isupper() for name in names)]
        assert not exported, "import a class from its file, not from the package"


def test_no_test_file_imports_from_another():
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "tests").rglob("*.py")
        for name in imports(path, "tests", but=r"\.helpers\b")
        if not name.startswith("tests.helpers")
    }
    assert not found


def test_the_test_tree_mirrors_the_package():
    """Tests of a room, or of a folder in it, lie in a folder of the same name."""
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    ours = {folder for folder in folders if not ELSEWHERE & set(folder.parts)}
    assert not {str(folder) for folder in ours if not (PACKAGE / folder).is_dir()}
