"""Feature networks: what a metric compares images by."""

from typing import TYPE_CHECKING

from lightning_iet.utilities.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_iet.metrics.features.base import embed_images
    from lightning_iet.metrics.features.factory import FEATURE_NAMES, PixelFeatures, feature_extractor
    from lightning_iet.metrics.features.networks import (
        CleanInceptionFeatures,
        CLIPFeatures,
        DigitsClassifier,
        DigitsFeatures,
        EfficientNetFeatures,
        InceptionFeatures,
        SSCDFeatures,
        TorchScriptFeatures,
    )
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "FEATURE_NAMES",
    "CLIPFeatures",
    "CleanInceptionFeatures",
    "DigitsClassifier",
    "DigitsFeatures",
    "EfficientNetFeatures",
    "InceptionFeatures",
    "PixelFeatures",
    "SSCDFeatures",
    "TorchScriptFeatures",
    "embed_images",
    "feature_extractor",
]
