"""Trainings that take no time: what a mask comes to is known beforehand."""

from itertools import product
from math import log10

GROUPS = ("down.0", "down.1", "mid", "up.0", "up.1", "rest")
QUALITY = (3.0, 2.0, 0.5, 0.25, 1.0, 0.125)  # by how much each group betters the FID
COPIES = (0.02, 0.30, 0.0, 0.25, 0.05, 0.01)  # and how much it memorizes
CONTROL = 0.03


def figures(candidate, *, groups=GROUPS, checkpoints=1):
    """What a candidate comes to, at each of its checkpoints."""
    bits = [1] * len(groups) if candidate.kind == "plain" else [int(bit) for bit in candidate.mask]
    if candidate.kind == "pretrained":
        bits, fit, checkpoints = [0] * len(groups), 0.0, 1
    else:
        fit = 1 - 0.25 * (log10(candidate.learning_rate) + 4) ** 2  # best at 1e-4
    found = []
    for number in range(1, checkpoints + 1):
        done = number / checkpoints
        gain, copies = (
            sum(w * b for w, b in zip(weights, bits, strict=True)) * scale
            for weights, scale in ((QUALITY[: len(bits)], fit * done**0.5), (COPIES[: len(bits)], done))
        )
        if candidate.kind == "plain":
            gain, copies = 1.2 * gain, 1.5 * copies
        found.append(
            {
                "step": 0 if candidate.kind == "pretrained" else 100 * number,
                "fid": 10 - gain,
                "fid_control": 1.0,
                "memorized": copies,
                "memorized_control": CONTROL,
                "memorized_control_standard_error": 0.01,
                "distance": 1 - copies,
                "distance_control": 1 - CONTROL,
            }
        )
    return found


def every_mask(groups=GROUPS):
    """All masks of some groups."""
    return ["".join(bits) for bits in product("01", repeat=len(groups))]
