"""The bar is there in a terminal, and leaves nothing behind; in a file, lines tell how far the work is."""

import io

import pytest
import rich
from rich.console import Console

from lightning_iet.utilities import progress
from lightning_iet.utilities.progress import progress_bar


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def console(request, monkeypatch):
    return use(monkeypatch, force_terminal=request.param)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = {"seconds": 1000.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: now["seconds"])
    monkeypatch.setattr(progress, "_begun", {})
    return now


def use(monkeypatch, **options):
    console = Console(file=io.StringIO(), width=100, color_system=None, **options)
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


def test_lines_stand_above_the_bar_and_hold_what_they_hold(console, capsys):
    for hidden in (True, False):
        with progress_bar("Trials", 8, hidden=hidden) as bar:
            bar.say(f"trial [old], hidden: {hidden}")
    said = console.file.getvalue() if console.is_terminal else capsys.readouterr().out
    assert "trial [old], hidden: False" in said
    assert "hidden: True" not in said


def test_what_an_earlier_call_has_done_says_nothing_of_the_time(monkeypatch, clock, capsys):
    console = use(monkeypatch, force_terminal=False)
    for given in (None, console):
        clock["seconds"] += 1000
        with progress_bar("Runs", 20, completed=10, is_slow=True, console=given) as bar:
            clock["seconds"] += 60
            bar.advance(2)
    assert capsys.readouterr().err.splitlines() == ["Runs: 10 of 20", "Runs: 12 of 20, about 4 min left"] * 2
    terminal = use(monkeypatch, force_terminal=True)
    with progress_bar("Runs", 20, completed=10) as bar:
        bar.advance(2)
    assert "10/20" in terminal.file.getvalue()
    assert "12/20" in terminal.file.getvalue()


def test_an_error_inside_ends_the_bar(console):
    def fail():
        with progress_bar("Reading", None) as bar:
            bar.show(1)
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail()
    with progress_bar("Reading", 1) as bar:  # rich allows one that is live at a time, or those inside it
        bar.advance()


def test_parts_of_several_processes_never_come_to_more_than_all(monkeypatch, clock, capsys):
    use(monkeypatch, force_terminal=False)
    with progress_bar("Sampling images", 1000) as bar:
        bar.advance(668)
        clock["seconds"] += 600
        bar.advance(334)
    assert capsys.readouterr().err.splitlines() == ["Sampling images: 1,000 of 1,000, about 0 s left"]


def test_in_a_file_lines_tell_what_begins_and_how_long_the_rest_takes(monkeypatch, clock, capsys):
    console = use(monkeypatch, force_terminal=False)
    with progress_bar("Drawing images", 2000, is_slow=True) as bar:
        for _ in range(200):  # each 10 images take 10 s: a tenth takes 200 s
            clock["seconds"] += 10
            bar.advance(10)
    assert console.file.getvalue() == ""
    expected = [
        f"Drawing images: {done:,} of 2,000, about {left} left"
        for done, left in [(n, f"{-(-(2000 - n) // 60)} min") for n in range(200, 2001, 200)]
    ]
    expected[-1] = "Drawing images: 2,000 of 2,000, about 0 s left"
    assert capsys.readouterr().err.splitlines() == ["Drawing images: 0 of 2,000", *expected]


def test_what_is_done_in_half_a_minute_has_no_line(monkeypatch, clock, capsys):
    use(monkeypatch, force_terminal=False)
    with progress_bar("Reading", 100) as bar:
        clock["seconds"] += 29
        bar.show(100)
    assert capsys.readouterr().err == ""


def test_at_most_one_line_in_half_a_minute(monkeypatch, clock, capsys):
    use(monkeypatch, force_terminal=False)
    with progress_bar("Reading", 100) as bar:
        for done in range(0, 101, 20):
            clock["seconds"] += 12
            bar.show(done)
    assert capsys.readouterr().err.splitlines() == [
        "Reading: 40 of 100, about 54 s left",
        "Reading: 100 of 100, about 0 s left",
    ]


def test_work_of_a_moment_that_is_done_again_is_said_once_in_half_a_minute(monkeypatch, clock, capsys):
    use(monkeypatch, force_terminal=False)
    for _ in range(8):
        with progress_bar("Sampling images", 4, is_slow=True) as bar:
            clock["seconds"] += 10
            bar.advance(4)
    assert capsys.readouterr().err.splitlines() == ["Sampling images: 0 of 4"] * 3  # after 0, 30 and 60 s


def test_work_of_unknown_length_tells_how_much_is_done(monkeypatch, clock, capsys):
    use(monkeypatch, force_terminal=False)
    with progress_bar("Reading", None, is_slow=True) as bar:
        clock["seconds"] += 90
        bar.show(1500)
    assert capsys.readouterr().err.splitlines() == ["Reading: begins", "Reading: 1,500 done in 2 min"]


@pytest.mark.parametrize("options", [{"hidden": True}, {"jupyter": True}])
def test_other_processes_and_notebooks_say_nothing(options, monkeypatch, clock, capsys):
    console = use(monkeypatch, force_terminal=False, force_jupyter=options.pop("jupyter", False))
    with progress_bar("Reading", 10, is_slow=True, **options) as bar:
        clock["seconds"] += 90
        bar.show(5)
        bar.advance(5)
    assert console.file.getvalue() == ""
    assert capsys.readouterr().err == ""
