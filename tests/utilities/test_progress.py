"""The bar is there in a terminal, and leaves nothing behind."""

import io

import pytest
import rich
from rich.console import Console

from lightning_iet.utilities.progress import progress_bar


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def console(request, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=request.param, width=100, color_system=None)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    return console


@pytest.mark.parametrize("hidden", [False, True])
def test_counts_stand_in_the_bar(console, hidden):
    with progress_bar("Sampling images", 8, hidden=hidden) as bar:
        bar.advance(3)
        bar.show(5)
        bar.advance()
    text = console.file.getvalue()
    shown = console.is_terminal and not hidden
    for count in ("0/8", "3/8", "5/8", "6/8"):
        assert (count in text) == shown
    assert ("Sampling images" in text) == shown


def test_an_error_inside_ends_the_bar(console):
    def fail():
        with progress_bar("Reading", None) as bar:
            bar.show(1)
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail()
    with progress_bar("Reading", 1) as bar:  # rich allows one that is live at a time, or those inside it
        bar.advance()
