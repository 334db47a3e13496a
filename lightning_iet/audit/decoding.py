"""How images are decoded: the rules that data modules follow, too."""

from lightning_iet.data.decoding import RULES, Fit, Pixels, Size, decode

__all__ = ["RULES", "Fit", "Pixels", "Size", "decode"]
