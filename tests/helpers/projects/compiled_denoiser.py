"""The denoiser is compiled."""

import torch

from tests.helpers.projects import randint_and_mse


class Compiled:
    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class Project(Compiled, randint_and_mse.Project):
    pass


class ByHand(Compiled, randint_and_mse.ByHand):
    pass
