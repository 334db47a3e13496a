"""Adversarial phases, with the denoiser named: there is still no error to measure."""

from tests.helpers.projects import adversarial

AGC = {"denoiser": "net"}
REASON = r"no squared or absolute error was seen behind `net`, .* since several optimizers train"


class Project(adversarial.Project):
    pass
