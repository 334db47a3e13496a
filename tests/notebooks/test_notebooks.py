"""The notebooks run, and use public names only.

That what is stored in them is what they print and draw takes minutes: `scripts/run_notebooks.py --check`, of .ci/run.
"""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What makes a notebook short: it runs through all of its code, and learns nothing.
SMALLER = {
    "01_quick_start": {
        "20 * 48": "48", "max_epochs=10": "max_epochs=2",
        "Evaluation(256, num_inference_steps=20": "Evaluation(16, num_inference_steps=2",
    },
    "02_existing_project": {
        "20 * 64": "2 * 64", "max_epochs=25": "max_epochs=2", "log_every_n_steps=20": "log_every_n_steps=1",
    },
    "03_reading_an_audit": {
        "[:300]": "[:40]", "[300:700]": "[300:360]", "[700:1000]": "[700:730]", "train[:40]": "train[:10]",
    },
    "04_sweeping_thresholds": {
        "20 * 32": "32", "max_epochs: 10": "max_epochs: 2", "num_samples: 64, num_inference_steps: 10": "num_samples: 16, num_inference_steps: 2",
        "[0.0, 0.5, 0.9]": "[0.0, 0.9]",
    },
    "05_what_to_fine_tune": {
        "train_set, 200)": "train_set, 4)", "train_set, 80,": "train_set, 4,", "% 40": "% 2", "trials=6": "trials=2",
        "sample(100, num_inference_steps=10)": "sample(50, num_inference_steps=2)",
        "range(50, 1000, 100)": "range(50, 1000, 500)",
    },
}  # fmt: skip
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


@each_notebook
def test_runs_to_the_end_in_small(path, run_notebooks, monkeypatch, warm):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executed = run_notebooks.execute(path, changes=SMALLER[path.stem])
    assert [run_notebooks.kinds(cell) for cell in run_notebooks.code_cells(executed)] == [
        run_notebooks.kinds(cell) for cell in code_cells(path)
    ]


def test_a_change_that_changes_nothing_is_a_mistake(run_notebooks):
    with pytest.raises(ValueError, match=r"Argument `changes` expected code of '.*01.*', but got 'max_epochs=11'."):
        run_notebooks.execute(NOTEBOOKS[0], changes={"max_epochs=11": "max_epochs=1"})


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
