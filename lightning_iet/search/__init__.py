"""Searches on this machine: sweeps in the files of Weights & Biases, and MemControl's search for what to train."""

from typing import TYPE_CHECKING

from lightning_iet.utilities.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_iet.search.jobs import Job, run_jobs
    from lightning_iet.search.selection_points import Candidate, Objective, Point, SelectionSearch, parse_objectives
    from lightning_iet.search.selection_search import search_selection
    from lightning_iet.search.sweep_file import SweepFile, grid_points, open_study, read_sweep
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "Candidate",
    "Job",
    "Objective",
    "Point",
    "SelectionSearch",
    "SweepFile",
    "grid_points",
    "open_study",
    "parse_objectives",
    "read_sweep",
    "run_jobs",
    "search_selection",
]
