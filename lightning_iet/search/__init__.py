"""Sweeps in the files of Weights & Biases, run on this machine."""

from lightning_iet.search.jobs import Job, run_jobs
from lightning_iet.search.sweep_file import Search, SweepFile, grid_points, read_sweep

__all__ = ["Job", "Search", "SweepFile", "grid_points", "read_sweep", "run_jobs"]
