"""MemControl: train the part of a denoiser that memorises least."""

from lightning_iet.callbacks.parameter_selection.callback import ParameterSelection
from lightning_iet.callbacks.parameter_selection.mask_file import MaskFile, read_mask, write_mask

__all__ = ["MaskFile", "ParameterSelection", "read_mask", "write_mask"]
