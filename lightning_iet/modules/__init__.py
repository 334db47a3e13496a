"""What is trained."""

from lightning_iet.modules.diffusion import DiffusionModule

__all__ = ["DiffusionModule"]
