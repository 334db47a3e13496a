"""What a test may change in its process, and must not leave behind."""

import logging
import os
from contextlib import contextmanager

import torch

LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "lightning_iet")


@contextmanager
def undisturbed():
    """Put environment, threads, random state and levels of logging back."""
    environment, threads, state = dict(os.environ), torch.get_num_threads(), torch.get_rng_state()
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)  # for an accelerator to come, the other keeps a trace of the stack
    try:
        yield
    finally:
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        for name, level in levels.items():
            if logging.getLogger(name).level != level:  # to set one goes through all loggers there are
                logging.getLogger(name).setLevel(level)
