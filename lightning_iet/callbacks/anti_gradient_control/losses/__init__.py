"""Three ways to the per-sample losses of any LightningModule.

While a *loss source* is open, it shows the losses of each training batch, before they are averaged, to a function that
returns which samples stay in. When it closes, also on an exception, the module is as it was before. :func:`open_losses`
takes the first way that a module offers:

- :class:`ReducerLosses`: it reduces its losses by an attribute ``loss_reducer(sample_loss, timesteps)``;
- :class:`TrainingStepLosses`: ``training_step`` returns a dict with ``loss``, ``sample_loss`` and ``timesteps``;
- :class:`DenoiserLosses`: hooks find the denoiser, see the losses behind its output, and mask its gradient.
"""

from lightning_iet.callbacks.anti_gradient_control.losses.denoiser import DenoiserLosses, open_losses
from lightning_iet.callbacks.anti_gradient_control.losses.protocols import (
    LossSource,
    ReducerLosses,
    Select,
    Selection,
    TrainingStepLosses,
    UnsupportedModule,
)

__all__ = [
    "DenoiserLosses",
    "LossSource",
    "ReducerLosses",
    "Select",
    "Selection",
    "TrainingStepLosses",
    "UnsupportedModule",
    "open_losses",
]
