"""Find out what a diffusion model has memorised, and train it so that it memorises less."""

from importlib.metadata import version
from typing import TYPE_CHECKING

from lightning_iet.utilities.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_iet.callbacks import (
        AntiGradientControl,
        ParameterAveragingCallback,
        Redistribution,
        ThresholdAwareAugmentation,
    )
    from lightning_iet.data import DigitsDataModule, ImageDataModule, ShardedDataModule, ShardSampler
    from lightning_iet.modules import DiffusionModule, TextToImageModule
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__version__ = version("lightning-iet")

__all__ = [
    "AntiGradientControl",
    "DiffusionModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ParameterAveragingCallback",
    "Redistribution",
    "ShardSampler",
    "ShardedDataModule",
    "TextToImageModule",
    "ThresholdAwareAugmentation",
    "__version__",
]
