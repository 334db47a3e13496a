import pytest

from lightning_iet.utilities.errors import TRACEBACK_VARIABLE, one_line_errors


@pytest.mark.parametrize("error", [ValueError("two\nlines"), OSError("two lines"), ModuleNotFoundError("two lines")])
def test_a_users_error_is_one_line_and_status_2(error, capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors("program"):
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("program: error: two lines (")


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError), one_line_errors("program"):
        raise KeyError("bug")


def test_the_traceback_is_there_when_asked_for(monkeypatch):
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="wrong"), one_line_errors("program"):
        raise ValueError("wrong")
