"""Conformal p-values by counting."""

import torch


def conformal_p_values(scores, held_out):
    """The rank of each image among the held-out ones and itself, as a share: shape ``(m,)``, float64."""
    below = (held_out <= scores[:, None]).sum(dim=1)
    return (1 + below).to(torch.float64) / (len(held_out) + 1)
