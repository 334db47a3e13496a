"""A Python that starts programs as forks of a process that has imported all they need.

Importing torch and Lightning takes longer than most of what the tests' programs do. ``warm_python()`` writes the
programs ``python`` and ``lightning-iet``: a test that puts the first in the place of ``sys.executable`` starts others
through it. What they run is a process of its own: it has its own arguments, environment, folder, network and streams,
gets the signals that its program gets, and ends as it ends. Its pictures are empty, though, but for a test with the
fixture ``drawn``. Anything but the modules named goes to the real Python.

That process is no child of its program, but of one that watches over both. A program that runs is therefore called
``for N``, where N is that one's number: so ``kill_tree`` finds it.
"""

import array
import atexit
import ctypes
import gc
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
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from multiprocessing import connection, parent_process
from pathlib import Path

import numpy as np
import torch

from tests.helpers.distributed import forking
from tests.helpers.launched import kill_tree
from tests.helpers.undrawn import DRAWN, draw_pictures, leave_pictures_empty

# What these programs import before they begin, besides what the warm process has.
USED = (
    "ipykernel.kernelapp", "lightning_iet.cli.tools", "lightning_iet.cli.trainer", "lightning_iet.tools.audit_model",
    "lightning_iet.tools.sweep", "matplotlib.pyplot", "wandb",
)  # fmt: skip
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
forwarded = (signal.SIGTERM, signal.SIGINT)
signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)  # they wait until there is somebody to hand them on to
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
namespaces = "/proc/%d/ns" % os.getpid()
request = dict(module=module, words=words, folder=os.getcwd(), environment=dict(os.environ), namespaces=namespaces)
request = json.dumps(request)
descriptors = array.array("i", [0, 1, 2])
server.sendmsg([len(request.encode()).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
server.sendall(request.encode())
answers = server.makefile()
with open("/proc/self/comm", "w") as name:
    name.write("for " + answers.readline().strip())
server.sendall(bytes([0]))  # the program may start
def forward(number, frame):
    try:
        server.sendall(bytes([number]))
    except OSError:
        pass  # it has ended
for number in forwarded:
    signal.signal(number, forward)
signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
status = int(answers.read() or 1)
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
        write_programs(python, address)
        try:
            yield python
        finally:
            server.kill()
            server.join()


def write_programs(python, address):
    """Write ``python`` and, beside it, ``lightning-iet``, for a server at an address."""
    for program in (python, python.with_name("lightning-iet")):
        settings = {"python": sys.executable, "is_program": program != python, "modules": MODULES}
        program.write_text(CLIENT.format(**settings, address=address))
        program.chmod(0o755)


def _serve(address, python, listening):
    """Fork for each program that asks, until the process is gone that started this one."""
    for name in USED:
        # An extra may not be installed; a module of ours that is gone is a mistake in USED.
        with suppress(*([] if name.startswith("lightning_iet") else [ModuleNotFoundError])):
            import_module(name)
    leave_pictures_empty()
    gc.freeze()  # and let memory be shared with those who fork from here
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who watch over programs
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(50)
        listening.send(True)
        gone = parent_process().sentinel
        while gone not in connection.wait([server, gone]):
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
    client.sendall(f"{os.getpid()}\n".encode())
    if not client.recv(1):  # it is gone already
        return
    program = os.fork()
    if program == 0:
        client.close()
        run_program(python, descriptors, **request)
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


def run_program(python, descriptors, module, words, folder, environment, namespaces=None):
    """Become the program."""
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    _renew_streams(environment.get("PYTHONIOENCODING", "utf-8"), unbuffered="PYTHONUNBUFFERED" in environment)
    _enter(namespaces)
    environment.pop("JPY_PARENT_PID", None)  # a kernel ends when its client does, see _watch_over
    threads = _threads(environment)
    os.environ.clear()
    os.environ.update(environment)
    if DRAWN in environment:
        draw_pictures()
    os.chdir(folder)
    paths = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
    sys.path[:] = dict.fromkeys(paths)
    sys.argv, sys.executable = [module, *words], python
    random.seed()
    np.random.seed()  # noqa: NPY002 (programs may draw from the global generator)
    torch.set_num_threads(threads)
    status, interrupted = 0, False
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        status = stop.code
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
            status = 1
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status or 0)


def _enter(namespaces):
    """Take the namespaces of a program (a folder of /proc) for its network, and for what it sees of one in /sys."""
    if namespaces is None:
        return
    with ExitStack() as stack:
        files = [stack.enter_context(open(f"{namespaces}/{kind}")) for kind in ("net", "mnt")]
        own = [os.stat(f"/proc/self/ns/{kind}") for kind in ("net", "mnt")]
        for file, current in zip(files, own, strict=True):
            is_another = os.fstat(file.fileno()).st_ino != current.st_ino
            if is_another and ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")


def _threads(environment):
    """Return how many threads torch takes in a new process with this environment, on this machine."""
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        if environment.get(name):
            return int(environment[name].split(",")[0])
    if {"MKL_NUM_THREADS", "OMP_NUM_THREADS"} & os.environ.keys():  # then this process has another number
        return len(os.sched_getaffinity(0))
    return torch.get_num_threads()


def _renew_streams(encoding, *, unbuffered):
    """As a new Python makes them; loggers that speak to the old ones speak to these, each to its own."""
    old = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding)
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        file = io.FileIO(number, "w", closefd=False)
        binary = file if unbuffered else io.BufferedWriter(file)
        by_line = number == 2 or file.isatty()
        stream = io.TextIOWrapper(binary, encoding, errors, line_buffering=by_line, write_through=unbuffered)
        setattr(sys, name, stream)
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            for name, stream in old.items():
                if getattr(handler, "stream", None) is stream:
                    handler.setStream(getattr(sys, name))
