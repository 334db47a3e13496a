"""Consistency training with a teacher, a copy of the denoiser that is called without gradients."""

import copy

import torch
import torch.nn.functional as F

from tests.helpers.projects.common import Style

REASON = r"its output is compared with another output of a denoiser, as in consistency training"


class Project(Style):
    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        noisy, _, t = self.noisy(batch[0])
        prediction = self.net(noisy, t)
        with torch.no_grad():
            target = self.teacher(noisy, t - 1)
        return F.huber_loss(prediction, target)
