"""Run the notebooks and store what they print and draw, so that readers see it without running anything.

    python scripts/run_notebooks.py                        refresh all of them
    python scripts/run_notebooks.py notebooks/01*.ipynb    refresh one
    python scripts/run_notebooks.py --out pages            leave the stored outputs as they are
    python scripts/run_notebooks.py --check                store nothing: is what is stored what they still show?

Each runs from its first cell to its last, in a kernel and an empty folder of its own. A notebook that fails, or that
writes to stderr (a warning, say), is not stored. Nor are versions and execution metadata, which differ for no reason.
With --check, pictures must be where they are stored, and words must be the same; figures may differ.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def execute(path: Path, *, timeout: int = 600) -> NotebookNode:
    """Run a notebook in an empty folder.

    Args:
        path: The notebook; the file is left as it is.
        timeout: Seconds that a cell may take.

    Returns:
        The notebook with new outputs and plain metadata.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
        ValueError: If a cell writes to stderr.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as sockets, _programs_on_path():
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        kernel = client.create_kernel_manager()
        kernel.transport, kernel.ip = "ipc", f"{sockets}/kernel"  # files for sockets, so that no port is open
        client.execute()
    said = [
        output.text for cell in notebook.cells for output in cell.get("outputs", ()) if output.get("name") == "stderr"
    ]
    if said:
        raise ValueError(f"'{path}' expected cells that write nothing to stderr, but got: {''.join(said)}")
    return plain(notebook)


@contextmanager
def _programs_on_path() -> Iterator[None]:
    """``!lightning-iet`` is the one that belongs to this Python, whether or not its environment is activated."""
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def plain(notebook: NotebookNode) -> NotebookNode:
    """Drop what changes from run to run and from machine to machine."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = NotebookNode(kernelspec=NotebookNode(kernel), language_info=NotebookNode(name="python"))
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = NotebookNode()
            if output.output_type == "stream":
                output.text = output.text.replace("\r\n", "\n")  # of a shell's terminal
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the cells that hold code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: NotebookNode) -> list[str]:
    """Return what a cell printed, and what it showed as text."""
    return [output.text if output.output_type == "stream" else output.data["text/plain"] for output in cell.outputs]


def kinds(cell: NotebookNode) -> list[tuple[str, list[str]]]:
    """Return the types of a cell's outputs."""
    return [(output.output_type, sorted(output.get("data", ()))) for output in cell.outputs]


def words(cell: NotebookNode) -> list[str]:
    """Return the words of a cell's outputs; figures, and with them the widths of tables, may differ."""
    without_figures = re.sub(r"\d[\d.,:]*(e[-+]\d+)?", "0", "\n".join(texts(cell)))
    return re.sub(r"\x1b\[[\d;]*m|[━─]+", "", without_figures).split()


def difference(stored: NotebookNode, executed: NotebookNode) -> str | None:
    """Return the code of the first cell that shows something else than what is stored, with both; or nothing."""
    for one, other in zip(code_cells(stored), code_cells(executed), strict=True):
        if (kinds(one), words(one)) != (kinds(other), words(other)):
            return "\n".join(["In", one.source, "stored:", *texts(one), "but now:", *texts(other)])
    return None


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to run; all of notebooks/ by default")
    parser.add_argument("--out", type=Path, help="folder for the results; by default each replaces its own notebook")
    parser.add_argument("--check", action="store_true", help="store nothing, and fail if what is stored is not shown")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that a cell may take (default: %(default)s)")
    options = parser.parse_args(args)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    for path in options.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = execute(path, timeout=options.timeout)
        if options.check:
            if (found := difference(nbformat.read(path, as_version=4), notebook)) is not None:
                raise SystemExit(f"{path} shows something else than what is stored in it. {found}")
            print(f"{path}: shows what is stored")
            continue
        target = path if options.out is None else options.out / path.name
        nbformat.write(notebook, target)
        print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
