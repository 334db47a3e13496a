"""Pictures that no test looks at are written empty, for drawing them takes longer than most of what is tested.

They are all but those of tests with the fixture ``drawn``, of their programs, and of what imports a kind of picture
later than the tests are collected. What each kind shows: ``tests/test_plots.py``, which draws them itself.
"""

import os
import sys
from contextlib import contextmanager
from inspect import isfunction, signature

DRAWN = "TESTS_DRAW"  # in the environment of a program: its pictures are drawn

_replaced = []  # (module, name, function)


def leave_pictures_empty():
    """In all modules that this process has imported by now, save where they are made and in tests."""
    if (plots := sys.modules.get("lightning_iet.plots")) is None:
        return
    from matplotlib.figure import Figure

    kinds = {kind for kind in vars(plots).values() if isfunction(kind) and kind.__annotations__.get("return") is Figure}
    for name, module in list(sys.modules.items()):
        if name.startswith("lightning_iet.") and module is not plots:
            for key, value in list(vars(module).items()):
                if isfunction(value) and value in kinds:
                    _replaced.append((module, key, value))
                    setattr(module, key, _empty(value))


def draw_pictures():
    """Undo that."""
    while _replaced:
        setattr(*_replaced.pop())


@contextmanager
def drawing():
    """Pictures are drawn, those of programs too."""
    before = os.environ.get(DRAWN)
    draw_pictures()
    os.environ[DRAWN] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[DRAWN]
            leave_pictures_empty()


def _empty(kind):
    """What is given in the place of a picture, to arguments that the function takes."""
    from matplotlib.figure import Figure

    takes = signature(kind)

    def empty(*args, **kwargs):
        takes.bind(*args, **kwargs)
        return Figure((0.1, 0.1))

    return empty
