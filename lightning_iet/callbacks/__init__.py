"""When things happen: callbacks for any Lightning trainer."""

from typing import TYPE_CHECKING

from lightning_iet.utilities.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_iet.callbacks.anti_gradient_control import AntiGradientControl
    from lightning_iet.callbacks.augmentation import ThresholdAwareAugmentation
    from lightning_iet.callbacks.evaluation import Evaluation
    from lightning_iet.callbacks.parameter_averaging import ParameterAveragingCallback
    from lightning_iet.callbacks.parameter_selection import ParameterSelection
    from lightning_iet.callbacks.progress import RunProgressBar
    from lightning_iet.callbacks.redistribution import Redistribution
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "AntiGradientControl",
    "Evaluation",
    "ParameterAveragingCallback",
    "ParameterSelection",
    "Redistribution",
    "RunProgressBar",
    "ThresholdAwareAugmentation",
]
