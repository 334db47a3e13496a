"""What is trained."""

from lightning_iet.modules.diffusion import DiffusionModule
from lightning_iet.modules.text_to_image import TextToImageModule

__all__ = ["DiffusionModule", "TextToImageModule"]
