"""Every sample's error is divided by the mean over the batch before it is squared."""

from tests.helpers.projects.common import Style

REASON = r"`net` looks like it, but the errors behind it, `square` of shape \(8, 2, 4, 4\), mix its 8 rows"


class Project(Style):
    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        error = self.net(noisy, t) - noise
        return (error - error.mean(0)).square().mean()
