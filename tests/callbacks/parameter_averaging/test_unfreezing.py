"""Staged fine-tuning with shards: what trains may change at the start of an epoch, for all shards alike."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from tests.helpers.own_projects import EPOCHS, SHARDS, Noisy, SaveAfter, fit, mean, train_alone
from tests.helpers.weights import assert_same_bits, state_of

LATE = 2  # the epoch in which the first layer begins to train


class Head(Noisy):
    """Only its last layer is in the optimizer."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.net[2].parameters(), lr=0.01)


class Unfreeze(BaseFinetuning):
    """Lightning's own way: a parameter group is added."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == LATE:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.003)


class BySwitch(Noisy):
    """The optimizer has all layers; gradients are switched on and off, and the learning rate is halved, by epoch."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch >= LATE)
        self.net[2].requires_grad_(self.current_epoch != 3)
        for group in self.optimizers().param_groups:
            group["lr"] = 0.02 * 0.5**self.current_epoch


class WithCopy(BySwitch):
    """And a deep copy of the layer that is unfrozen, with a table in it."""

    def __init__(self):
        super().__init__()
        self.net[0].register_buffer("table", torch.arange(3.0))
        self.net[0].register_buffer("number", torch.tensor(1))
        self.ema = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for average, weight in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            average.data.lerp_(weight.data, 0.1)


class Callback(Head):
    callbacks = (Unfreeze,)


FORMS = [Callback, BySwitch, WithCopy]


def others(form):
    return [make() for make in getattr(form, "callbacks", ())]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_each_shard_trains_as_it_would_alone(tmp_path, form, offload):
    module = form()
    before = copy.deepcopy(module.net[0].weight.detach())
    spied = fit(tmp_path, module, *others(form), offload=offload)
    alone = [train_alone(tmp_path, form(), shard, *others(form)) for shard in range(SHARDS)]
    names = [name for name, _ in module.named_parameters() if name.startswith(("net", "ema"))]
    for name in names:
        for shard in range(SHARDS):
            assert torch.equal(spied.before[-1][shard][name], alone[shard].get_parameter(name)), (name, shard)
        expected = mean([one.get_parameter(name).detach() for one in alone])
        torch.testing.assert_close(module.get_parameter(name).detach().double(), expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(before, module.net[0].weight)
    assert "net.0.weight" in spied.names


def fit_form(tmp_path, form, world_size):
    module = form()
    fit(tmp_path, module, *others(form), world_size=world_size, every=1)
    return state_of(module)


def test_the_number_of_processes_changes_nothing(tmp_path, processes):
    (alone,) = processes(1).run(fit_form, tmp_path, Callback, 1)
    for state in processes(2).run(fit_form, tmp_path, Callback, 2):
        assert_same_bits(state, alone)


@pytest.mark.parametrize(  # in epochs 1, 2 and 3; 6 steps in an epoch
    ("form", "steps"), [(BySwitch, 10), (BySwitch, 14), (BySwitch, 20), (Callback, 14), (WithCopy, 14)]
)
def test_a_cut_run_goes_on(tmp_path, form, steps):
    path = tmp_path / "cut.ckpt"
    whole, resumed = form(), form()
    fit(tmp_path, whole, SaveAfter(path, steps), *others(form), every=3)
    fit(tmp_path, resumed, *others(form), every=3, ckpt_path=path)
    assert_same_bits(state_of(resumed), state_of(whole))


def test_a_change_in_the_middle_of_an_epoch_is_refused_before_another_shard_starts_from_it(tmp_path):
    class InMidEpoch(BySwitch):
        def on_train_epoch_start(self):
            pass

        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 1:
                self.net[0].requires_grad_(True)

    taken = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            taken.append(trainer.global_step)

    message = "what trains to change at the start of an epoch, .* but got 'net.0.weight', which began to train in the m"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, InMidEpoch(), Count())
    assert taken[-1] <= 3


def test_layers_that_are_frozen_later_stay_each_shards_own(tmp_path):
    class FreezesAgain(Noisy):
        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch < 2)

    module = FreezesAgain()
    spied = fit(tmp_path, module, max_epochs=EPOCHS)
    alone = [train_alone(tmp_path, FreezesAgain(), shard) for shard in range(SHARDS)]
    for shard in range(SHARDS):
        assert torch.equal(spied.before[-1][shard]["net.0.weight"], alone[shard].net[0].weight)


def test_parts_that_are_never_unfrozen_are_still_watched(tmp_path):
    class Drifts(BySwitch):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.current_epoch == 3:
                self.encoder[0].weight.data.mul_(1.001)

    with pytest.raises(MisconfigurationException, match=r"changes of 1, 'encoder\.0\.weight' the first"):
        fit(tmp_path, Drifts())


def test_modules_that_hash_by_their_state_are_trained_in_shards(tmp_path):
    torchmetrics = pytest.importorskip("torchmetrics")

    class Measured(Noisy):
        def __init__(self):
            super().__init__()
            self.train_loss = torchmetrics.MeanMetric()
            self.errors = nn.ModuleDict({"mae": torchmetrics.MeanAbsoluteError()})
            self.ema_model = copy.deepcopy(self.net).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.train_loss(loss)
            self.errors["mae"](batch[0], 2 * batch[0])
            self.log("train/loss", self.train_loss)
            return loss

    measured, plain = Measured(), Noisy()
    fit(tmp_path, measured)
    fit(tmp_path, plain)
    for name, weight in plain.net.named_parameters():
        assert torch.equal(weight, measured.net.get_parameter(name))
