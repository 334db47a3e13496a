"""Manual optimization with a backward pass for each half of the batch, without asking Lightning."""

from tests.helpers.projects import manual_optimization


class Halves:
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for half in zip(*(part.chunk(2) for part in batch), strict=True):
            self.loss(half).backward()
        optimizer.step()


class Project(Halves, manual_optimization.Project):
    pass


class ByHand(Halves, manual_optimization.ByHand):
    pass
