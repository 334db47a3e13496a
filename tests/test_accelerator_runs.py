"""Runs on an accelerator that the CPU stands in for: the same bits as on the CPU, and no step waits for the device.

What must read values of the device, and so waits once in a while, is no matter of steps: the first batch of a run, the
end of an epoch, an averaging, an exchange of samples, and evaluations. One path waits in every step by design:
``ThresholdAwareAugmentation(at="same_step")``, which has to know on the host which images to augment.
"""

from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_iet import (
    AntiGradientControl,
    DigitsDataModule,
    ParameterAveragingCallback,
    Redistribution,
    ShardedDataModule,
    ThresholdAwareAugmentation,
)
from lightning_iet.callbacks import ParameterSelection
from lightning_iet.callbacks.anti_gradient_control.losses import error_capture
from tests.helpers.accelerator import DEVICE, There, accelerator, trainer_there
from tests.helpers.models import quiet_trainer, tiny_diffusion
from tests.helpers.weights import assert_same_bits, state_of

TIMESTEPS = 10


class Net(nn.Module):
    """A denoiser f(x, t) of few numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8)))

    def forward(self, x, t):
        return self.layers(x) * (1 + t[:, None, None, None] / TIMESTEPS)


class Hooks(pl.LightningModule):
    """Knows nothing of AGC: hooks find its losses."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def parts(self, batch):
        images, t = batch[0], torch.randint(TIMESTEPS, (len(batch[0]),), device=self.device)
        noise = torch.randn_like(images)
        return self.net(images + noise * t[:, None, None, None] / TIMESTEPS, t), noise, t

    def losses(self, batch):
        predicted, noise, t = self.parts(batch)
        return (predicted - noise).square().mean((1, 2, 3)), t

    def training_step(self, batch, batch_idx):
        predicted, noise, _ = self.parts(batch)
        return F.mse_loss(predicted, noise)

    def validation_step(self, batch, batch_idx):
        """Lightning warns of a validation loader without it."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Dict(Hooks):
    """Returns the losses of samples."""

    def training_step(self, batch, batch_idx):
        losses, t = self.losses(batch)
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": t}


class Reducer(Hooks):
    """Reduces them by an attribute."""

    def __init__(self):
        super().__init__()
        self.loss_reducer = lambda losses, t: losses.mean()

    def training_step(self, batch, batch_idx):
        return self.loss_reducer(*self.losses(batch))


def with_attention():
    blocks = {
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
        "block_out_channels": (4,),
        "attention_head_dim": 4,
    }
    return tiny_diffusion(unet=blocks)


def by_scheduler(kind, options=None, **kwargs):
    return lambda: tiny_diffusion(scheduler=kind(**(options or {})), **kwargs)


def control(threshold=0.9, **kwargs):
    return AntiGradientControl(threshold, num_timesteps=TIMESTEPS, num_bins=2, decay=0.5, **kwargs)


def digits(steps):
    return DigitsDataModule(4 * steps, batch_size=4)


def in_shards(steps):
    """The same number of turns, each of so many steps."""
    return ShardedDataModule(DigitsDataModule(8 * steps, batch_size=4), 2)


def run(there, tmp_path, kind, callbacks, data, *, epochs):
    """Train, on the accelerator or on the CPU; what is left, and how often the host waited."""
    torch.manual_seed(3)
    module, callbacks = kind(), callbacks()
    make = trainer_there if there else quiet_trainer
    trainer = make(tmp_path, callbacks=callbacks, max_epochs=epochs, limit_val_batches=0)
    devices = set()
    module.on_before_zero_grad = lambda _: devices.update(parameter.device for parameter in module.parameters())
    # Hooks know the errors of a step by the type of what an operation returns.
    with patch.object(error_capture, "Tensor", There if there else torch.Tensor):
        trainer.fit(module, data)
    assert devices == {DEVICE if there else torch.device("cpu")}
    own = [callback.bank for callback in callbacks if isinstance(callback, AntiGradientControl)]
    return {**state_of(module), **{f"bank {i}": bank.cpu() for i, bank in enumerate(own)}}


def check(tmp_path, kind, callbacks=list, data=digits, *, steps=3, epochs=1, by_step=(0, 0)):
    """Compare with the CPU, and runs with more and fewer steps with each other: waits by step are from … to …"""
    expected = run(False, tmp_path, kind, callbacks, data(steps), epochs=epochs)
    waits = []
    for number in (steps, steps - 1):
        with accelerator() as waited:
            found = run(True, tmp_path, kind, callbacks, data(number), epochs=epochs)
        if number == steps:
            assert_same_bits(found, expected)
        waits.append(waited)
    least, most = by_step
    assert least * epochs <= waits[0].total() - waits[1].total() <= most * epochs, waits[0] - waits[1]
    assert waits[1].total() > 0  # the counter works


CRITERIA = [
    {},
    {"criterion": "quantile"},
    {"criterion": "record", "z0": 0.3},
    {"criterion": "record", "delta": 0.2},
    {"criterion": "record", "eta": 0.3},
    {"criterion": "record", "eta": 0.3, "z0": 0.5},
    {"reference": "held_out", "reference_every": 1},
]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((Dict, settings) for settings in CRITERIA),
        *((Reducer, settings) for settings in (CRITERIA[0], CRITERIA[4])),
        *((Hooks, settings) for settings in (CRITERIA[0], CRITERIA[4], CRITERIA[6])),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(map(str, value.values())) or "ratio",
)
def test_anti_gradient_control(tmp_path, kind, settings):
    check(tmp_path, kind, lambda: [control(**settings)])


MODULES = {
    "conditional_v_prediction": by_scheduler(
        DDPMScheduler,
        {"prediction_type": "v_prediction"},
        unet={"num_class_embeds": 11, "mid_block_type": None},
        label_dropout=0.5,
    ),
    "flow_sigma_sqrt": by_scheduler(
        FlowMatchEulerDiscreteScheduler, flow_weighting="sigma_sqrt", unet={"mid_block_type": None}
    ),
    "edm": by_scheduler(EDMEulerScheduler, unet={"mid_block_type": None}),
}


@pytest.mark.parametrize("name", MODULES)
def test_noise_processes(tmp_path, name):
    check(tmp_path, MODULES[name])


@pytest.mark.parametrize("family", ["bias", "lora", "difffit", "svdiff"])
def test_selected_parameters(tmp_path, family):
    with sdpa_kernel(SDPBackend.MATH):  # the CPU has a kernel of its own, which rounds in other places
        check(tmp_path, with_attention, lambda: [ParameterSelection(family)])


def averaging(**kwargs):
    return ParameterAveragingCallback(2, **({"offload": "none"} | kwargs))


def exchange():
    """As many samples whatever was skipped."""
    return Redistribution(within="shard", min_skips=0, choose="random")


RUNS = {
    "draws_by_weight": (lambda: [control(criterion="record", eta=0.3, z0=0.5, weigh="draws")], digits, (0, 0)),
    "augmented_at_the_next_draw": (lambda: [control(), ThresholdAwareAugmentation(band=9.0)], digits, (0, 0)),
    # Which samples these are, which magnitudes they have, and whether their values are in range; operations that need
    # a host (Equalize counts, others make matrices) are left out.
    "augmented_in_the_same_step": (
        lambda: [control(), ThresholdAwareAugmentation(at="same_step", ops=["Identity"])],
        digits,
        (2, 3),
    ),
    "shards_in_host_memory": (lambda: [averaging(offload="cpu")], in_shards, (0, 0)),
    "shards_in_files": (lambda: [averaging(offload="disk")], in_shards, (0, 0)),
    "iet_agc_plus": (
        lambda: [control(), averaging(every_n_epochs=2), exchange(), ThresholdAwareAugmentation(band=9.0)],
        in_shards,
        (0, 0),
    ),
    "anchored_by_other_shards": (
        lambda: [control(reference="other_shards", reference_every=1), averaging(every_n_epochs=2), exchange()],
        in_shards,
        (0, 0),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_methods_together(tmp_path, name):
    callbacks, data, by_step = RUNS[name]
    check(tmp_path, Dict, callbacks, data, steps=4, epochs=2, by_step=by_step)
