"""einops moves the batch to the last axis before the loss."""

from einops import rearrange, reduce

from tests.helpers.projects.common import Style, rows


class Project(Style):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        error = rearrange(self.net(noisy, t), "b c h w -> c (h w) b") - rearrange(noise, "b c h w -> c (h w) b")
        return reduce(error**2, "c p b -> b", "mean").mean()


class ByHand(Project):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net(noisy, t) - noise) ** 2)
        return self.bank.mean(losses, losses, t)
