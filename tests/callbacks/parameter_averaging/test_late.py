"""What is made after training began, and would be taken over by another shard."""

import copy
import re
from collections import deque

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_iet.shards.ema import averages_beside
from tests.helpers.own_projects import Noisy, fit
from tests.helpers.weights import assert_same_bits, state_of

STEPS = 3  # of the first shard in an epoch


class Keeper:
    """An object of the project's."""


def updated(averages, weights):
    return [0.5 * average + 0.5 * weight for average, weight in zip(averages, weights, strict=True)]


class Late(Noisy):
    """Makes its average behind some step."""

    ema = None
    first = 0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step <= self.first:
            return
        if self.ema is None:
            self.make()
        else:
            self.update()

    def weights(self):
        return [p.detach().clone() for p in self.net.parameters()]

    def make(self):
        self.ema = self.weights()

    def update(self):
        self.ema = updated(self.ema, self.weights())


class LaterStill(Late):
    first = 2  # the last step of the first shard's turn


class AtTrainStart(Late):
    def on_train_start(self):
        self.make()


class AsDict(Late):
    def make(self):
        self.ema = {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def update(self):
        for name, p in self.net.named_parameters():
            self.ema[name].lerp_(p.detach(), 0.5)


class AsModule(Noisy):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if "ema" not in self._modules:
            self.ema = copy.deepcopy(self.net).requires_grad_(False)
        for average, weight in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            average.data.lerp_(weight.data, 0.5)


class InObject(Late):
    def make(self):
        self.ema = Keeper()
        self.ema.shadow = [copy.deepcopy(self.net).requires_grad_(False)]

    def update(self):
        for average, weight in zip(self.ema.shadow[0].parameters(), self.net.parameters(), strict=True):
            average.lerp_(weight.detach(), 0.5)


class Scaled(Noisy):
    """Divides by a running mean of the size of its data, which it carries from step to step."""

    def __init__(self):
        super().__init__()
        self.scale = None

    def training_step(self, batch, batch_idx):
        size = batch[0].abs().mean()
        self.scale = size if self.scale is None else 0.9 * self.scale + 0.1 * size
        return super().training_step([batch[0] / self.scale], batch_idx)


class ScaledInPlace(Noisy):
    def __init__(self):
        super().__init__()
        self.state = {"scale": torch.ones(())}

    def training_step(self, batch, batch_idx):
        self.state["scale"].mul_(0.9).add_(0.1 * batch[0].abs().mean())
        return super().training_step([batch[0] / self.state["scale"]], batch_idx)


class Queue(Noisy):
    """Compares with samples of earlier steps."""

    def __init__(self):
        super().__init__()
        self.queue = deque(maxlen=2)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.queue:
            loss = loss + (self.net(batch[0]).mean() - self.queue[0].mean()).square()
        self.queue.appendleft(batch[0].clone())
        return loss


class LateBuffer(Noisy):
    def training_step(self, batch, batch_idx):
        if not hasattr(self, "mean"):
            self.register_buffer("mean", torch.zeros(3))
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(0)
        return super().training_step([batch[0] - self.mean], batch_idx)


class OwnCallback(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.copied = copy.deepcopy(pl_module.net)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for average, weight in zip(self.copied.parameters(), pl_module.net.parameters(), strict=True):
            average.data.lerp_(weight.data, 0.5)


class Steps(pl.Callback):
    def __init__(self):
        self.taken = 0

    def on_train_batch_end(self, trainer, *args):
        self.taken = trainer.global_step


@pytest.mark.parametrize(
    ("form", "name", "steps"),
    [
        (Late, "ema.0", 2),
        (LaterStill, "ema.0", STEPS + 1),
        (AtTrainStart, "ema.0", 1),
        (AsDict, "ema.0.weight", 2),
        (AsModule, "ema.0.weight", 2),
        (InObject, "ema.shadow.0.0.weight", 2),
        (Scaled, "scale", 2),
        (ScaledInPlace, "state.scale", 2),
        (Queue, "queue.0", 2),
        (LateBuffer, "mean", 2),
    ],
)
def test_it_is_refused_by_name_in_the_step_after_it(tmp_path, form, name, steps):
    count = Steps()
    with pytest.raises(MisconfigurationException, match=f"but got '{re.escape(name)}' of the module, which") as caught:
        fit(tmp_path, form(), count)
    assert count.taken == steps
    assert "\n" not in str(caught.value)
    assert torch.overrides._get_current_function_mode_stack() == []


def test_averages_of_a_callback_that_knows_no_shards_are_refused(tmp_path):
    count = Steps()
    message = r"got the callback OwnCallback, whose 'copied\.0\.weight' changes and would be shared"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, Noisy(), OwnCallback(), count)
    assert count.taken <= 1


class Holder:
    """Holds what it is given."""

    def __init__(self, **held):
        vars(self).update(held)


class Other(Holder):
    pass


def test_averages_of_a_callback_are_found_by_its_own_name_however_another_reaches_them():
    module = nn.Sequential(nn.Linear(2, 2))
    shadow = Holder(shadow={name: tensor.clone() for name, tensor in module.state_dict().items()})
    ema = Holder(ema=shadow)
    expected = ["Holder.ema.shadow.0.weight", "Holder.ema.shadow.0.bias"]
    chains = [ema, [ema], Holder(callbacks=[ema]), Holder(runner=Holder(callbacks=[ema])), [[[[shadow]]]]]
    assert [slot.name for slot in averages_beside(module, ema)] == expected
    for chain in chains:
        for things in ([Other(hub=chain), ema], [ema, Other(hub=chain)]):
            assert [slot.name for slot in averages_beside(module, *things)] == expected


class Harmless(Noisy):
    """Logs, tables made once, and what is written and never read again."""

    def __init__(self):
        super().__init__()
        self.metric = torchmetrics.MeanMetric()
        self.outputs, self.last, self.table, self.steps, self.scale = [], None, None, 0, None
        self.losses = torch.zeros(100)
        self.register_buffer("seen", torch.zeros(()))

    def on_train_batch_start(self, batch, batch_idx):
        self.before = {name: weight.detach().clone() for name, weight in self.net.named_parameters()}
        if not hasattr(self, "began"):
            self.began = [weight.detach().clone() for weight in self.net.parameters()]

    def on_before_zero_grad(self, optimizer):
        sum((weight.detach() - self.before[name]).norm() for name, weight in self.net.named_parameters())
        sum((weight.detach() - old).norm() for weight, old in zip(self.net.parameters(), self.began, strict=True))

    def training_step(self, batch, batch_idx):
        if self.table is None:
            self.table = {"weights": torch.linspace(1, 1, 3), "names": ["a"]}
            self.register_buffer("angles", torch.ones(3), persistent=False)
        self.last = batch[0] * self.table["weights"] * self.angles
        loss = super().training_step([self.last], batch_idx)
        self.outputs.append(loss.detach())
        self.losses[batch_idx] = loss.detach()
        self.metric(loss)
        self.seen = self.seen + 1  # a buffer: each shard has its own
        self.steps += 1
        return loss

    def on_train_epoch_end(self):
        torch.stack(self.outputs).mean()
        self.outputs.clear()


class Snapshots(pl.Callback):
    """Keeps what a run began with, and each epoch's weights."""

    def on_train_start(self, trainer, pl_module):
        self.began, self.epochs = copy.deepcopy(pl_module.net.state_dict()), []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(copy.deepcopy(pl_module.net.state_dict()))


def test_what_no_shard_takes_over_is_let_alone(tmp_path):
    harmless, plain = Harmless(), Noisy()
    fit(tmp_path, harmless, Snapshots())
    fit(tmp_path, plain)
    ours = {name: tensor for name, tensor in state_of(harmless).items() if name.startswith("net")}
    assert_same_bits(ours, {name: t for name, t in state_of(plain).items() if name.startswith("net")})


def test_a_network_compiled_when_training_starts_is_the_same_network(tmp_path):
    class Wrapped(Noisy):
        def on_train_start(self):
            self.net = nn.Sequential(self.net)  # other names for the same weights

    fit(tmp_path, Wrapped(), max_epochs=1)
