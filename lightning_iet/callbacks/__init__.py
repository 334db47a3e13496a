"""When things happen: callbacks for any Lightning trainer."""

from lightning_iet.callbacks.anti_gradient_control import AntiGradientControl
from lightning_iet.callbacks.parameter_averaging import ParameterAveragingCallback

__all__ = ["AntiGradientControl", "ParameterAveragingCallback"]
