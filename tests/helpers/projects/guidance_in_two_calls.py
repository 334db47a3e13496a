"""Classifier-free guidance in two calls of the denoiser: both have a part in the loss."""

from tests.helpers.projects import guidance_doubled


class TwoCalls:
    def predict(self, noisy, t):
        conditional, unconditional = self.net(noisy, t), self.net(0.5 * noisy, t)
        return unconditional + 1.5 * (conditional - unconditional)


class Project(TwoCalls, guidance_doubled.Project):
    pass


class ByHand(TwoCalls, guidance_doubled.ByHand):
    pass
