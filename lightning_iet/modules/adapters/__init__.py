"""Adapters: trained in place of a denoiser's weights, zero at the start, folded into the weights at the end."""

from lightning_iet.modules.adapters.difffit import add_difffit, fold_difffit, remove_difffit
from lightning_iet.modules.adapters.lora import add_lora, fold_lora, remove_lora
from lightning_iet.modules.adapters.selection import (
    Selection,
    fold_adapters,
    parameter_groups,
    remove_adapters,
    select_parameters,
)
from lightning_iet.modules.adapters.svdiff import add_svdiff, fold_svdiff, remove_svdiff

__all__ = [
    "Selection",
    "add_difffit",
    "add_lora",
    "add_svdiff",
    "fold_adapters",
    "fold_difffit",
    "fold_lora",
    "fold_svdiff",
    "parameter_groups",
    "remove_adapters",
    "remove_difffit",
    "remove_lora",
    "remove_svdiff",
    "select_parameters",
]
