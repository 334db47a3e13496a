"""Metrics of generated images: how many are copies of training images, and how good they are."""

from typing import TYPE_CHECKING

from lightning_iet.utilities.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_iet.metrics.average_minimum_distance import AverageMinimumDistance
    from lightning_iet.metrics.density_coverage import DensityCoverage
    from lightning_iet.metrics.extraction_attack import ExtractionAttack
    from lightning_iet.metrics.features import DigitsFeatures, InceptionFeatures, feature_extractor
    from lightning_iet.metrics.frechet import CleanFID, frechet_distance
    from lightning_iet.metrics.membership_inference import MembershipInference
    from lightning_iet.metrics.memorization import MemorizedFraction, MemorizedQuantity
    from lightning_iet.metrics.mifid import MiFID
    from lightning_iet.metrics.nearest_training_distance import NearestTrainingDistance
    from lightning_iet.metrics.precision_recall import PrecisionRecall
    from lightning_iet.metrics.sscd_similarity import SSCDSimilarity
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "AverageMinimumDistance",
    "CleanFID",
    "DensityCoverage",
    "DigitsFeatures",
    "ExtractionAttack",
    "InceptionFeatures",
    "MembershipInference",
    "MemorizedFraction",
    "MemorizedQuantity",
    "MiFID",
    "NearestTrainingDistance",
    "PrecisionRecall",
    "SSCDSimilarity",
    "feature_extractor",
    "frechet_distance",
]
