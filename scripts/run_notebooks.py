"""Run the notebooks and store what they print and draw, so that readers see it without running anything.

    python scripts/run_notebooks.py                        refresh all of them
    python scripts/run_notebooks.py notebooks/01*.ipynb    refresh one
    python scripts/run_notebooks.py --out pages            leave the stored outputs as they are

Each runs from its first cell to its last, in a kernel and an empty folder of its own. A notebook that fails, or that
writes to stderr (a warning, say), is not stored. Nor are versions and execution metadata, which differ for no reason.
"""

import argparse
import os
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


def main(args: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to run; all of notebooks/ by default")
    parser.add_argument("--out", type=Path, help="folder for the results; by default each replaces its own notebook")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that a cell may take (default: %(default)s)")
    options = parser.parse_args(args)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    for path in options.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = execute(path, timeout=options.timeout)
        target = path if options.out is None else options.out / path.name
        nbformat.write(notebook, target)
        print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
