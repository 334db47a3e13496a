"""Train diffusion models that do not memorise their training images, and prove it."""

from importlib.metadata import version

from lightning_iet.callbacks import AntiGradientControl, ParameterAveragingCallback
from lightning_iet.data import DigitsDataModule, ImageDataModule, ShardedDataModule, ShardSampler
from lightning_iet.modules import DiffusionModule, TextToImageModule

__version__ = version("lightning-iet")

__all__ = [
    "AntiGradientControl",
    "DiffusionModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ParameterAveragingCallback",
    "ShardSampler",
    "ShardedDataModule",
    "TextToImageModule",
    "__version__",
]
