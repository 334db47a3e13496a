import math
import sys

import pytest
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_iet.utilities.errors import TRACEBACK_VARIABLE, one_line_errors, require


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


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("[/a/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation"),
            "(Timed out waiting 5000ms for recv operation)",
        ),
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.1.1]:4242. \nmore"),
            "(Connection closed by peer [127.0.1.1]:4242)",
        ),
        (dist.DistNetworkError("The client socket has timed out"), "(The client socket has timed out)"),
        (dist.DistBackendError("NCCL error"), "(NCCL error)"),
    ],
)
def test_a_lost_connection_is_one_line_on_every_process(error, reason, capsys, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.raises(SystemExit) as stop, one_line_errors("program"):
        raise error
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"program: error: The connection to another process was lost {reason}: it has ended")
    assert "--ckpt_path last" in message
    assert message.count("\n") == 1


def test_other_runtime_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes"), one_line_errors("program"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_an_installed_module_is_returned():
    assert require("math", "inception") is math


def test_a_missing_module_names_the_line_that_installs_it():
    with pytest.raises(ModuleNotFoundError) as caught:
        require("no_such_package.part", "inception")
    assert str(caught.value) == "`no_such_package` is not installed. Run: pip install 'lightning-iet[inception]'"
    assert caught.value.name == "no_such_package"


def test_a_module_that_misses_one_of_its_own_names_that_one(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="`no_such_package` is not installed"):
        require("needs_more", "inception")
    assert "needs_more" not in sys.modules
