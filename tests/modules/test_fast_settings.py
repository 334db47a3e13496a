"""Settings that make training faster, and must change nothing else."""

import pytest
import torch
from torch import nn

from lightning_iet import (
    AntiGradientControl,
    DiffusionModule,
    DigitsDataModule,
    ParameterAveragingCallback,
    ShardedDataModule,
)
from tests.helpers.models import quiet_trainer, tiny_unet


def train(tmp_path, *, trainer=None, fused=None, **settings):
    """Two shards, AGC and EMA; returns the module, its losses, and the trainer."""
    torch.manual_seed(0)
    losses = []

    class Module(DiffusionModule):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            losses.append(output["sample_loss"].detach().float())
            return output

    module = Module(
        tiny_unet(), ema_decay=0.9, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3, fused=fused), **settings
    )
    callbacks = [AntiGradientControl(0.5), ParameterAveragingCallback(num_shards=2, every_n_epochs=1)]
    quiet = quiet_trainer(tmp_path, callbacks=callbacks, limit_val_batches=1, **trainer or {})
    quiet.fit(module, ShardedDataModule(DigitsDataModule(32, num_control=16, batch_size=8), 2))
    return module, torch.stack(losses), quiet


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"))


def assert_same_weights(one, other):
    expected = other.state_dict()
    assert list(one.state_dict()) == list(expected)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)


def is_channels_last(module):
    weights = [p for p in module.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_channels_last_stays_through_shards_and_checkpoints(plain, tmp_path):
    module, losses, trainer = train(tmp_path, channels_last=True)
    assert is_channels_last(module.unet)
    assert is_channels_last(module.ema)
    assert not is_channels_last(plain[0].unet)
    torch.testing.assert_close(losses, plain[1], rtol=1e-4, atol=1e-4)
    assert_same_weights(module, plain[0])
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    for again in (False, True):
        loaded = DiffusionModule.load_from_checkpoint(tmp_path / "model.ckpt", channels_last=again)
        assert is_channels_last(loaded.unet) == again
        assert_same_weights(loaded, module)


def test_a_compiled_denoiser_keeps_its_names(plain, tmp_path, monkeypatch):
    calls = []
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: calls.append(module) or compile(module, backend="eager"))
    module, losses, trainer = train(tmp_path, compile=True)
    assert calls == [module.unet]
    assert module.unet._compiled_call_impl is not None
    torch.testing.assert_close(losses, plain[1], rtol=1e-4, atol=1e-4)
    assert_same_weights(module, plain[0])
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert_same_weights(DiffusionModule.load_from_checkpoint(tmp_path / "model.ckpt"), module)
    module.pipeline()


def test_everything_together_learns_the_same_in_bfloat16(plain, tmp_path):
    fast = {"channels_last": True, "fused": True}
    trainer = {"precision": "bf16-mixed", "gradient_clip_val": 1e3}  # which changes nothing, but Lightning refuses it
    module, losses, _ = train(tmp_path, trainer=trainer, **fast)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    torch.testing.assert_close(losses.mean(1), plain[1].mean(1), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_gradients_are_clipped(tmp_path, precision, fused, algorithm):
    largest = []

    class Module(DiffusionModule):
        def on_before_optimizer_step(self, optimizer):
            gradients = torch.cat([p.grad.flatten() for p in self.unet.parameters()])
            largest.append((gradients.norm(), gradients.abs().max()))

        def configure_gradient_clipping(self, *args, **kwargs):
            super().configure_gradient_clipping(*args, **kwargs)
            gradients = torch.cat([p.grad.flatten() for p in self.unet.parameters()])
            largest.append((gradients.norm(), gradients.abs().max()))

    module = Module(tiny_unet(), optimizer=lambda p: torch.optim.Adam(p, fused=fused), ema_decay=0)
    limits = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    quiet_trainer(tmp_path, precision=precision, fast_dev_run=True, **limits).fit(
        module, DigitsDataModule(16, num_control=16, batch_size=8)
    )
    which = 1 if algorithm == "value" else 0
    assert largest[0][which] > 2e-3
    torch.testing.assert_close(largest[1][which], torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_off_is_plain_training_bit_for_bit(plain, tmp_path):
    module, losses, _ = train(tmp_path, channels_last=False, compile=False)
    assert torch.equal(losses, plain[1])
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain[0].parameters(), strict=True))
