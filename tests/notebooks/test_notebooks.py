"""The notebooks run, use public names only, and what is stored in them is what they print and draw."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def run_notebooks():
    specification = importlib.util.spec_from_file_location("run_notebooks", ROOT / "scripts" / "run_notebooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def python_of(cell):
    """A cell without magics; one that begins with `%%writefile *.py` holds Python, too, and other files none."""
    first, _, rest = cell.source.partition("\n")
    if first.startswith("%%writefile") and not first.endswith(".py"):
        return ""
    source = rest if first.startswith("%%") else cell.source
    return "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))


def texts(cell):
    """What a cell printed, and what it showed as text."""
    return [output.text if output.output_type == "stream" else output.data["text/plain"] for output in cell.outputs]


def form(cell):
    """Outputs of a cell: their types, and their words; figures, and with them the widths of tables, may differ."""
    kinds = [(output.output_type, sorted(output.get("data", ()))) for output in cell.outputs]
    words = re.sub(r"\d[\d.,:]*(e[-+]\d+)?", "0", "\n".join(texts(cell)))
    return kinds, re.sub(r"\x1b\[[\d;]*m|[━─]+", "", words).split()


def test_there_are_five():
    assert len(NOTEBOOKS) == 5


@each_notebook
def test_runs_to_the_end_and_stores_what_it_shows(path, run_notebooks, monkeypatch, warm):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executed = [cell for cell in run_notebooks.execute(path).cells if cell.cell_type == "code"]
    assert [form(cell) for cell in executed] == [form(cell) for cell in code_cells(path)]


@each_notebook
def test_public_names_only(path):
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(python_of(cell))):
            if isinstance(node, ast.Attribute):
                assert not re.match(r"_(?!_)", node.attr), node.attr
            if isinstance(node, ast.ImportFrom) and node.module.startswith("lightning_iet"):
                assert "._" not in node.module
                module = importlib.import_module(node.module)
                public = getattr(module, "__all__", None) or [name for name in vars(module) if name[0] != "_"]
                assert {name.name for name in node.names} <= set(public)
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("lightning_iet") for name in node.names)  # the rule above sees all


@each_notebook
def test_stored_as_the_script_stores_it(path, run_notebooks):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 400_000
    assert notebook == run_notebooks.plain(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert any("image/png" in output.get("data", ()) for output in outputs)
    shown = "\n".join(text for cell in code_cells(path) for text in texts(cell))
    assert re.search(r"\d\s?%", shown)  # a share of images
    assert not re.search(r"(?<![\w./:<])/[\w.-]+/|\b[A-Z]:\\|\r", shown)  # a path of a machine; a progress bar


@each_notebook
def test_links_lead_somewhere(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
                assert (path.parent / target).exists(), target
