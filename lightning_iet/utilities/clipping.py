"""Gradient clipping with fused optimizers."""

from typing import Any

from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

__all__ = ["ClipsFusedGradients"]


class ClipsFusedGradients:
    """Lets gradients be clipped under ``precision="bf16-mixed"`` with a fused optimizer: mixed into a LightningModule.

    Lightning refuses fused optimizers whenever precision is mixed, for they undo the scaling of gradients themselves,
    after the clipping. In bfloat16 nothing is scaled: there is nothing to wait for.
    """

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip before each optimizer step."""
        module: Any = self
        plugin = module.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            module.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
