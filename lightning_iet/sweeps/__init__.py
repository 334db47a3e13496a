"""Sweeps in the files of Weights & Biases, run on this machine."""

from lightning_iet.sweeps.jobs import Job, run_jobs
from lightning_iet.sweeps.search import Search, grid_points
from lightning_iet.sweeps.sweep_file import SweepFile, read_sweep

__all__ = ["Job", "Search", "SweepFile", "grid_points", "read_sweep", "run_jobs"]
