"""The protocols let a function choose samples, and leave nothing behind."""

import contextlib
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_iet.callbacks.anti_gradient_control.losses import (
    ReducerLosses,
    Selection,
    TrainingStepLosses,
    open_losses,
)

LOSSES = torch.tensor([1.0, 2.0, 6.0])
TIMESTEPS = torch.tensor([0, 1, 2])


class Stranger(pl.LightningModule):
    """Follows the dict protocol."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        losses = self.scale * batch
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": TIMESTEPS, "extra": "kept"}


def mean(sample_loss, timesteps):
    return sample_loss.mean()


class MeanModule(nn.Module):
    def forward(self, sample_loss, timesteps):
        return sample_loss.mean()


class AttributeReducer(Stranger):
    def __init__(self):
        super().__init__()
        self.loss_reducer = mean

    def training_step(self, batch, batch_idx):
        return self.loss_reducer(self.scale * batch, TIMESTEPS)


class SubmoduleReducer(AttributeReducer):
    def __init__(self):
        Stranger.__init__(self)
        self.loss_reducer = MeanModule()


class MethodReducer(AttributeReducer):
    def __init__(self):
        Stranger.__init__(self)

    def loss_reducer(self, sample_loss, timesteps):
        return sample_loss.mean()


EVERY_KIND = [Stranger, AttributeReducer, SubmoduleReducer, MethodReducer]


def loss_of(module):
    outputs = module.training_step(LOSSES, 0)
    return outputs["loss"] if isinstance(outputs, dict) else outputs


def large(losses, timesteps):
    return Selection(losses > 1.5)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_function_gets_the_batch_and_chooses(kind):
    module, seen = kind(), []

    def select(losses, timesteps):
        seen.append((losses.tolist(), timesteps.tolist()))
        return large(losses, timesteps)

    with open_losses(module, select):
        loss = loss_of(module)
        loss.backward()
    assert seen == [([1.0, 2.0, 6.0], [0, 1, 2])]
    assert loss.item() == 4
    assert module.scale.grad.item() == 4


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_none_leaves_the_loss_untouched(kind):
    module = kind()
    with open_losses(module, lambda losses, timesteps: None):
        assert loss_of(module).item() == 3


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_nothing_is_left_behind(kind):
    module = kind()
    attributes, content = dict(vars(module)), pickle.dumps(module)
    with open_losses(module, large):
        assert vars(module) != attributes
    with contextlib.suppress(KeyError), open_losses(module, large):
        raise KeyError
    assert vars(module) == attributes
    assert "training_step" not in vars(module)
    assert pickle.dumps(module) == content
    assert loss_of(module).item() == 3


def test_a_replaced_training_step_comes_back():
    module = Stranger()
    own = module.training_step = lambda batch, batch_idx: {
        "loss": torch.tensor(9.0),
        "sample_loss": LOSSES,
        "timesteps": TIMESTEPS,
    }
    with open_losses(module, large):
        assert loss_of(module).item() == 4
    assert module.training_step is own


def test_other_outputs_pass_through_and_the_original_is_not_changed():
    module, original = Stranger(), {"loss": torch.tensor(9.0), "sample_loss": LOSSES, "timesteps": TIMESTEPS, "a": 1}
    module.training_step = lambda batch, batch_idx: original
    with TrainingStepLosses(module, large).opened():
        outputs = module.training_step(LOSSES, 0)
    assert outputs["a"] == 1
    assert outputs["loss"].item() == 4
    assert original["loss"].item() == 9
    with TrainingStepLosses(module, lambda losses, timesteps: None).opened():
        assert module.training_step(LOSSES, 0) is original


def test_lightning_reads_the_signature_through_the_wrapper():
    class WithoutIndex(Stranger):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    for module, takes_index in ((Stranger(), True), (WithoutIndex(), False)):
        with open_losses(module, large):
            assert is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2) is takes_index
            assert module.training_step.__name__ == "training_step"


def test_a_skipped_batch_stays_skipped():
    module = Stranger()
    module.training_step = lambda batch, batch_idx: None
    with TrainingStepLosses(module, large).opened():
        assert module.training_step(LOSSES, 0) is None


def test_losses_of_validation_pass_by():
    module = AttributeReducer()
    with ReducerLosses(module, large).opened(), torch.no_grad():
        assert loss_of(module).item() == 3


GOOD = {"loss": torch.tensor(1.0), "sample_loss": LOSSES, "timesteps": TIMESTEPS}


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        (torch.tensor(1.0), TypeError, "expected a dict from `training_step`, but got Tensor"),
        ({"loss": torch.tensor(1.0)}, ValueError, r"without \['sample_loss', 'timesteps'\]. Return"),
        ({**GOOD, "timesteps": [0, 1, 2]}, TypeError, "Argument `timesteps` expected a tensor, but got list"),
        ({**GOOD, "sample_loss": 1.0}, TypeError, "Argument `sample_loss` expected a tensor, but got float"),
    ],
)
def test_bad_outputs(outputs, error, message):
    module = Stranger()
    module.training_step = lambda batch, batch_idx: outputs
    with TrainingStepLosses(module, large).opened(), pytest.raises(error, match=message):
        module.training_step(LOSSES, 0)
