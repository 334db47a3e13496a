"""What each process of `pytest -n 2` does first: import what tests need, and leave a fork from which others are forked.

That fork knows of no test, and of nothing that pytest has changed: it is what a new Python is after the same imports.
"""

import gc
import logging
import os
import signal
import stat
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from multiprocessing import resource_tracker, util
from unittest.mock import patch

START = util.spawnv_passfds  # how multiprocessing starts a Python


def import_and_fork():
    """Import what tests need; :func:`tests.helpers.distributed.forking` forks from here henceforth.

    A warning on the way is an error, as it is when pytest imports a test.
    """
    before = list(warnings.filters)
    if (strict := ("error", None, Warning, None, 0)) not in before:
        warnings.filters.insert(0, strict)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if is_without_gpu := not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else each step of an optimizer looks for the driver's library anew
    from tests.helpers.distributed import NEEDED, forking
    from tests.helpers.undrawn import leave_pictures_empty

    for name in NEEDED:
        with suppress(ModuleNotFoundError):  # an extra may not be installed
            import_module(name)
    if strict not in before:
        warnings.filters.remove(strict)
    if is_without_gpu:  # else forks would have none, for this process has asked for it
        imported = [found for found in warnings.filters if found not in before]
        leave_pictures_empty()
        resource_tracker.ensure_running()
        with patch.object(util, "spawnv_passfds", lambda _, arguments, files: _fork(arguments[-1], files, imported)):
            forking()


def _fork(program, files, warned):
    """Run a program in a fork of this process, which keeps these files and these settings of warnings."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    gc.freeze()  # and let memory be shared
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the one here waits for orders to pytest
        process = os.fork()
    if process:
        return process
    try:
        gc.enable()
        util.spawnv_passfds = START
        _forget_pytest(files, warned)
        exec(program, {})
    finally:
        os._exit(1)


def _forget_pytest(files, warned):
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.resetwarnings()
    warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category, append=True)
    warnings.filters[:0] = warned
    for logger in logging.root.manager.loggerDict.values():  # where a folder's conftest has imported what speaks
        for handler in getattr(logger, "handlers", ()):
            if type(getattr(handler, "stream", None)).__module__.startswith("_pytest"):
                handler.setStream(sys.stderr)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the list itself is closed by now
            mode = os.fstat(number).st_mode
            if number > 2 and number not in files and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
                os.dup2(nothing, number, inheritable=False)  # a pipe ends with those who know of it
