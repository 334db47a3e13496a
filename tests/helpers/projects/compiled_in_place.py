"""The denoiser is compiled in place."""

from tests.helpers.projects import guidance_in_two_calls


class Compiled:
    def __init__(self):
        super().__init__()
        self.net.compile(backend="eager")


class Project(Compiled, guidance_in_two_calls.Project):
    pass


class ByHand(Compiled, guidance_in_two_calls.ByHand):
    pass
