"""Fixtures of all tests.

What takes long to import is imported where it is used: the process of `pytest -n 2` that hands tests out needs none.
"""

import gc
import logging
import os
import sys

import pytest
from hypothesis import settings

# No test measures time, hypothesis' included; fixtures of this file are fine to share among examples.
settings.register_profile("lightning-iet", deadline=None, max_examples=50)
settings.load_profile("lightning-iet")


LONGEST = {"test_trainer.py", "test_memcontrol.py", "test_audit_model.py"}  # half a minute each, or more


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Each process of `pytest -n 2` imports what tests need, before it knows of any, and leaves a fork for them."""
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        gc.disable()  # until all is imported: it finds nothing there
    if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores, so one thread for each
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that tests start, too
        from tests.helpers.first_fork import import_and_fork

        import_and_fork()


def pytest_collection_modifyitems(items):
    """The longest files come first, so that the processes of `pytest -n 2` end at about the same time."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    """What is imported by now stays to the end: the garbage collector need not look at it again and again."""
    import lightning.pytorch  # noqa: F401 (sets the levels of its loggers)

    import tests.helpers.distributed  # noqa: F401 (it remembers the environment, which no test has changed yet)
    from tests.helpers.undrawn import leave_pictures_empty

    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    leave_pictures_empty()
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def _pools():
    pools = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture
def processes(_pools):
    """``processes(W)``: W gloo processes; a pool that a failed test has killed is started anew."""
    from tests.helpers.distributed import Processes

    def get(world_size):
        if world_size not in _pools or not _pools[world_size].alive:
            _pools[world_size] = Processes(world_size)
        return _pools[world_size]

    return get


@pytest.fixture(scope="session")
def warm_executable():
    """A Python whose programs need no time to import; see :mod:`tests.helpers.warm`."""
    from tests.helpers.warm import warm_python

    with warm_python() as python:
        yield str(python)


@pytest.fixture
def warm(warm_executable, monkeypatch):
    """Programs that the test starts with ``sys.executable`` are of that Python."""
    monkeypatch.setattr(sys, "executable", warm_executable)


@pytest.fixture
def drawn():
    """Pictures are drawn, which are empty elsewhere; see :mod:`tests.helpers.undrawn`."""
    from tests.helpers.undrawn import drawing

    with drawing():
        yield


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """Weights of the tiny run of the command line, on one process, where nobody disturbs it."""
    import torch

    from lightning_iet.cli import main
    from tests.helpers.launched import weights, write_config
    from tests.helpers.state import undisturbed

    folder = tmp_path_factory.mktemp("tiny")
    with undisturbed(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-iet"])
        torch.set_num_threads(1)
        main(["fit", "--config", str(write_config(folder / "tiny.yaml"))])
    return weights(folder)


@pytest.fixture(autouse=True)
def _undisturbed():
    """Every test starts from the same seed, and leaves things as they were."""
    from tests.helpers.state import undisturbed

    with undisturbed():
        yield
