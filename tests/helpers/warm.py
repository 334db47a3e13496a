"""A Python that starts programs as forks of a process that has imported all they need.

Importing torch and Lightning takes longer than most of what the tests' programs do. ``warm_python()`` writes the
programs ``python`` and ``lightning-iet``: a test that puts the first in the place of ``sys.executable`` starts others
through it. What they run is a process of its own: it has its own arguments, environment, folder and streams, gets the
signals that its program gets, and ends as it ends. Anything but the modules named here goes to the real Python.
"""

import array
import atexit
import io
import json
import logging
import os
import random
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch

from tests.helpers.distributed import forking
from tests.helpers.launched import kill_tree

# What these programs import before they begin, besides what the warm process has.
USED = ("ipykernel.kernelapp", "lightning_iet.cli.trainer", "lightning_iet.tools.sweep", "matplotlib.pyplot")
MODULES = ("lightning_iet", "ipykernel_launcher", "torch.distributed.run")

# What both programs are: hand all on, forward signals, end as the other ended.
CLIENT = """\
#!{python} -SEs
import array, json, os, signal, socket, sys
words = sys.argv[1:]
options = []
while words[:1] in (["-u"], ["-B"]):
    options.append(words.pop(0))
if {is_program}:
    module, words = "lightning_iet", sys.argv[1:]
elif words[:1] == ["-m"] and words[1] in {modules}:
    module, words = words[1], words[2:]
else:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
if options:
    os.environ["PYTHONUNBUFFERED"] = "1"
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps(dict(module=module, words=words, folder=os.getcwd(), environment=dict(os.environ)))
descriptors = array.array("i", [0, 1, 2])
server.sendmsg([len(request.encode()).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
server.sendall(request.encode())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
status = int(server.makefile().read() or 1)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextmanager
def warm_python():
    """Write both programs into a folder, and serve them; yields the path of ``python``."""
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        python, address = Path(folder, "python"), f"{folder}/socket"
        ready, listening = forking().Pipe(duplex=False)
        server = forking().Process(target=_serve, args=(address, str(python), listening))
        server.start()
        listening.close()
        ready.recv()
        for program in (python, python.with_name("lightning-iet")):
            settings = {"python": sys.executable, "is_program": program != python, "modules": MODULES}
            program.write_text(CLIENT.format(**settings, address=address))
            program.chmod(0o755)
        try:
            yield python
        finally:
            server.kill()
            server.join()


def _serve(address, python, listening):
    """Fork for each program that asks."""
    for name in USED:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who watch over programs
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(50)
        listening.send(True)
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                try:
                    _watch_over(client, python)
                finally:
                    os._exit(1)
            client.close()


def _watch_over(client, python):
    """Start the program; hand signals on to it, and its status back; kill it with all that it has started when the
    client is gone."""
    room = socket.CMSG_SPACE(3 * array.array("i").itemsize)
    length, ancillary, _, _ = client.recvmsg(4, room)
    descriptors = array.array("i", ancillary[0][2])
    with client.makefile("rb", buffering=0) as stream:
        content, wanted = b"", int.from_bytes(length, "big")
        while len(content) < wanted:
            content += stream.read(wanted - len(content))
    request = json.loads(content)
    program = os.fork()
    if program == 0:
        client.close()
        _run(python, descriptors, **request)
    for descriptor in (0, 1, 2, *descriptors):
        os.close(descriptor)  # whoever reads what the program says waits for no other
    ended = os.pidfd_open(program)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(client, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if ended in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
            client.sendall(str(status).encode())
            os._exit(0)
        signals = client.recv(1)
        if not signals:
            kill_tree(program)
            os._exit(1)
        os.kill(program, signals[0])


def _run(python, descriptors, module, words, folder, environment):
    """Become the program."""
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    _renew_streams(unbuffered="PYTHONUNBUFFERED" in environment)
    environment.pop("JPY_PARENT_PID", None)  # a kernel ends when its client does, see _watch_over
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    paths = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
    sys.path[:] = dict.fromkeys(paths)
    sys.argv, sys.executable = [module, *words], python
    random.seed()
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        status = stop.code
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status or 0)


def _renew_streams(*, unbuffered):
    """As a new Python makes them; loggers that speak to the old ones speak to these."""
    old = (sys.stdout, sys.stderr)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        file = io.FileIO(number, "w", closefd=False)
        binary = file if unbuffered else io.BufferedWriter(file)
        by_line = number == 2 or file.isatty()
        stream = io.TextIOWrapper(binary, "utf-8", errors, line_buffering=by_line, write_through=unbuffered)
        setattr(sys, name, stream)
    for logger in logging.root.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            if getattr(handler, "stream", None) in old:
                handler.setStream(sys.stderr)
