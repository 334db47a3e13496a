"""What is trained."""

from typing import TYPE_CHECKING

from lightning_iet.utilities.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_iet.modules.diffusion import DiffusionModule
    from lightning_iet.modules.text_to_image import TextToImageModule
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["DiffusionModule", "TextToImageModule"]
