"""Seams: the places where a callback can reach the per-sample losses of somebody else's LightningModule.

A seam is a context manager. While it is open, the module shows each training batch to an *observer*, which sees the
losses before they are averaged and says which samples stay in. When it closes, also on an exception, the module is as
it was before. :func:`open_seam` chooses the seam, in this order:

- :func:`reducer_seam`: the module reduces its losses by an attribute ``loss_reducer(sample_loss, timesteps)``;
- :func:`training_step_seam`: ``training_step`` returns a dict with ``loss``, ``sample_loss`` and ``timesteps``;
- :class:`DenoiserSeam`: hooks find the denoiser, see the losses behind its output, and mask its gradient.
"""

from lightning_iet.callbacks.anti_gradient_control.losses.choice import open_seam
from lightning_iet.callbacks.anti_gradient_control.losses.denoiser import DenoiserSeam
from lightning_iet.callbacks.anti_gradient_control.losses.protocols import (
    Observer,
    Refusal,
    Seam,
    Selection,
    reducer_seam,
    training_step_seam,
)

__all__ = [
    "DenoiserSeam",
    "Observer",
    "Refusal",
    "Seam",
    "Selection",
    "open_seam",
    "reducer_seam",
    "training_step_seam",
]
