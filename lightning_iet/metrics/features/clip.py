"""CLIP's image features, from a local folder of transformers."""

from pathlib import Path

from torch import Tensor

from lightning_iet.metrics.features.base import FeatureNetwork, PathLike_, rgb_images
from lightning_iet.utilities.errors import require


class CLIPFeatures(FeatureNetwork):
    """The projected image embeddings of a CLIP network (Radford et al., ICML 2021, arXiv:2103.00020).

    Resizing, cropping and normalisation are those of the folder's ``preprocessor_config.json``, carried out by
    transformers: for OpenAI's networks the shorter edge to 224, bicubically, and the central square of that, so that
    the ends of a long image do not count. Grey images have their channel repeated *(our choice)*.

    Args:
        weights: a folder with ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``, as
            ``save_pretrained`` writes it. It is never downloaded.

    Raises:
        ModuleNotFoundError: if transformers is not installed.
        FileNotFoundError: if ``weights`` is not given, or is no such folder.
        ValueError: if it holds something else.
    """

    def __init__(self, weights: PathLike_ | None = None) -> None:
        super().__init__()
        transformers = require("transformers", "clip")
        remedy = "Save one by `save_pretrained`, or get openai/clip-vit-base-patch32, and pass its folder as `weights`."
        if weights is None or not (Path(weights) / "preprocessor_config.json").is_file():
            raise FileNotFoundError(
                "Argument `weights` expected the folder of a CLIP network, with a preprocessor_config.json, "
                f"but got {weights}. {remedy}"
            )
        local = {"pretrained_model_name_or_path": str(weights), "local_files_only": True}
        try:
            self.network = transformers.CLIPVisionModelWithProjection.from_pretrained(**local)
            self.processor = transformers.CLIPImageProcessor.from_pretrained(**local)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"Argument `weights` expected the folder of a CLIP network, but got {weights} ({reason}). {remedy}"
            ) from None
        self.num_features = self.network.config.projection_dim
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Map images, shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, to embeddings, shape ``(N, num_features)``."""
        rgb = rgb_images(images)
        rescale = {"do_rescale": False} if rgb.is_floating_point() else {}
        pixels = self.processor(images=list(rgb), return_tensors="pt", input_data_format="channels_first", **rescale)
        return self.network(pixels["pixel_values"].to(images.device, self.dtype)).image_embeds
