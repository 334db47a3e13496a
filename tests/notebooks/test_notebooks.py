"""The notebooks use public names only, and are stored as the script that runs them stores them.

That they run, and that what is stored is what they print and draw, takes minutes: `scripts/run_notebooks.py --check`,
of .ci/run.
"""

import ast
import contextlib
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


def test_there_are_five():
    assert len(NOTEBOOKS) == 5


def test_a_cell_that_warns_is_refused(run_notebooks, tmp_path, warm):
    cells = [nbformat.v4.new_code_cell(code) for code in ("print(6 * 7)", "import sys; print('oh', file=sys.stderr)")]
    path = tmp_path / "one.ipynb"
    for count, refused in ((1, contextlib.nullcontext()), (2, pytest.raises(ValueError, match="but got: oh"))):
        nbformat.write(nbformat.v4.new_notebook(cells=cells[:count]), path)
        with refused:
            assert [run_notebooks.texts(cell) for cell in run_notebooks.execute(path).cells] == [["42\n"]]


def test_a_check_sees_other_words_and_other_pictures_but_no_other_figures(run_notebooks):
    def difference(stored, shown):
        return run_notebooks.difference(*map(notebook, (stored, shown)))

    def notebook(shown):
        text = nbformat.v4.new_output("stream", text=shown) if isinstance(shown, str) else shown
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print()", outputs=[text])])

    picture = nbformat.v4.new_output("display_data", data={"text/plain": "56 %", "image/png": "…"})
    assert difference("┃ 56 %  ┃ ━━━", "┃ 5.12 % ┃ ━━━━") is None
    assert "stored:\n56 %\nbut now:\n56 ‰" in difference("56 %", "56 ‰")
    assert difference("56 %", picture) is not None
    assert difference(picture, picture) is None


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
    shown = "\n".join(text for cell in code_cells(path) for text in run_notebooks.texts(cell))
    assert re.search(r"\d\s?%", shown)  # a share of images
    assert not re.search(r"(?<![\w./:<])/[\w.-]+/|\b[A-Z]:\\|\r", shown)  # a path of a machine; a progress bar


@each_notebook
def test_links_lead_somewhere(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
                assert (path.parent / target).exists(), target
