"""Metrics of generated images: how many are copies of training images, and how good they are."""

from lightning_iet.metrics.features import DigitsFeatures, InceptionFeatures, feature_extractor
from lightning_iet.metrics.frechet import frechet_distance
from lightning_iet.metrics.memorized_fraction import MemorizedFraction
from lightning_iet.metrics.memorized_quantity import MemorizedQuantity

__all__ = [
    "DigitsFeatures",
    "InceptionFeatures",
    "MemorizedFraction",
    "MemorizedQuantity",
    "feature_extractor",
    "frechet_distance",
]
