"""LightningModules as people write them today: each batch's mask equals that of AGC done by hand beside it.

A module notes each sample's loss and time, and which rows of the gradient at its denoiser's output arrive; the oracle
goes through the notes one sample after the other.
"""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from diffusers import DDPMScheduler
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl
from tests.helpers.models import quiet_trainer
from tests.helpers.projects.common import NUM_BINS, THRESHOLD, Bank

STEPS = 6  # timesteps of the discrete schedules
BATCHES, SIZE = 12, 8


def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCHES * SIZE, 1, 4, 4, generator=generator) * 2 - 1
    return DataLoader(TensorDataset(images, torch.randint(3, (len(images),), generator=generator)), batch_size=SIZE)


# --- networks --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.conv, self.embed = (
            nn.GroupNorm(2, width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Linear(8, width),
        )

    def forward(self, hidden, embedding):
        return hidden + self.conv(F.silu(self.norm(hidden) + self.embed(embedding)[:, :, None, None]))


class UNet(nn.Module):
    """One level down, one up, a skip connection; times, and labels if there are any, as one embedding."""

    def __init__(self, channels=1, out_channels=1, num_classes=None, width=4, checkpointing=False):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 8))
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, 8)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.middle = nn.Conv2d(width, width, 3, stride=2, padding=1), Block(width)
        self.up, self.leave = Block(2 * width), nn.Conv2d(2 * width, out_channels, 3, padding=1)
        self.checkpointing = checkpointing

    def forward(self, x, time, label=None):
        angle = time.reshape(-1, 1).to(x.dtype)
        embedding = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        if self.label is not None:
            embedding = embedding + self.label(label)
        skip = self.enter(x)
        hidden = self.run(self.middle, F.silu(self.down(skip)), embedding)
        hidden = self.run(self.up, torch.cat([skip, F.interpolate(hidden, scale_factor=2)], 1), embedding)
        return self.leave(hidden)

    def run(self, block, *inputs):
        return checkpoint(block, *inputs, use_reentrant=False) if self.checkpointing else block(*inputs)


class DiT(nn.Module):
    """Patches, one transformer block whose norms are shifted and scaled by time and class, and back."""

    def __init__(self, num_classes, width=8):
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(torch.zeros(1, 4, width))
        self.time, self.label = nn.Linear(1, width), nn.Embedding(num_classes + 1, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.norm, self.leave = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 4)

    def forward(self, x, t, y):
        tokens = self.patch(x).flatten(2).mT + self.places
        condition = self.time(t[:, None].float() / STEPS) + self.label(y)
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        h = self.norm(tokens) * (1 + scale) + shift
        tokens = tokens + gate * self.attention(h, h, h, need_weights=False)[0]
        tokens = tokens + gate2 * self.mlp(self.norm(tokens) * (1 + scale2) + shift2)
        return F.pixel_shuffle(self.leave(tokens).mT.unflatten(2, (2, 2)), 2)


# --- modules ---------------------------------------------------------------------------------------------------------


class Noted(pl.LightningModule):
    """Notes what the oracle needs."""

    continuous = False  # what the module needs of the test
    denoiser = None
    settings = ()
    callbacks = ()

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.notes, self.arrived = [], []

    def note(self, output, errors, time):
        """What the step shows: the output, each element's error, each row's time."""
        self.notes.append((errors.detach().float().flatten(1).mean(1), time.detach().flatten()))
        output.register_hook(lambda gradient: self.arrived.append(gradient.flatten(1).ne(0).any(1).tolist()))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Schedule(nn.Module):
    """A schedule of noise as buffers."""

    def __init__(self):
        super().__init__()
        betas = torch.linspace(1e-3, 0.5, STEPS)
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0))

    def extract(self, values, t, like):
        return values.gather(0, t).reshape(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x, t, noise):
        alpha = self.extract(self.alphas_cumprod, t, x)
        return alpha.sqrt() * x + (1 - alpha).sqrt() * noise


class Plain(Noted):
    """The simplest one, from which others differ in one thing."""

    def __init__(self):
        super().__init__()
        self.schedule = Schedule()
        self.net = self.make_net()

    def make_net(self):
        return UNet()

    def draw(self, x):
        t, noise = torch.randint(STEPS, (len(x),), device=x.device), torch.randn_like(x)
        return self.schedule.q_sample(x, t, noise), t, noise

    def loss(self, x):
        noisy, t, noise = self.draw(x)
        predicted = self.net(noisy, t)
        self.note(predicted, (predicted - noise) ** 2, t)
        return F.mse_loss(predicted, noise)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch[0])
        self.log("train/loss", loss, prog_bar=True)
        return loss


class LabelDropout(Plain):
    def make_net(self):
        return UNet(num_classes=3)

    def training_step(self, batch, batch_idx):
        x, labels = batch
        labels = torch.where(torch.rand(len(x)) < 0.1, torch.full_like(labels, 3), labels)
        noisy, t, noise = self.draw(x)
        predicted = self.net(noisy, t, labels)
        self.note(predicted, (predicted - noise) ** 2, t)
        return F.mse_loss(predicted, noise)


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)

    def encode(self, x):
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


class Latent(Plain):
    def __init__(self):
        super().__init__()
        self.vae = AutoEncoder().eval().requires_grad_(False)

    def make_net(self):
        return UNet(2, 2)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            latents = self.vae.encode(batch[0]) * 0.18
        return self.loss(latents)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-3)


class Transformer(LabelDropout):
    def make_net(self):
        return DiT(3)


class GaussianDiffusion(Schedule):
    """Loss inside the diffusion's own module, as in much-copied code: it draws times, and weights them."""

    def __init__(self, model, note):
        super().__init__()
        self.model, self.note = model, [note]
        self.register_buffer("loss_weight", torch.ones(STEPS))

    def p_losses(self, x, t, noise=None):
        noise = torch.randn_like(x) if noise is None else noise
        out = self.model(self.q_sample(x, t, noise), t)
        self.note[0](out, (out - noise) ** 2, t)
        loss = F.mse_loss(out, noise, reduction="none").flatten(1).mean(1)
        return (loss * self.extract(self.loss_weight, t, loss)).mean()

    def forward(self, img):
        return self.p_losses(img, torch.randint(0, STEPS, (len(img),), device=img.device).long())


class ByHandSchedule(Noted):
    def __init__(self):
        super().__init__()
        self.diffusion = GaussianDiffusion(UNet(), self.note)

    def training_step(self, batch, batch_idx):
        return self.diffusion(batch[0])


class Preconditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.sigma_data = UNet(), 0.5

    def forward(self, x, sigma):
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = (sigma**2 + self.sigma_data**2).sqrt()
        inner = self.model(x / total, sigma.log().flatten() / 4)
        return (self.sigma_data / total) ** 2 * x + sigma * self.sigma_data / total * inner


class EDM(Noted):
    continuous = True

    def __init__(self):
        super().__init__()
        self.net = Preconditioned()

    def training_step(self, batch, batch_idx):
        x = batch[0]
        sigma = (torch.randn(len(x), 1, 1, 1) * 1.2 - 1.2).exp()
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        denoised = self.net(x + torch.randn_like(x) * sigma, sigma)
        self.note(denoised, (denoised - x) ** 2, sigma)
        return (weight * (denoised - x) ** 2).mean()


class FlowMatching(Noted):
    continuous = True

    def __init__(self):
        super().__init__()
        self.net = UNet()

    def training_step(self, batch, batch_idx):
        x1 = batch[0]
        x0, t = torch.randn_like(x1), torch.sigmoid(torch.randn(len(x1)))
        at = t[:, None, None, None]
        velocity = self.net((1 - at) * x0 + at * x1, t)
        self.note(velocity, (velocity - (x1 - x0)) ** 2, t)
        return torch.mean((velocity - (x1 - x0)) ** 2)


class MinSNR(Plain):
    def loss(self, x):
        noisy, t, noise = self.draw(x)
        predicted = self.net(noisy, t)
        self.note(predicted, (predicted - noise) ** 2, t)
        snr = self.schedule.alphas_cumprod[t] / (1 - self.schedule.alphas_cumprod[t])
        weights = torch.stack([snr, torch.full_like(snr, 5.0)], 1).amin(1) / snr
        loss = F.mse_loss(predicted.float(), noise.float(), reduction="none")
        return (loss.mean(dim=list(range(1, loss.ndim))) * weights).mean()


class Velocity(Noted):
    def __init__(self):
        super().__init__()
        self.unet, self.noise_scheduler = UNet(), DDPMScheduler(STEPS, prediction_type="v_prediction")

    def training_step(self, batch, batch_idx):
        x = batch[0]
        noise, timesteps = torch.randn_like(x), torch.randint(0, STEPS, (len(x),)).long()
        target = self.noise_scheduler.get_velocity(x, noise, timesteps)
        predicted = self.unet(self.noise_scheduler.add_noise(x, noise, timesteps), timesteps)
        self.note(predicted, (predicted - target) ** 2, timesteps)
        return F.mse_loss(predicted.float(), target.float(), reduction="mean")


class LearnedVariance(Plain):
    """The variance learns from a bound in which the mean is held fixed."""

    def make_net(self):
        return UNet(1, 2)

    def loss(self, x):
        noisy, t, noise = self.draw(x)
        output = self.net(noisy, t)
        mean, log_variance = output.chunk(2, 1)
        self.note(output, (mean - noise) ** 2, t)
        frozen = mean.detach()
        bound = 0.5 * (log_variance + (frozen - noise) ** 2 * (-log_variance).exp()) / math.log(2)
        return F.mse_loss(mean, noise) + 0.1 * bound.mean()


class SelfConditioning(Plain):
    def make_net(self):
        return UNet(2, 1)

    def loss(self, x):
        noisy, t, _ = self.draw(x)
        estimate = torch.zeros_like(x)
        if torch.rand(()) < 0.5:
            with torch.no_grad():
                estimate = self.net(torch.cat([noisy, estimate], 1), t).clamp(-1, 1)
        predicted = self.net(torch.cat([noisy, estimate.detach()], 1), t)
        self.note(predicted, (predicted - x) ** 2, t)
        return F.mse_loss(predicted, x)


class Degradation(nn.Module):
    """Blurs each image t + 1 times."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False).requires_grad_(False)
        self.kernel.weight.fill_(1 / 9)

    def forward(self, x, t):
        stages = [x]
        for _ in range(STEPS):
            stages.append(self.kernel(stages[-1]))
        return torch.stack(stages)[t + 1, torch.arange(len(x))]


class ColdDiffusion(Noted):
    def __init__(self):
        super().__init__()
        self.degrade, self.restore = Degradation(), UNet()

    def training_step(self, batch, batch_idx):
        x = batch[0]
        t = torch.randint(STEPS, (len(x),))
        blurred = self.degrade(x, t)
        correction = self.restore(blurred, t)
        self.note(correction, (blurred + correction - x).abs(), t)
        return F.l1_loss(blurred + correction, x)


class Accumulated(Plain):
    settings = (("accumulate_grad_batches", 3),)


class Compiled(Plain):
    def make_net(self):
        return torch.compile(UNet(), backend="eager")


class Checkpointed(Plain):
    def make_net(self):
        return UNet(checkpointing=True)


class Autocast(Plain):
    settings = (("precision", "bf16-mixed"),)

    def loss(self, x):
        noisy, t, noise = self.draw(x)
        predicted = self.net(noisy, t)
        assert predicted.dtype == torch.bfloat16
        self.note(predicted, (predicted.float() - noise.float()) ** 2, t)
        return F.mse_loss(predicted.float(), noise.float())


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch[0]))
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()


class TwoOptimizers(LabelDropout):
    """One for the network, one for the embedding of classes, stepped together."""

    denoiser = "net"

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        network = [p for name, p in self.net.named_parameters() if not name.startswith("label")]
        return torch.optim.AdamW(network, lr=1e-3), torch.optim.Adagrad(self.net.label.parameters(), lr=1e-2)


class OwnEMA(pl.Callback):
    """A deep copy, updated behind each batch, with which validation would be done."""

    def on_fit_start(self, trainer, pl_module):
        self.copied = copy.deepcopy(pl_module.net)

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for average, weight in zip(self.copied.parameters(), pl_module.net.parameters(), strict=True):
            average.lerp_(weight, 0.1)


class WithOwnEMA(Plain):
    callbacks = (OwnEMA,)


class WithLightningsEMA(Plain):
    callbacks = (lambda: EMAWeightAveraging(decay=0.9),)


class ChannelsLast(Plain):
    def make_net(self):
        return UNet().to(memory_format=torch.channels_last)

    def training_step(self, batch, batch_idx):
        return self.loss(batch[0].to(memory_format=torch.channels_last))


# --- metrics in the module, as project templates have them ------------------------------------------------------------


class Template(Plain):
    """Mean metrics for each stage, and the least loss so far."""

    def __init__(self):
        super().__init__()
        self.train_loss, self.val_loss = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()
        self.val_best = torchmetrics.MinMetric()

    def on_train_start(self):
        self.val_loss.reset()
        self.val_best.reset()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch[0])
        self.train_loss(loss)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss


class Collection(Plain):
    """Metrics of errors, updated before the loss is computed: they are not the loss."""

    def __init__(self):
        super().__init__()
        self.metrics = torchmetrics.MetricCollection(
            {"mae": torchmetrics.MeanAbsoluteError(), "corr": torchmetrics.PearsonCorrCoef()}, prefix="train/"
        )
        self.running = torchmetrics.wrappers.Running(torchmetrics.MeanMetric(), window=3)
        self.composed = torchmetrics.MeanMetric() + torchmetrics.MaxMetric()

    def loss(self, x):
        noisy, t, noise = self.draw(x)
        predicted = self.net(noisy, t)
        self.metrics(predicted.flatten(), noise.flatten())
        self.composed.update(F.l1_loss(predicted, noise))
        self.note(predicted, (predicted - noise) ** 2, t)
        loss = F.mse_loss(predicted, noise)
        self.running(loss)
        self.log_dict(self.metrics)
        return loss


class LoggedBeforehand(Plain):
    """An absolute error for the log, before the squared one that is trained on."""

    def loss(self, x):
        noisy, t, noise = self.draw(x)
        predicted = self.net(noisy, t)
        self.log("train/mae", F.l1_loss(predicted, noise))
        self.log("train/norm", (predicted / predicted.norm() - noise).norm())
        self.note(predicted, (predicted - noise) ** 2, t)
        return ((predicted - noise) ** 2).mean()


class MetricAsLoss(Plain):
    """The loss is a metric's value of this batch."""

    def __init__(self):
        super().__init__()
        self.error = torchmetrics.MeanSquaredError()

    def loss(self, x):
        noisy, t, noise = self.draw(x)
        predicted = self.net(noisy, t)
        self.note(predicted, (predicted - noise) ** 2, t)
        return self.error(predicted.contiguous(), noise)


class Alike(nn.Linear):
    """Layers that count as equal where their settings are."""

    def __eq__(self, other):
        return isinstance(other, Alike) and self.in_features == other.in_features

    def __hash__(self):
        return hash(self.in_features)


class Ambiguous(nn.Identity):
    """Whose equality is a tensor, as a metric's is a metric; and whose hash changes with each call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __eq__(self, other):
        return torch.ones(2, dtype=torch.bool)

    def __hash__(self):
        return self.calls

    def forward(self, x):
        self.calls += 1
        return x


class EqualUNet(UNet):
    def __eq__(self, other):
        return isinstance(other, UNet)

    def __hash__(self):
        return 0


class OwnEquality(Plain):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.odd = Alike(16, 16), Alike(16, 16), Ambiguous()
        self.other = EqualUNet()  # equal to the denoiser, and never called

    def make_net(self):
        return EqualUNet()

    def loss(self, x):
        return super().loss(self.odd(self.second(self.first(x.flatten(1)))).detach().reshape(x.shape))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-3)


STYLES = [
    LabelDropout, Latent, Transformer, ByHandSchedule, EDM, FlowMatching, MinSNR, Velocity, LearnedVariance,
    SelfConditioning, ColdDiffusion, Accumulated, Compiled, Checkpointed, Autocast, Manual, TwoOptimizers, WithOwnEMA,
    WithLightningsEMA, ChannelsLast, Template, Collection, LoggedBeforehand, MetricAsLoss, OwnEquality,
]  # fmt: skip


def fit(tmp_path, module, threshold):
    arguments = {"num_bins": NUM_BINS} if module.continuous else {"num_timesteps": STEPS}
    agc = AntiGradientControl(threshold, **arguments, denoiser=module.denoiser)
    callbacks = [agc, *(make() for make in module.callbacks)]
    torch.manual_seed(1)
    quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1, **dict(module.settings)).fit(module, loader())
    return agc


@pytest.mark.filterwarnings("ignore:Found 3 module.* in eval mode")  # the frozen autoencoder
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_the_mask_equals_that_of_a_loop_over_samples(tmp_path, style):
    module, bank = style(), Bank()
    agc = fit(tmp_path, module, THRESHOLD)
    expected = [bank.keep(losses, times, module.continuous) for losses, times in module.notes]
    assert module.arrived[-BATCHES:] == expected  # gradients arrived before, when the first batch was tested
    assert len(expected) == BATCHES
    assert 10 < bank.skipped < BATCHES * SIZE - 10
    assert agc.run_statistics.skipped.sum() == bank.skipped


@pytest.mark.parametrize("style", [Template, Collection, LoggedBeforehand, OwnEquality], ids=lambda s: s.__name__)
def test_threshold_zero_changes_nothing(tmp_path, style):
    module, plain = style(), style()
    fit(tmp_path, module, 0)
    torch.manual_seed(1)
    quiet_trainer(tmp_path, max_epochs=1).fit(plain, loader())
    for ours, theirs in zip(module.net.parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(ours, theirs)
