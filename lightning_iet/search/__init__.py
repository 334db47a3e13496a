"""Sweeps in the files of Weights & Biases, run on this machine."""

from typing import TYPE_CHECKING

from lightning_iet.utilities.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_iet.search.jobs import Job, run_jobs
    from lightning_iet.search.sweep_file import Search, SweepFile, grid_points, read_sweep
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["Job", "Search", "SweepFile", "grid_points", "read_sweep", "run_jobs"]
