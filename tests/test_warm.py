"""Programs that are forks of a warm Python end as others do, and with whoever started them."""

import faulthandler
import gc
import json
import logging
import multiprocessing as mp
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from tests.helpers import warm as module
from tests.helpers.distributed import forking
from tests.helpers.launched import started
from tests.helpers.warm import run_program, warm_python, write_programs

PROGRAM = """\
import logging, sys
import numpy, torch
print(torch.get_num_threads(), numpy.random.rand())
logging.getLogger().warning("said by the root")
logging.getLogger("other").warning("said by another")
raise KeyboardInterrupt
"""


def hold(pipe):
    """Keep a warm Python, itself a fork of this process; says the number of that one."""
    module.forking = lambda: mp.get_context("fork")
    with warm_python():
        pipe.send(mp.active_children()[0].pid)
        time.sleep(600)


def test_the_warm_python_ends_with_the_process_that_keeps_it():
    ours, theirs = forking().Pipe()
    keeper = forking().Process(target=hold, args=(theirs,))
    keeper.start()
    assert ours.poll(60)
    ended = os.pidfd_open(ours.recv())
    assert not select.select([ended], [], [], 0.1)[0]
    keeper.kill()
    keeper.join()
    assert select.select([ended], [], [], 20)[0]
    os.close(ended)


def test_all_that_a_program_has_started_is_dead_in_the_end(tmp_path, warm):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    (tmp_path / "sleep.sh").write_text("echo $$ > number.part; mv number.part number; exec sleep 600")
    with started(*command, "sh", "sleep.sh", folder=tmp_path, log=tmp_path / "log") as process:
        for _ in range(600):
            if (tmp_path / "number").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        ended = os.pidfd_open(int((tmp_path / "number").read_text()))
        assert not select.select([ended], [], [], 0)[0]
    assert select.select([ended], [], [], 0)[0]
    os.close(ended)


def test_a_signal_that_comes_before_the_program_runs_is_handed_on(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{folder}")  # of no file: those have short names
        server.listen()
        write_programs(folder / "python", f"\0{folder}")
        program = subprocess.Popen([folder / "lightning-iet", "fit"])
        client, _ = server.accept()
        program.send_signal(signal.SIGTERM)
        with client, client.makefile("rb") as stream:
            request = json.loads(stream.read(int.from_bytes(stream.read(4), "big")))
            assert (request["module"], request["words"]) == ("lightning_iet", ["fit"])
            client.sendall(b"123\n")
            assert stream.read(2) == bytes([0, signal.SIGTERM])
            assert Path(f"/proc/{program.pid}/comm").read_text() == "for 123\n"
            client.sendall(str(-signal.SIGTERM).encode())
    assert program.wait(20) == -signal.SIGTERM


def become(folder):
    """Run the program of these tests in a process whose loggers speak to standard output and error."""
    for logger, stream in (("", sys.stdout), ("other", sys.stderr)):
        logging.getLogger(logger).addHandler(logging.StreamHandler(stream))
        logging.getLogger(logger).propagate = False
    files = [os.open(folder / name, os.O_CREAT | os.O_RDWR) for name in ("in", "out", "err")]
    environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "3"}
    run_program("python", files, module="interrupted", words=[], folder=str(folder), environment=environment)


QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # of which Python says nothing


def describe(pipe):
    """What pytest changes in its own process, as it is in this one."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [(logger, handler) for logger in loggers for handler in getattr(logger, "handlers", ())]
    elsewhere = [str(pair) for pair in handlers if getattr(pair[1], "stream", None) not in (None, sys.stderr)]
    pipe.send({
        "finders": any(type(finder).__module__.startswith("_pytest") for finder in sys.meta_path),
        "tests": [name for name in sys.modules if name.startswith("tests.") and ".test_" in name],
        "errors": [entry for entry in warnings.filters if entry[0] == "error" and entry[2] is Warning],
        "quiet": {category for category in QUIET if ("ignore", None, category, None, 0) in warnings.filters},
        "hooks": [sys.excepthook is sys.__excepthook__, threading.excepthook is threading.__excepthook__,
                  sys.unraisablehook is sys.__unraisablehook__, faulthandler.is_enabled()],
        "elsewhere": elsewhere,
        "levels": [logging.getLogger(name).level for name in (None, "lightning.pytorch")],
        "threads": len(os.listdir("/proc/self/task")),
        "collector": gc.isenabled(),
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    })  # fmt: skip


def test_a_fork_of_pytest_is_as_a_new_process():
    ours, theirs = forking().Pipe()
    process = forking().Process(target=describe, args=(theirs,))
    process.start()
    assert ours.poll(60)
    assert ours.recv() == {
        "finders": False, "tests": ["tests.test_warm"], "errors": [], "quiet": {*QUIET},
        "hooks": [True, True, True, False], "elsewhere": [], "levels": [logging.WARNING, logging.INFO], "threads": 1,
        "collector": True, "interrupt": True,
    }  # fmt: skip
    process.join()


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What two processes that run the same program say: of each (standard output, standard error)."""
    folders = [tmp_path_factory.mktemp("program") for _ in range(2)]
    programs = [forking().Process(target=become, args=(folder,)) for folder in folders]
    for folder, program in zip(folders, programs, strict=True):
        (folder / "interrupted.py").write_text(PROGRAM)
        program.start()
    for program in programs:
        program.join(60)
        assert program.exitcode == -signal.SIGINT
    return [[(folder / name).read_text() for name in ("out", "err")] for folder in folders]


def test_a_program_has_threads_and_random_numbers_of_its_own(said):
    (threads, number), (same, other) = (out.splitlines()[0].split() for out, _ in said)
    assert threads == same == "3"
    assert number != other


def test_loggers_keep_their_streams(said):
    for out, err in said:
        assert out.splitlines()[1:] == ["said by the root"]
        assert err.startswith("said by another\nTraceback")
        assert err.endswith("KeyboardInterrupt\n")
