"""Anti-gradient control: leave out samples whose loss is unusually low at their timestep."""

from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl

__all__ = ["AntiGradientControl"]
