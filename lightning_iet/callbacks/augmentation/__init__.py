"""Threshold-aware augmentation: samples just above the threshold of anti-gradient control are augmented."""

from lightning_iet.callbacks.augmentation.callback import ThresholdAwareAugmentation

__all__ = ["ThresholdAwareAugmentation"]
