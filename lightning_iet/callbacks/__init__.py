"""When things happen: callbacks for any Lightning trainer."""

from lightning_iet.callbacks.anti_gradient_control import AntiGradientControl
from lightning_iet.callbacks.evaluation import Evaluation
from lightning_iet.callbacks.parameter_averaging import ParameterAveragingCallback
from lightning_iet.callbacks.progress import RunProgressBar

__all__ = ["AntiGradientControl", "Evaluation", "ParameterAveragingCallback", "RunProgressBar"]
