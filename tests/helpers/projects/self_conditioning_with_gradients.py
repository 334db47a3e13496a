"""The first of two calls of the denoiser keeps its gradients, which pass through the second one."""

import torch

from tests.helpers.projects import self_conditioning


class Gradients:
    def predict(self, noisy, t):
        half = len(noisy) // 2
        rest = torch.zeros_like(noisy[half:])
        estimate = self.net(torch.cat([noisy[:half], torch.zeros_like(noisy[:half])], 1), t[:half])
        return self.net(torch.cat([noisy, torch.cat([estimate, rest])], 1), t)


class Project(Gradients, self_conditioning.Project):
    pass


class ByHand(Gradients, self_conditioning.ByHand):
    pass
